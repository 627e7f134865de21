"""What `vismem plan` says of the disk is what the steps leave there."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from vismem.config import Config, parse_config
from vismem.plan import Plan, plan
from vismem.preflight import check_disk, data_gb
from vismem.training.base import base


def config_of(folder: Path, dtype: str, **sections: Any) -> Config:
    group = {"group_size": 2, "steps": 1}
    return parse_config(
        {
            "base": {"model": str(folder), "dtype": dtype},
            "memory": tiny.MEMORY.model_dump(),
            "grpo": {"batch_size": 1, "max_new_tokens": 12, "micro_batch": 4},
            "stage1": {**group, "warm_start": {"steps": 1, "batch_size": 2}},
            **sections,
        }
    )


def planned(config: Config) -> Plan:
    return plan(config, "1xH100", "112x84", ["stage1"])


def test_the_checkpoints_are_those_of_the_warm_start_and_of_grpo_one_of_them_twice(tiny_base: Path) -> None:
    found = planned(config_of(tiny_base, "float32"))
    assert found.asked.size == (112, 84)
    formation = sum(found.added[part] for part in ("builder", "short", "long"))
    numbers = formation + found.added["policy_lora"] + 2 * formation
    assert found.disk["checkpoints, the last twice while it is replaced"] == 12 * numbers


@pytest.mark.parametrize(("dtype", "copied"), [("float32", False), ("bfloat16", True)])
def test_the_bases_weights_are_there_twice_where_their_type_is_another(
    tiny_base: Path, tmp_path: Path, dtype: str, copied: bool
) -> None:
    config = config_of(tiny_base, dtype)
    disk, said = planned(config).disk, base(config, {}, tmp_path)
    assert ("copied as bfloat16" in said) == ("base: its copy of them in bfloat16" in disk) == copied
    folders = [tiny_base, tmp_path][: 1 + copied]
    real = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in folders]
    assert list(disk.values())[: len(real)] == pytest.approx(real, rel=0.02)
    assert disk["DVC's copies of what steps write"] == sum(
        disk[part] for part in disk if part.startswith(("stage1", "export"))
    )


def test_the_data_are_there_for_two_steps_and_again_in_dvc_s_cache(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(bytes(3_000_000))
    rows = tmp_path / "train.jsonl"
    rows.write_text(json.dumps({"image": "one.png"}) + "\n")
    source = {"kind": "jsonl", "path": str(rows), "split": "train"}
    config = config_of(tiny_base, "float32", prepare={"sources": [source]}, preflight={"free_disk_gb": 2})
    data, disk, without = 3_000_000 + rows.stat().st_size, planned(config).disk, config_of(tiny_base, "float32")
    assert disk["prepare and validate: the data, more where images are shared"] == 2 * data
    copies = "DVC's copies of what steps write"
    assert disk[copies] == planned(without).disk[copies] + 2 * data
    assert data_gb(config, tmp_path) == pytest.approx(4 * data / 1e9)
    any_space = config_of(tiny_base, "float32", prepare={"sources": [source]}, preflight={"free_disk_gb": 0})
    assert data_gb(any_space, tmp_path) == 0
    (tmp_path / "prepare").mkdir()
    assert data_gb(config, tmp_path) == 0, "the data are there"


def test_a_disk_without_room_for_the_data_is_told_from_one_without_what_is_asked_for(tmp_path: Path) -> None:
    assert check_disk(tmp_path, 0, 0.001).ok
    found = check_disk(tmp_path, 0.001, 1e6)
    assert not found.ok
    assert " GB free at " in found.seen
    assert found.seen.endswith(", 0.001 GB asked for and 1000000.0 for the data, four times their files")
    assert found.remedy.endswith("or lower preflight.free_disk_gb (0 asks for none, nor for the data)")

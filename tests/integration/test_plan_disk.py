"""What `vismem plan` says of the disk is what the steps leave there."""

from pathlib import Path

import pytest
import tiny

from vismem.config import Config, parse_config
from vismem.plan import Plan, plan
from vismem.training.base import base


def config_of(folder: Path, dtype: str) -> Config:
    group = {"group_size": 2, "steps": 1}
    return parse_config(
        {
            "base": {"model": str(folder), "dtype": dtype},
            "memory": tiny.MEMORY.model_dump(),
            "grpo": {"batch_size": 1, "max_new_tokens": 12, "micro_batch": 4},
            "stage1": {**group, "warm_start": {"steps": 1, "batch_size": 2}},
        }
    )


def planned(config: Config) -> Plan:
    return plan(config, "1xH100", "112x84", ["stage1"])


def test_the_checkpoints_are_those_of_the_warm_start_and_of_grpo_one_of_them_twice(tiny_base: Path) -> None:
    found = planned(config_of(tiny_base, "float32"))
    assert found.image == (112, 84)
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

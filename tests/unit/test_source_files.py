"""What a run reads from outside `data/`: DVC sees that it has changed by a record of it there."""

from pathlib import Path

import pytest

from vismem.config import Config, parse_config
from vismem.data.source_files import RECORD, record_outside


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for place in ("assets/tiny-vlm", "mine/base"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "model.safetensors").write_text("weights")
    return tmp_path


def with_base(model: str) -> Config:
    return parse_config({"base": {"model": model}})


def test_a_base_of_one_s_own_that_was_changed_in_place_is_noticed(folder: Path) -> None:
    def seen() -> str:
        record_outside(with_base("mine/base"))
        return RECORD.read_text()

    before = seen()
    assert seen() == before
    (folder / "mine" / "base" / "model.safetensors").write_text("weights, trained on")
    after = seen()
    assert after != before
    (folder / "mine" / "base" / "tokenizer.json").write_text("{}")
    assert seen() not in (before, after)


@pytest.mark.parametrize("model", ["assets/tiny-vlm", "Qwen/Qwen2.5-VL-7B-Instruct"])
def test_the_base_that_comes_with_vismem_and_one_of_the_hub_leave_no_record(folder: Path, model: str) -> None:
    record_outside(with_base(model))
    assert not RECORD.exists()

"""A full disk ends in one line, whichever library meets it. /dev/full is a file on a disk that is always full."""

import json
import resource
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from vismem import steps
from vismem.config import Config
from vismem.disk import explain_full_disk
from vismem.errors import UserError
from vismem.files import write_text
from vismem.steps import Step, run_step

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")


def weights(file: Path) -> None:
    """It writes elsewhere and renames, so that the disk's end is played by a limit on the size of files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        save_file({"a": torch.zeros(100_000)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def table(file: Path) -> None:
    pq.write_table(pa.table({"a": list(range(100_000))}), file)


def text(file: Path) -> None:
    file.write_text("x" * 100_000)


def step(config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    (out / "first.txt").write_text("first")
    (out / "weights.bin").symlink_to(FULL)
    text(out / "weights.bin")
    return "never"


@pytest.mark.parametrize("write", [weights, table, text])
def test_a_full_disk_is_known_from_whatever_a_library_says(tmp_path: Path, write: Callable[[Path], None]) -> None:
    file = tmp_path / "partial" / "file"
    file.parent.mkdir()
    file.symlink_to(FULL)
    said = (
        r"cannot write .*, the disk is full: [0-9.]+ MB free at .*partial, after [0-9.]+ MB of the output\. Free some"
    )
    with pytest.raises(UserError, match=said), explain_full_disk(tmp_path / "partial", tmp_path / "out"):
        write(file)


def test_a_step_that_meets_a_full_disk_keeps_its_old_output_and_says_how_large_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "BY_NAME", {"step": Step("step", f"{__name__}:step", (), ())})
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "old").write_bytes(b"x" * 3_000_000)
    with pytest.raises(UserError, match=r"MB free at .*, and .*step takes 3\.0 MB; it stays as it was"):
        run_step("step", Config(), tmp_path)
    assert (tmp_path / "step" / "old").is_file()


def test_a_write_in_one_move_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, text: str) -> None:
        raise OSError(28, "No space left on device")  # as the kernel's, without a name

    monkeypatch.setattr(Path, "write_text", full)
    file = tmp_path / "metrics.json"
    said = r"cannot write .*metrics\.json, the disk is full"
    with pytest.raises(UserError, match=said), explain_full_disk(tmp_path, tmp_path / "out"):
        write_text(file, json.dumps({}))


def test_what_a_database_says_of_it_is_kept_and_other_errors_pass(tmp_path: Path) -> None:
    said = r"^MLflow: database or disk is full; [0-9.]+ MB free at"
    with pytest.raises(UserError, match=said), explain_full_disk(tmp_path, tmp_path / "out"):
        raise UserError("MLflow: database or disk is full")
    with pytest.raises(PermissionError), explain_full_disk(tmp_path, tmp_path / "out"):
        raise PermissionError(13, "Permission denied")

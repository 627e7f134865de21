"""A training's checkpoint and curve: they fit each other whenever it is killed, and long trainings cost no more."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from tiny_stages import Slope
from torch import nn

from vismem.errors import UserError
from vismem.evaluation.plots import read_curves
from vismem.registry.runs import read_curve
from vismem.training.checkpoint import Checkpoint, Curve, TrainState
from vismem.training.loop import LoopSettings, train

SETTINGS = LoopSettings("run", steps=7, learning_rate=0.1, warmup_ratio=0.1, checkpoint_every=3)
LONG = 400_000


def figures(weight: float, step: int) -> dict[str, float]:
    """The last appears only at step 4."""
    return {"loss": weight / 3, **({"late": 1.0} if step >= 4 else {})}


def run(out: Path, settings: LoopSettings = SETTINGS) -> TrainState:
    slope = Slope(figures)
    return train(slope, {"weight": slope.weight}, settings, out, Accelerator(cpu=True))


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def adam(weight: nn.Parameter) -> list[torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW([{"params": [weight], "name": "weight"}])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return [optimizer]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("owner", "name", "times"), [(Curve, "append", 7), (Curve, "sync", 3), (Checkpoint, "save", 3)]
)
def test_a_training_killed_between_two_writes_resumes_as_if_never_killed(
    owner: type, name: str, times: int, after: bool, tmp_path: Path
) -> None:
    unbroken, method = run(tmp_path / "unbroken"), getattr(owner, name)
    for nth in range(times):
        calls, out = [], tmp_path / str(nth)

        def killed(self: Any, *arguments: Any, calls: list[int] = calls, nth: int = nth) -> None:
            calls.append(1)
            if after or len(calls) <= nth:
                method(self, *arguments)
            if len(calls) > nth:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, killed)
            with pytest.raises(KeyboardInterrupt):
                run(out)
        resumed = run(out)
        assert (resumed.steps, resumed.last) == (unbroken.steps, unbroken.last)
        files = [folder / "run.csv" for folder in (tmp_path / "unbroken", out)]
        assert files[0].read_bytes() == files[1].read_bytes()
        first, again = (load_file(file.with_suffix(".checkpoint")) for file in files)
        assert first == again


def test_a_curve_holds_every_step_and_figure(tmp_path: Path) -> None:
    run(tmp_path)
    found = rows(tmp_path / "run.csv")
    assert [row["step"] for row in found] == list("0123456")
    assert found[0]["loss"] == "0.333333"
    assert [row["late"] for row in found] == [""] * 4 + ["1.0"] * 3


def values(file: Path) -> list[tuple[str, float, int]]:
    """The curve without its times, which are the file's."""
    return [(name, value, step) for name, value, step, _ in read_curve(file)]


def test_a_line_that_was_half_written_is_not_read_and_is_cut_on_resuming(tmp_path: Path) -> None:
    run(tmp_path)
    file = tmp_path / "run.csv"
    whole, points = file.read_bytes(), values(file)
    file.write_bytes(whole + b"7,0.1")
    assert values(file) == points
    run(tmp_path)
    assert file.read_bytes() == whole


def test_a_curve_that_lacks_steps_of_its_checkpoint_is_an_error(tmp_path: Path) -> None:
    run(tmp_path)
    file = tmp_path / "run.csv"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="has 6 steps"):
        run(tmp_path)
    file.write_bytes(b"".join(whole.splitlines(keepends=True)[:4]))
    with pytest.raises(UserError, match=r"run\.csv has 3 steps and the checkpoint beside it 7: delete both"):
        run(tmp_path)
    file.write_bytes(b"\xff" + whole[1:])
    with pytest.raises(UserError, match=r"run\.csv is damaged: delete it and the checkpoint"):
        run(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="has 0 steps"):
        run(tmp_path)


def test_the_curve_is_on_the_disk_before_a_checkpoint_that_knows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(Curve, "sync", lambda _: order.append("curve"))
    monkeypatch.setattr(Checkpoint, "save", lambda *_: order.append("checkpoint"))
    run(tmp_path)
    assert order == ["curve", "checkpoint"] * 3


def test_a_checkpoint_of_another_version_is_an_error(tmp_path: Path) -> None:
    save_file({"parameter/weight": torch.ones(1)}, tmp_path / "run.checkpoint", metadata={"history": "[]"})
    with pytest.raises(UserError, match=r"another version of vismem .*: delete it"):
        run(tmp_path)


def test_a_training_of_no_steps_leaves_no_curve_that_cannot_be_read(tmp_path: Path) -> None:
    """As the warm start of the profiles for large models."""
    run(tmp_path, LoopSettings("none", steps=0, learning_rate=0.1, warmup_ratio=0.1))
    run(tmp_path)
    assert {name: len(table) for name, table in read_curves(tmp_path).items()} == {"run": 7}


def test_a_training_of_many_steps_is_saved_and_resumed_at_the_cost_of_a_short_one(tmp_path: Path) -> None:
    figures = {f"figure_{i}": i / 7 for i in range(12)}
    file, used = tmp_path / "run.csv", adam(nn.Parameter(torch.ones(4)))
    sizes = []
    for steps in (1, LONG):
        curve = Curve(file, 0)
        curve.append({"step": 0, **figures})
        header, line = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(header + b"".join(line.replace(b"0", b"%d" % i, 1) for i in range(steps)))
        checkpoint = Checkpoint(tmp_path / "run.checkpoint", used)
        checkpoint.save(TrainState(steps, steps / 3, {"step": steps - 1, **figures}))
        sizes.append(checkpoint.file.stat().st_size)
    assert sizes[1] - sizes[0] < 100
    assert checkpoint.load() == TrainState(LONG, LONG / 3, {"step": LONG - 1, **figures})
    long, inode = file.stat().st_size, file.stat().st_ino
    curve = Curve(file, LONG)
    curve.append({"step": LONG, **figures})
    curve.sync()
    assert file.stat().st_ino == inode, "appended to, not written anew"
    with file.open("rb") as lines:
        lines.seek(long)
        assert lines.read().decode().split(",")[:2] == [str(LONG), "0.0"]

"""What a killed training resumes from: its checkpoint, and its curve as far as the checkpoint knows it."""

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vismem.errors import UserError, first_line
from vismem.files import write_text


@dataclass
class TrainState:
    """How far a training is."""

    steps: int = 0
    seconds: float = 0.0  # of all steps
    last: dict[str, float] = field(default_factory=dict)  # figures of the last step


class Checkpoint:
    """The weights that optimisers update, their state and the train state: one safetensors file, replaced in one move.

    Its size does not depend on the number of steps.
    """

    def __init__(self, file: Path, used: Sequence[torch.optim.Optimizer]) -> None:
        self.file = file
        self.held = {group["name"]: (group["params"][0], each.state) for each in used for group in each.param_groups}

    def load(self) -> TrainState:
        """Restore what `save` wrote; without a file nothing is restored.

        UserError for a file that is damaged, or of another version or model.
        """
        if not self.file.is_file():
            return TrainState()
        try:
            return self._restore()
        except (SafetensorError, LookupError, TypeError, ValueError) as error:
            said = f"{self.file} is damaged, or of another version of vismem ({first_line(error)})"
            raise UserError(f"{said}: delete it to train anew") from None

    @torch.no_grad()
    def _restore(self) -> TrainState:
        with safe_open(self.file, framework="pt") as file:
            metadata, keys = file.metadata() or {}, file.keys()
            train_state = TrainState(**json.loads(metadata["train_state"]))
            if other := {key for key in keys if key.startswith("parameter/")} ^ {f"parameter/{n}" for n in self.held}:
                raise ValueError(f"other weights, such as {min(other)}")
            for name, (weight, state) in self.held.items():
                if (shape := file.get_slice(f"parameter/{name}").get_shape()) != [*weight.shape]:
                    raise ValueError(f"{name} of shape {shape}, not {[*weight.shape]}")
                weight.copy_(file.get_tensor(f"parameter/{name}"))
                for kind in [key.removesuffix(f"/{name}") for key in keys if key.endswith(f"/{name}")]:
                    if kind != "parameter":
                        device = "cpu" if kind == "step" else weight.device
                        state[weight][kind] = file.get_tensor(f"{kind}/{name}").to(device)
        return train_state

    def save(self, train_state: TrainState) -> None:
        """Write everything that `load` restores."""
        tensors = {
            f"{kind}/{name}": value.detach().cpu().contiguous()
            for name, (weight, state) in self.held.items()
            for kind, value in {"parameter": weight, **state[weight]}.items()
        }
        save_whole(tensors, self.file, {"train_state": json.dumps(asdict(train_state))})


class Curve:
    """The figures of every step as CSV, appended as they come: others follow the file while it grows.

    Rounded to six digits; a figure that a step does not have stays empty.
    """

    def __init__(self, file: Path, steps: int) -> None:
        """Go on behind the first `steps` steps: a killed training wrote more than its checkpoint knows.

        UserError where the file has fewer, or is none of figures.
        """
        self.file = file
        self.names: list[str] = []  # none: the first step replaces what a killed training left
        if steps:
            self._cut(steps)

    def _cut(self, steps: int) -> None:
        kept: list[int] = []
        if self.file.is_file():
            with self.file.open("rb+") as lines:
                header = lines.readline()
                kept = [len(line) for line in islice(lines, steps) if line.endswith(b"\n")]
                if len(kept) == steps:
                    lines.truncate(len(header) + sum(kept))
                    self.names = next(csv.reader([header.decode(errors="replace")]))
        if len(kept) < steps:
            raise UserError(
                f"{self.file} has {len(kept)} steps and the checkpoint beside it {steps}: delete both to train anew"
            )
        if self.names[:1] != ["step"]:
            raise UserError(f"{self.file} is damaged: delete it and the checkpoint beside it to train anew")

    def append(self, figures: dict[str, float]) -> None:
        """Add a step. Only one with a figure that no step before it had costs writing the file anew."""
        row = {name: round(value, 6) for name, value in figures.items()}
        if row.keys() <= set(self.names):
            with self.file.open("a", newline="") as lines:
                csv.DictWriter(lines, self.names).writerow(row)
            return
        before: list[dict[str, str]] = []
        if self.names:
            with self.file.open(newline="") as lines:
                before = list(csv.DictReader(lines))
        self.names += [name for name in row if name not in self.names]
        fresh = io.StringIO(newline="")
        writer = csv.DictWriter(fresh, self.names)
        writer.writeheader()
        writer.writerows([*before, row])
        write_text(self.file, fresh.getvalue())

    def sync(self) -> None:
        """Return when the file is on the disk, so that no checkpoint that follows knows more steps."""
        sync(self.file)


def save_whole(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors in one move, onto the disk: who is killed meanwhile has the old file or the new one."""
    fresh = file.with_suffix(".new")
    save_file(tensors, fresh, metadata=metadata)
    sync(fresh)
    fresh.replace(file)


def sync(file: Path) -> None:
    """Return when the file is on the disk."""
    with file.open("rb") as written:
        os.fsync(written.fileno())

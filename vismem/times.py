"""How long the steps take: as in the last run of the same parameters, else as the default model takes here or there."""

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from vismem.config import DEFAULT_BASE, Config
from vismem.errors import UserError
from vismem.files import read_json, write_json
from vismem.steps import BY_NAME, all_sections

SPLITS = ("train", "validation", "test")
ENOUGH = 5.0  # seconds of work, after which the machine's speed can be told


class Times:
    """The steps' expected seconds, corrected by those of this run; `file` keeps them for the next."""

    def __init__(self, file: Path, config: Config) -> None:
        self.file, self.config = file, config
        try:
            self.kept = {name: (float(seconds), str(of)) for name, (seconds, of) in read_json(file).items()}
        except (UserError, AttributeError, TypeError, ValueError):  # none yet, or damaged: it is only a guess
            self.kept = {}
        known = {name: seconds for name, (seconds, of) in self.kept.items() if of == self._made_of(name)}
        self.expected: dict[str, float] = {**usual_seconds(config), **known}
        self.took, self.guessed = 0.0, 0.0
        self.running: tuple[str, float] | None = None

    def begin(self, name: str) -> None:
        """Note that a step begins."""
        self.running = (name, time.monotonic())

    def end(self) -> None:
        """Note that the step has ended as it should."""
        if self.running is None:
            return
        name, began = self.running
        seconds, self.running = time.monotonic() - began, None
        if name in self.expected:
            self.took, self.guessed = self.took + seconds, self.guessed + self.expected[name]
        if name in BY_NAME:
            self.kept[name] = (round(seconds, 1), self._made_of(name))
            with suppress(OSError):  # a full disk: the step has its output, and this is only a guess
                write_json(self.file, self.kept)

    def left(self, names: list[str]) -> float | None:
        """Expected seconds of these steps, or None where one was never run with such parameters."""
        if not all(name in self.expected for name in names):
            return None
        speed = self.took / self.guessed if self.guessed > ENOUGH else 1.0
        return speed * sum(self.expected[name] for name in names)

    def _made_of(self, name: str) -> str:
        """The parameters that a step's time hangs on: its own and those of all steps before it."""
        if name not in BY_NAME:
            return ""
        values = self.config.model_dump(mode="json", by_alias=True)
        chosen = {section: values[section] for section in sorted(all_sections(name) - {"seed"})}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def usual_seconds(config: Config) -> dict[str, float]:
    """Seconds of each step where the tiny VLM learns from questions that come with VisMem; else nothing."""
    sources = config.prepare.sources
    if config.base.model != DEFAULT_BASE or not all(source.kind in ("scenes", "easy_vqa") for source in sources):
        return {}
    return tiny_vlm_seconds(config, {split: sum(getattr(source, split) for source in sources) for split in SPLITS})


def tiny_vlm_seconds(config: Config, counts: Mapping[str, int]) -> dict[str, float]:
    """Seconds of each step with the tiny VLM on one core, for so many rows of each split: measured, roughly."""
    rows, test = sum(counts.values()), min(counts["test"], config.evaluate.limit or counts["test"])
    warm, prompts = config.stage1.warm_start, config.grpo.batch_size

    def rollouts(steps: int, group: int) -> int:
        return group * (steps * prompts or config.grpo.epochs * counts["train"])

    return {
        "prepare": 2 + 0.0022 * rows,
        "validate": 7 + 0.00014 * rows,
        "base": 5,
        "stage1": 25
        + 0.024 * warm.steps * warm.batch_size
        + 0.024 * rollouts(config.stage1.steps, config.stage1.group_size),
        "stage2": 40 + 0.03 * rollouts(config.stage2.steps, config.stage2.group_size),
        "evaluate": 11 + 0.007 * test * len(config.evaluate.arms),
        "export": 23,
        "register": 4,
        "promote": 4,
        "deploy": 6,
    }

"""Every arm answers the same questions, timed; processes share the batches, and a killed run resumes behind its own."""

import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from pydantic import TypeAdapter

from vismem.config import Config
from vismem.data.sample import Sample
from vismem.errors import UserError
from vismem.evaluation.arms import Arm
from vismem.files import write_text
from vismem.generation.batches import FittingBatches
from vismem.generation.types import Rollout
from vismem.models.vismem import VisMemModel
from vismem.progress import progress
from vismem.ranks import share_of_work

WARM_UP = 8  # items that every arm answers once, untimed, before the first timed batch

ANSWERS, KEEP_EVERY = "answers-{}.checkpoint", 30.0  # of a process; seconds: after a kill, no more is answered again


@dataclass
class Run:
    """An arm's answers, in the order of the samples, and the seconds spent decoding them."""

    rollouts: list[Rollout] = field(default_factory=list)
    seconds: float = 0.0


Answers = dict[int, dict[str, Run]]  # by batch and arm
_ANSWERS = TypeAdapter(Answers)


class AnswerStore:
    """The answers of all processes so far; each keeps its own in a file of `folder`, where there is one."""

    def __init__(self, folder: Path | None, rank: int) -> None:
        """UserError where the processes find other answers."""
        files = sorted(folder.glob(ANSWERS.format("*"))) if folder else []
        known = {file.name: _ANSWERS.validate_json(file.read_bytes()) for file in files}
        self._file = folder / ANSWERS.format(rank) if folder else None
        self._own, self._saved = known.get(ANSWERS.format(rank), {}), time.monotonic()
        self.done = _flat(known.values())
        seen = gather_object([sorted(self.done)])  # and nobody writes before all have read
        if any(found != seen[0] for found in seen):
            raise UserError(f"the processes do not see the same files in {folder}: put it on shared storage")

    def add(self, batch: int, answers: dict[str, Run], last: bool) -> None:
        """Keep a batch's answers; the file is written every KEEP_EVERY seconds, and with the `last` batch."""
        self._own[batch] = self._own.get(batch, {}) | answers
        if self._file and (last or time.monotonic() - self._saved >= KEEP_EVERY):
            write_text(self._file, _ANSWERS.dump_json(self._own).decode())
            self._saved = time.monotonic()

    def merged(self) -> dict[tuple[int, str], Run]:
        """The answers of all processes, by batch and arm."""
        return self.done | _flat(gather_object([self._own]))


def decode(
    models: Mapping[str, VisMemModel],
    arms: Sequence[Arm],
    samples: Sequence[Sample],
    config: Config,
    folder: Path | None = None,
    accelerator: Accelerator | None = None,
    about: str = "evaluate",
) -> dict[str, Run]:
    """Answer `samples` greedily with every arm, each by its model of `models`. Only decoding is timed.

    The arms take turns batch by batch, each round in another order, so that a drifting machine hits all alike. Several
    processes share the batches, which are the same however many they are, so that no answer depends on it; all return
    all answers. Answers so far go to files in `folder` from time to time and at the end, and are read from there: a
    killed run resumes behind them, and an arm that has answered does not again. `about`: for the progress.
    """
    accelerator = accelerator or Accelerator(cpu=not torch.cuda.is_available())
    together = accelerator.num_processes if config.base.tensor_parallel else 1
    store = AnswerStore(folder, accelerator.process_index)
    count = math.ceil(len(samples) / config.evaluate.batch_size)
    ends = [len(samples) * batch // count for batch in range(count + 1)]  # of one size, so that none is left alone
    fitting = FittingBatches()
    turns = schedule(count, arms, store.done, *share_of_work(accelerator, together))
    for arm in arms:
        if any(arm in due for due in turns.values()):
            _answer(models[arm.model], arm, samples[:WARM_UP], config, fitting)
    asked = sum((ends[batch + 1] - ends[batch]) * len(due) for batch, due in turns.items())
    with progress(about, asked, quiet=not accelerator.is_main_process) as advance:
        for batch, due in turns.items():
            questions, answers = samples[ends[batch] : ends[batch + 1]], dict[str, Run]()
            for arm in due:
                answers[arm.name] = _answer(models[arm.model], arm, questions, config, fitting)
                advance(len(questions), arm=arm.label)
            store.add(batch, answers, last=batch == max(turns))
    done, runs = store.merged(), {arm.name: Run() for arm in arms}
    for batch in range(count):
        for name, run in runs.items():
            run.rollouts += done[batch, name].rollouts
            run.seconds += done[batch, name].seconds
    return runs


def schedule(
    batches: int, arms: Sequence[Arm], done: Collection[tuple[int, str]], share: int, shares: int
) -> dict[int, list[Arm]]:
    """Batch -> the arms whose turn it is, of the share of the batches that lack answers; each in another order."""
    left = {batch: [arm for arm in arms if (batch, arm.name) not in done] for batch in range(batches)}
    mine = [batch for batch in left if left[batch]][share::shares]
    due = [arm for arm in arms if any(arm in left[batch] for batch in mine)]
    shifts = {batch: batch % len(due) for batch in mine}
    return {batch: [arm for arm in (*due[n:], *due[:n]) if arm in left[batch]] for batch, n in shifts.items()}


def _flat(kept: Iterable[Answers]) -> dict[tuple[int, str], Run]:
    return {(batch, arm): run for answers in kept for batch, by_arm in answers.items() for arm, run in by_arm.items()}


def _answer(model: VisMemModel, arm: Arm, samples: Sequence[Sample], config: Config, fitting: FittingBatches) -> Run:
    longest = config.evaluate.max_new_tokens
    return Run(*fitting.generate(model, samples, arm.policy, max_new_tokens=longest, seed=config.seed))

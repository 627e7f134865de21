"""What the benchmarks share: a base and samples, clocks on named parts, peak memory, a GRPO step, and the report."""

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vismem.config import BaseConfig, ScenesSource
from vismem.data.collate import target_text
from vismem.data.sample import Sample
from vismem.data.scenes import generate as scenes
from vismem.generation.types import Rollout
from vismem.training.embedded import build_model, build_processor
from vismem.training.rollout import GrpoObjective

Seconds = dict[str, float]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the script's description and the option --json."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, help="file for the figures")
    return made


def publish(figures: dict[str, Any], report: str, file: Path | None) -> None:
    """Print the report and write the figures, both with the machine and the command."""
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    figures |= {"machine": machine(), "command": command, "load_average": os.getloadavg()[0]}
    print(f"{figures['machine']}; load average {figures['load_average']:.1f}\n`{command}`\n\n{report}")
    if file is not None:
        file.write_text(json.dumps(figures, indent=1) + "\n")


def machine() -> str:
    """Device, threads and versions in one line."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"{device}; Python {platform.python_version()}, {packages}"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def questions(count: int, side: int = 84) -> list[Sample]:
    """Questions about one generated image each, `side` pixels wide."""
    made = scenes(
        ScenesSource(train=2 * count + 16, validation=0, test=0, pretrain=0, image_size=side), "train", seed=0
    )
    return [sample for sample in made if len(sample.images) == 1][:count]


def processor_for(samples: Sequence[Sample]) -> Any:
    """The tiny VLM's processor, with a vocabulary of the samples' words."""
    return build_processor(text for s in samples for text in (s.question, target_text(s)))


def random_base(folder: Path, samples: Sequence[Sample]) -> Path:
    """A base with random weights whose answers wander: a head like the embeddings would only repeat the last word."""
    processor = processor_for(samples)
    model = build_model(BaseConfig(), processor, seed=0)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def peak_mib(prepare: Callable[[], Callable[[], object]]) -> float:
    """Peak MiB of the work that `prepare` returns, on top of what is held before it; in a fork of this process (Linux).

    Call it before this process computes a gradient: torch does not survive a fork after that.
    """
    receiver, sender = get_context("fork").Pipe(duplex=False)

    def held(line: str) -> float:
        return float(Path("/proc/self/status").read_text().split(line + ":")[1].split()[0]) / 1024

    def measure() -> None:
        work = prepare()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = held("VmRSS")
        work()
        sender.send(held("VmHWM") - before)

    process = get_context("fork").Process(target=measure)
    process.start()
    sender.close()  # so that a child that fails is noticed
    found: float = receiver.recv()
    process.join()
    return round(found, 1)


class Parity:
    """Before an objective: a reward that costs nothing and has spread on a random model, too (whether a sum is odd)."""

    def shaped(self, rewards: Tensor, batch: Sequence[Sample], rollouts: Sequence[Rollout], step: int) -> Tensor:
        odd = torch.tensor([float(sum(r.token_ids) % 2) for r in rollouts]).view_as(rewards)
        return super().shaped(odd, batch, rollouts, step)  # type: ignore[misc,no-any-return]


def stepper(
    objective: GrpoObjective, trained: Mapping[str, torch.nn.Parameter], rate: float
) -> Callable[[], dict[str, float]]:
    """A function that takes a training step (sample, score, update) and returns its metrics."""
    optimizer = torch.optim.AdamW(trained.values(), lr=rate)
    at = iter(range(10**9))

    def step() -> dict[str, float]:
        batch = objective.collect(next(at))
        optimizer.zero_grad()
        metrics = objective.backward(batch)
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        return metrics

    return step


class Parts(ExitStack):
    """Seconds of named parts of some work. A part's time is its own: what is called inside it counts elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: Seconds = defaultdict(float)
        self._stack: list[str] = []
        self._whole: set[str] = set()
        self._since = 0.0

    def wrap(self, owner: Any, attribute: str, name: str, whole: bool = False) -> None:
        """Count calls of `owner.attribute` (a function or a method) as part `name`, until the block is left.

        `whole`: with the parts called inside.
        """
        original = getattr(owner, attribute)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._stack and self._stack[-1] in self._whole:
                return original(*args, **kwargs)
            self._switch()
            self._stack.append(name)
            try:
                return original(*args, **kwargs)
            finally:
                self._switch()
                self._stack.pop()

        if whole:
            self._whole.add(name)
        self.enter_context(mock.patch.object(owner, attribute, timed))

    def run(self, function: Callable[[], object]) -> Seconds:
        """Call `function`; returns the seconds of each part, and of what no part claims. They add up to the whole."""
        self.seconds.clear()
        self._since = now()
        self._stack.append("the rest")
        function()
        self._switch()
        self._stack.pop()
        return dict(self.seconds)

    def _switch(self) -> None:
        moment = now()
        if self._stack:
            self.seconds[self._stack[-1]] += moment - self._since
        self._since = moment


def now() -> float:
    """Seconds: on a GPU by the clock, once it has caught up; else of this process alone, whatever else runs."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def step_parts() -> Parts:
    """Clocks on the parts of a GRPO step: sampling, forming, the replay, the backward pass, the reference."""
    from accelerate import Accelerator

    from vismem.models.vismem import VisMemModel
    from vismem.training import rollout, stage2
    from vismem.training.stage1 import Formation

    parts = Parts()
    parts.wrap(rollout, "generate", "sampling")
    parts.wrap(stage2, "generate", "swapped sampling")
    parts.wrap(rollout, "prefill", "reading prompts")
    parts.wrap(rollout, "score", "replay, forward")
    for objective in (GrpoObjective, Formation):
        parts.wrap(objective, "reference", "reference", whole=True)
    for method in ("form", "short_stream", "long_prefix"):
        parts.wrap(VisMemModel, method, "forming")
    parts.wrap(Accelerator, "backward", "backward")
    return parts


def mean_parts(runs: Sequence[Seconds]) -> Seconds:
    """The mean seconds of each part over several runs; a part that a run does not have counts 0."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: statistics.mean(run.get(name, 0.0) for run in runs) for name in names}

"""What the benchmarks share: options, report, base, samples, sides that answer, GRPO steps, clocks, peak memory."""

import argparse
import functools
import io
import json
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.metadata import version
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from PIL import Image

from vismem.config import GrpoConfig, GrpoStageConfig, ScenesSource, Stage1Config, Stage2Config
from vismem.data.sample import Sample
from vismem.data.scenes import generate as scenes
from vismem.export.onnx import write_graphs
from vismem.generation.prompts import prompt_text
from vismem.generation.types import Rollout
from vismem.models.loading import load_base
from vismem.models.vismem import VisMemModel
from vismem.serving.answering import Runtime
from vismem.serving.pieces import Chunk
from vismem.training import rollout
from vismem.training.baselines import PolicyGrpo
from vismem.training.rollout import GrpoObjective
from vismem.training.run import FORMATION, INVOCATION, POLICY_LORA, trainable
from vismem.training.stage1 import Formation
from vismem.training.stage2 import Invocation

ROOT = Path(__file__).resolve().parents[1]
TINY_VLM, MEMORY = ROOT / "assets" / "tiny-vlm", ROOT / "assets" / "tiny-vlm-memory"
OBJECTIVES: dict[type[GrpoStageConfig], tuple[type[GrpoObjective], tuple[str, ...]]] = {  # and what they train
    GrpoStageConfig: (PolicyGrpo, POLICY_LORA),
    Stage1Config: (Formation, FORMATION),
    Stage2Config: (Invocation, INVOCATION),
}
Seconds = dict[str, float]
Tokens = list[tuple[int, ...]]  # of each answer


def parser(doc: str | None, **integers: tuple[int, str]) -> argparse.ArgumentParser:
    """A parser with the script's description, --json, and options for integers, each with its default and its help."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, help="file for the figures")
    for name, (default, about) in integers.items():
        about += " (default: %(default)s)"
        made.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=about)
    return made


def publish(figures: dict[str, Any], report: str, file: Path | None) -> None:
    """Print the report and write the figures, both with the machine (device, threads, versions) and the command."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    machine = f"{device}; Python {platform.python_version()}, {packages}"
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    load = os.getloadavg()[0]
    print(f"{machine}; load average {load:.1f}\n`{command}`\n\n{report}")
    if file is not None:
        figures |= {"machine": machine, "command": command, "load_average": load}
        file.write_text(json.dumps(figures, indent=1) + "\n")


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median and range."""
    found = pd.Series(values).agg({"median": "median", "low": "min", "high": "max"})
    figures: dict[str, float] = found.round(4).to_dict()
    return figures


def table(header: str, rows: Iterable[str]) -> str:
    """A Markdown table; cells are separated by " | "."""
    lines = [header, " | ".join("---" for _ in header.split(" | ")), *rows]
    return "\n".join(f"| {line} |" for line in lines)


def questions(count: int, side: int = 84) -> list[Sample]:
    """Questions about one generated image each, `side` pixels wide."""
    made = scenes(ScenesSource(train=2 * count + 16, validation=0, test=0, image_size=side), "train", seed=0)
    return [sample for sample in made if len(sample.images) == 1][:count]


def random_base(folder: Path) -> Path:
    """The tiny VLM with a random head, so that its answers wander."""
    backbone = load_base(TINY_VLM)
    with torch.no_grad():
        backbone.head.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    backbone.model.save_pretrained(folder)
    backbone.processor.save_pretrained(folder)
    return folder


@torch.inference_mode()
def hugging_face(model: VisMemModel, samples: Sequence[Sample], max_new_tokens: int) -> Tokens:
    """Greedy answers by the base's own `generate`, each up to the first of the model's stop tokens."""
    processor, base = model.backbone.processor, model.backbone.model
    texts = [prompt_text(processor, s) for s in samples]
    images = [[Image.open(io.BytesIO(data)).convert("RGB") for data in s.images] for s in samples]
    encoded = processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
    with model.policy_lora.active(False):
        made = base.generate(**encoded.to(base.device), max_new_tokens=max_new_tokens, do_sample=False)
    answers = made[:, encoded["input_ids"].shape[1] :].tolist()
    ends = [next((i + 1 for i, token in enumerate(row) if token in model.stop_ids), len(row)) for row in answers]
    return [tuple(row[:end]) for row, end in zip(answers, ends, strict=True)]


def write_bundle(model: VisMemModel, folder: Path) -> None:
    """What a runtime opens: the model's graphs and its processor."""
    write_graphs(model, folder / "onnx", opset=18)
    model.backbone.processor.save_pretrained(folder / "processor")


def answer(runtime: Runtime, sample: Sample, **settings: Any) -> tuple[list[Chunk], float]:
    """An answer's chunks, and the seconds until the first came; `settings` are those of `Runtime.stream`."""
    started, first, chunks = time.perf_counter(), 0.0, []
    pictures = [Image.open(io.BytesIO(data)) for data in sample.images]
    for chunk in runtime.generate(pictures, sample.question, **settings):
        first = first or time.perf_counter() - started
        chunks.append(chunk)
    return chunks, first


def turn(
    ask: Callable[[Any], tuple[list[Chunk], float]], asked: Sequence[Any], streams: int
) -> tuple[list[list[Chunk]], float, float]:
    """All answers, asked by so many clients at a time: chunks, seconds, 95th percentile of the first chunk's."""
    started = time.perf_counter()
    with ThreadPoolExecutor(streams) as clients:
        answers = list(clients.map(ask, asked))
    seconds = time.perf_counter() - started
    return [chunks for chunks, _ in answers], seconds, float(np.percentile([first for _, first in answers], 95))


def peak_mib(prepare: Callable[[], Callable[[], object]]) -> float:
    """Peak MiB of the work that `prepare` returns, on top of what is held before it; in a fork of this process (Linux).

    Call it before this process computes a gradient: torch does not survive a fork after that.
    """
    receiver, sender = get_context("fork").Pipe(duplex=False)

    def measure() -> None:
        work = prepare()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = getrusage(RUSAGE_SELF).ru_maxrss
        work()
        sender.send((getrusage(RUSAGE_SELF).ru_maxrss - before) / 1024)

    process = get_context("fork").Process(target=measure)
    process.start()
    sender.close()  # so that a child that fails is noticed
    found: float = receiver.recv()
    process.join()
    return round(found, 1)


def parity(samples: Sequence[Sample], rollouts: Sequence[Rollout]) -> torch.Tensor:
    """(B, G) rewards that cost nothing and have spread on a random model, too: whether a sum of token ids is odd."""
    return torch.tensor([float(sum(r.token_ids) % 2) for r in rollouts]).view(len(samples), -1)


class Steps:
    """GRPO steps with the reward `parity`, of what the stage's configuration belongs to; a call takes the next.

    `metrics` are the last step's, and `memories` its memories per answer.
    """

    def __init__(self, model: VisMemModel, samples: Sequence[Sample], grpo: GrpoConfig, stage: GrpoStageConfig) -> None:
        kind, prefixes = OBJECTIVES[type(stage)]
        model.policy_lora.enabled = kind is PolicyGrpo
        self.trained = trainable(model, prefixes)
        accelerator = Accelerator(cpu=model.backbone.device.type == "cpu")
        self.objective = kind(model, samples, grpo, stage, 0, accelerator)
        self.objective.prompts_need_gradient = kind is PolicyGrpo
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-5)
        self.numbers = count()

    def __call__(self) -> None:
        """Sample, score, update."""
        with mock.patch.object(rollout, "rewards_of", parity):
            batch = self.objective.collect(next(self.numbers))
        self.optimizer.zero_grad()
        self.metrics = self.objective.backward(batch)
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.memories = self.metrics["invocations_short"] + self.metrics["invocations_long"]


class Parts(ExitStack):
    """Seconds of named parts of some work. A part's time is its own: what is called inside it counts elsewhere.

    Those in `whole` count with the parts called inside.
    """

    def __init__(self, *whole: str) -> None:
        super().__init__()
        self.whole = whole
        self.seconds: Seconds = defaultdict(float)
        self._open = ["the rest"]
        self._since = 0.0

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Count calls of `owner.attribute` (a function or a method) as part `name`, until the block is left."""
        original = getattr(owner, attribute)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._open[-1] in self.whole:
                return original(*args, **kwargs)
            self._count()
            self._open.append(name)
            try:
                return original(*args, **kwargs)
            finally:
                self._count()
                self._open.pop()

        self.enter_context(mock.patch.object(owner, attribute, timed))

    def run(self, function: Callable[[], object]) -> Seconds:
        """Call `function`; returns the seconds of each part, and of what no part claims. They add up to the whole."""
        self._count()
        self.seconds.clear()
        function()
        self._count()
        return dict(self.seconds)

    def _count(self) -> None:
        moment = now()
        self.seconds[self._open[-1]] += moment - self._since
        self._since = moment


def now() -> float:
    """Seconds: on a GPU by the clock, once it has caught up; else of this process alone, whatever else runs."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def step_parts() -> Parts:
    """Clocks on the parts of a GRPO step: sampling, forming, the replay, the backward pass, the reference."""
    parts = Parts("reference", "swapped sampling")
    parts.wrap(rollout, "generate", "sampling")
    parts.wrap(Invocation, "shaped", "swapped sampling")
    parts.wrap(rollout, "prefill", "reading prompts")
    parts.wrap(rollout, "score", "replay, forward")
    for objective in (GrpoObjective, Formation):
        parts.wrap(objective, "reference", "reference")
    for method in ("form", "short_stream", "long_prefix"):
        parts.wrap(VisMemModel, method, "forming")
    parts.wrap(Accelerator, "backward", "backward")
    return parts

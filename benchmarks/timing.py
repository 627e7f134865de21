"""What the benchmarks share: exclusive seconds of named parts, versions, and Markdown tables."""

import functools
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch


class Parts:
    """Seconds of named parts of a step. A part's time is its own: what is called inside it counts elsewhere."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._whole: set[str] = set()
        self._since = 0.0
        self._undo: list[Callable[[], None]] = []

    def wrap(self, owner: Any, attribute: str, name: str, whole: bool = False) -> None:
        """Count calls of `owner.attribute` (a module's function, or a class's method) as part `name`.

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
        setattr(owner, attribute, timed)
        self._undo.append(functools.partial(setattr, owner, attribute, original))

    def run(self, function: Callable[[], None], rest: str = "the rest") -> dict[str, float]:
        """Call `function`; returns the seconds of each part, and of what no part claims. They add up to the whole."""
        self.seconds.clear()
        self._since = now()
        self._stack.append(rest)
        function()
        self._switch()
        self._stack.pop()
        return dict(self.seconds)

    def close(self) -> None:
        """Take the clocks out again."""
        for undo in reversed(self._undo):
            undo()

    def _switch(self) -> None:
        moment = now()
        if self._stack:
            self.seconds[self._stack[-1]] += moment - self._since
        self._since = moment


def now() -> float:
    """Seconds: on a GPU by the clock, once it has caught up; else of this process alone, which others hardly move."""
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
    for objective in (rollout.GrpoObjective, Formation):
        parts.wrap(objective, "reference", "reference", whole=True)
    parts.wrap(VisMemModel, "form", "forming")
    parts.wrap(VisMemModel, "short_stream", "forming")
    parts.wrap(VisMemModel, "long_prefix", "forming")
    parts.wrap(Accelerator, "backward", "backward")
    return parts


def machine() -> str:
    """Device, threads and versions in one line."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"{device}; Python {platform.python_version()}, {packages}"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)

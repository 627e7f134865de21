"""Says before a run which of its steps fit which GPUs, how long a training step takes, and what disk and host need.

The figures come from running the steps' own code on tensors without values (`shapes`), from the base's config alone.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vismem.config import Config, parse_config
from vismem.errors import UserError
from vismem.plan.machine import Machine
from vismem.plan.model import hollow_base, parameters
from vismem.plan.rehearsal import Phase, Rehearsal, StepPlan
from vismem.plan.shapes import Shapes
from vismem.plan.steps import FITTING, rehearse
from vismem.steps import BASELINES

PLANNED = ("stage1", "stage2", "evaluate")
KNOBS = {  # what makes a phase smaller, the best first; that a parameter is a size says whether a largest is looked for
    "rollouts": ("{stage}.group_size", "grpo.batch_size", "grpo.max_new_tokens"),
    "backward": ("grpo.micro_batch", "grpo.max_new_tokens"),
    "check": ("grpo.micro_batch", "grpo.max_new_tokens"),
    "warm": ("grpo.micro_batch",),
    FITTING: ("grpo.max_new_tokens",),
}
PIXELS = "memory.prompt_pixels"


@dataclass(frozen=True)
class Refusal:
    """A step that does not fit: its largest phase, and parameters with the largest value found that fits, if any."""

    step: str
    phase: str
    bytes: int
    part: str  # of the phase's parts, the largest
    remedies: dict[str, int | None]


@dataclass(frozen=True)
class Plan:
    """All that was found; bytes and seconds."""

    base: str
    family: str
    dtype: str
    machine: Machine
    image: tuple[int, int]
    parameters: dict[str, int]
    added: dict[str, int]
    steps: list[StepPlan]
    refusals: list[Refusal]
    disk: dict[str, int]
    host: dict[str, int]


def plan(config: Config, gpus: str, image: str, steps: Sequence[str] = ()) -> Plan:
    """Plan a run of `config` on `gpus` (COUNTxGB) with images of WIDTHxHEIGHT.

    `steps`: those that are planned; by default the two stages, `evaluate`, and the baselines that its arms name.
    UserError for a base that cannot be read, GPUs that are not known, and batches that the GPUs cannot share.
    """
    machine, size = Machine.named(gpus), _size(image)
    if config.grpo.batch_size % machine.count:
        raise UserError(f"grpo.batch_size {config.grpo.batch_size} must be a multiple of the {machine.count} GPUs")
    baselines = [step.name for step in BASELINES]
    for name in steps:
        if name not in (*PLANNED, *baselines):
            raise UserError(f"no plan of '{name}': there are {', '.join((*PLANNED, *baselines))}")
    own, added, family = _counts(config)
    arms = {name.partition("@")[0] for name in config.evaluate.arms}
    names = list(steps) or [*PLANNED, *(name for name in baselines if name in arms)]
    found = [rehearse(Rehearsal(name, config, machine, size)) for name in names]
    refusals = [_refusal(step, config, machine, size) for step in found if step.largest.bytes > machine.usable]
    width = 2 if config.base.dtype == "bfloat16" else 4
    base = sum(own.values()) * width
    return Plan(
        config.base.model,
        family,
        config.base.dtype,
        machine,
        size,
        own,
        added,
        found,
        refusals,
        _disk(config, base, sum(own.values()), sum(added.values()), found, family),
        _host(machine, base, sum(own.values()), sum(added.values()), found),
    )


def _size(image: str) -> tuple[int, int]:
    width, _, height = image.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise UserError(f"--image {image}: give WIDTHxHEIGHT in pixels, such as 1024x768")
    return int(width), int(height)


def _counts(config: Config) -> tuple[dict[str, int], dict[str, int], str]:
    from vismem.models.vismem import VisMemModel

    with Shapes({}):
        model = VisMemModel(hollow_base(config.base), config.memory, config.invocation)
        return (*parameters(model), model.backbone.family)


# --- what does not fit ---


def _refusal(step: StepPlan, config: Config, machine: Machine, image: tuple[int, int]) -> Refusal:
    phase = step.largest
    part = max(phase.parts, key=lambda name: phase.parts[name])
    keys = [
        key.format(stage="baselines.grpo" if "grpo" in step.name else step.name) for key in KNOBS.get(phase.name, ())
    ]
    if step.name == "evaluate":
        keys = ["evaluate.batch_size", "evaluate.max_new_tokens"]
    elif step.name in (each.name for each in BASELINES) and phase.name == "answers":
        keys = ["baselines.supervised.micro_batch"]
    remedies: dict[str, int | None] = {}
    if not config.grpo.gradient_checkpointing and phase.name in ("backward", "warm", "answers"):
        remedies["grpo.gradient_checkpointing"] = 1
    for key in (*keys, PIXELS):
        remedies[key] = _largest(step.name, phase, key, config, machine, image)
    return Refusal(step.name, phase.name, phase.bytes, part, remedies)


def _largest(name: str, phase: Phase, key: str, config: Config, machine: Machine, image: tuple[int, int]) -> int | None:
    """The largest value of a parameter with which a phase fits, or None: guessed along a line, then tried."""
    last = key.rpartition(".")[2]
    value: Any = config
    for each in key.split("."):
        value = getattr(value, each)
    value = value or image[0] * image[1]  # 0 pixels: no maximum
    least = 2 if last == "group_size" else machine.count if last == "batch_size" else 1
    small = max(least, value // 2)
    unit = machine.count if last == "batch_size" else 1
    if small >= value:
        return None
    at_small = _bytes(name, phase, key, small, config, machine, image)
    slope = (phase.bytes - at_small) / (value - small)
    if slope <= 0:
        return None
    guess = int(small + (machine.usable - at_small) / slope)
    while guess >= least:
        guess = max(least, guess // unit * unit)
        if _bytes(name, phase, key, guess, config, machine, image) <= machine.usable:
            return guess
        guess = min(guess - 1, int(guess * 0.9))
    return None


def _bytes(
    name: str, phase: Phase, key: str, value: int, config: Config, machine: Machine, image: tuple[int, int]
) -> int:
    values = config.model_dump(by_alias=True)
    *sections, last = key.split(".")
    section = values
    for each in sections:
        section = section[each]
    section[last] = value
    found = rehearse(Rehearsal(name, parse_config(values), machine, image, phase.name))
    return max(each.bytes for each in found.phases if each.name == phase.name)


# --- disk and host ---


def _disk(config: Config, base: int, own: int, added: int, steps: list[StepPlan], family: str) -> dict[str, int]:
    """Bytes on disk, by what is kept there."""
    trained = [step.trained for step in steps]
    found: Counter[str] = Counter()
    if config.base.folder() is None:
        found["the hub's cache of the base"] = base
    found["base: the copy that steps read"] = base
    for name in dict.fromkeys(("stage1", "stage2", *(step.name for step in steps if step.trained))):
        found[f"{name}: its model"] = base if name == "full" else 4 * added
    if family == "qwen2_5_vl":
        found["export: the bundle, in float32"] = 4 * own + 8 * added
        found["register: MLflow's copy of the bundle"] = 4 * own + 8 * added
    found["DVC's cache, where the disk has no reflinks"] = sum(
        size for name, size in found.items() if not name.startswith(("the hub", "register"))
    )
    found["a checkpoint, twice while it is replaced"] = 24 * max(trained, default=0)
    return dict(found)


def _host(machine: Machine, base: int, own: int, added: int, steps: list[StepPlan]) -> dict[str, int]:
    """Bytes of the host's memory at the largest moment of each step."""
    process = 4 * 10**9  # assumed: Python, torch and CUDA's libraries, data
    return {
        f"training: {machine.count} processes, each with the base before it moves": machine.count
        * (base + 4 * added + process),
        "export: the model in float32, and again in ONNX Runtime": 8 * (own + added) + process,
    }

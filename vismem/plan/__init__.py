"""Says before a run which of its steps fit which GPUs, how long a training step takes, and what disk and host need.

The figures come from running the steps' own code on tensors without values (`shapes`), from the base's config alone.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch

from vismem.config import Config, ValidateConfig, resolve
from vismem.data.source_files import source_bytes, train_questions
from vismem.errors import UserError, nearest
from vismem.models.vismem import VisMemModel
from vismem.plan.machine import Machine
from vismem.plan.model import Questions, hollow_base, parameters, stored_type
from vismem.plan.rehearsal import Rehearsal, StepPlan
from vismem.plan.shapes import Shapes, beside_dispatch
from vismem.progress import progress
from vismem.steps import BASELINES

PLANNED = ("stage1", "stage2", "evaluate")
BYTES = {"bfloat16": 2, "float32": 4}  # of a parameter
PROCESS = 4e9  # bytes, assumed: Python, torch and CUDA's libraries, data
CHECKPOINTING, BATCH, PIXELS = "grpo.gradient_checkpointing", "grpo.batch_size", "memory.image_pixels"
KNOBS = {  # what makes a step smaller, and the least value that is proposed; what changes no result comes first
    CHECKPOINTING: 0,
    "grpo.micro_batch": 1,
    "baselines.supervised.micro_batch": 1,
    "evaluate.batch_size": 1,
    BATCH: 1,
    PIXELS: 50_000,
    "grpo.max_new_tokens": 32,
    "evaluate.max_new_tokens": 32,
}


@dataclass(frozen=True)
class Plan:
    """All that was found; bytes."""

    base: str
    machine: Machine
    asked: Questions
    parameters: dict[str, float]
    added: dict[str, float]
    steps: list[StepPlan]
    remedies: dict[str, dict[str, Any] | None]  # of each step that does not fit, parameters with which it does
    disk: dict[str, float]
    host: dict[str, float]


def plan(
    config: Config, gpus: str | Machine, image: str, steps: Sequence[str] = (), images: int = 1, train: int = 0
) -> Plan:
    """Plan a run of `config` on `gpus` (such as 8xH100) with questions about `images` of WIDTHxHEIGHT each.

    `steps`: those that are planned; by default the two stages, `evaluate`, and the baselines that its arms name.
    `train`: questions of the train split; 0: those of the sources, 1,000 where not all are known. UserError for a base
    that cannot be read, GPUs that are not known, batches that the GPUs cannot share, and images that `validate` would
    set apart.
    """
    machine = Machine.named(gpus) if isinstance(gpus, str) else gpus
    if images < 1 or train < 0:
        raise UserError(f"--images {images} --questions {train}: there must be some")
    counted = train or train_questions(config)
    asked = Questions(_size(image, config.validate_), images, counted or Questions.train, bool(counted))
    known = (*PLANNED, *(step.name for step in BASELINES))
    for name in steps:
        if name not in known:
            raise UserError(f"no plan of '{name}'{nearest(name, known)}: there are {', '.join(known)}")
    arms = {name.partition("@")[0] for name in config.evaluate.arms}
    names = steps or [name for name in known if name in PLANNED or name in arms]
    model = hollow(config)
    own, added = parameters(model.backbone.model), parameters(model)
    found, remedies = [], {}
    with progress("plan", len(names)) as advance:
        for name in names:
            found.append(step := Rehearsal(name, config, machine, asked).rehearse())
            if step.bytes > machine.usable:
                remedies[name] = _remedy(step, config, machine, asked)
            advance()
    base, others = sum(own.values()), sum(added.values())
    stored = base * BYTES[config.base.dtype]
    title = f"{config.base.model} ({model.backbone.family}, {config.base.dtype})"
    disk, host = _disk(config, stored, base, others, found), _host(config, machine.count, stored, base, others)
    copied = 12 * max(step.trained for step in found)  # weights and AdamW's states, on the host while they are written
    host["a checkpoint"] = copied + machine.count * (4 * others + PROCESS)
    return Plan(title, machine.beside(config.base.dtype), asked, own, added, found, remedies, disk, host)


def _size(image: str, settings: ValidateConfig) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,9})x(\d{1,9})", image)
    if found is None:
        raise UserError(f"--image {image}: give WIDTHxHEIGHT in pixels, such as 1024x768")
    width, height = sides = int(found[1]), int(found[2])
    low, high, aspect = settings.min_pixels, settings.max_pixels, settings.max_aspect
    if not (low <= min(sides) and max(sides) <= high and max(sides) <= aspect * min(sides)):
        limits = f"validate.min_pixels {low}, validate.max_pixels {high}, validate.max_aspect {aspect:g}"
        raise UserError(f"--image {image}: `validate` sets such images apart ({limits})")
    return width, height


def _remedy(step: StepPlan, config: Config, machine: Machine, asked: Questions) -> dict[str, Any] | None:
    """Parameters with which a step fits, or None: what makes it smaller is halved until it fits."""
    changed: dict[str, Any] = {}
    if step.fixed > machine.usable and machine.count > 1 and not config.base.tensor_parallel:
        changed = {"base.tensor_parallel": True}
        config = resolve(overrides=config.model_dump(by_alias=True) | changed)
        try:
            step = Rehearsal(step.name, config, machine, asked).rehearse()
        except UserError:  # so many GPUs cannot share it
            return None
    if step.fixed > machine.usable:
        return None
    for key in [*KNOBS] * 2:  # again, since another phase may be the largest by then
        if key != PIXELS and key.startswith("evaluate.") != (step.name == "evaluate"):
            continue
        while step.bytes > machine.usable and (value := _smaller(key, config, machine, asked)):
            tried = resolve(overrides=config.model_dump(by_alias=True) | {key: value})
            found = Rehearsal(step.name, tried, machine, asked).rehearse()
            if found.bytes >= step.bytes:
                break
            step, config, changed = found, tried, changed | {key: value}
    return changed if step.bytes <= machine.usable else None


def _smaller(key: str, config: Config, machine: Machine, asked: Questions) -> int | bool:
    """A parameter's next value, or 0."""
    value = attrgetter(key)(config)
    if key == CHECKPOINTING:
        return not value
    if key == PIXELS:
        value = min(value or math.inf, asked.size[0] * asked.size[1])
    half = int(value // 2)
    return half if half >= KNOBS[key] and not (key == BATCH and half % machine.count) else 0


def _disk(config: Config, stored: float, base: float, added: float, steps: Sequence[StepPlan]) -> dict[str, float]:
    """Bytes on disk, by what is kept there."""
    kept, found = stored_type(config.base), dict[str, float]()
    if data := source_bytes(config):
        found["prepare and validate: the data, more where images are shared"] = 2 * data
    for step in steps:
        if step.trained:
            found[f"{step.name}: its model"] = stored if step.name == "full" else 4 * added
    bundle = 4 * added + 4 * (base + added) * config.export.graphs
    found[f"export: the bundle, {'with' if config.export.graphs else 'without'} graphs"] = bundle
    found["register: MLflow's copy of the bundle"] = bundle
    found["DVC's copies of what steps write"] = sum(list(found.values())[:-1])
    found["checkpoints, the last twice while it is replaced"] = 12 * max(step.saved + step.trained for step in steps)
    if kept == getattr(torch, config.base.dtype):
        return {"the base's weights; the step `base` links to them": stored} | found
    weights = {f"the base's weights, as they are stored ({str(kept).removeprefix('torch.')})": base * kept.itemsize}
    return weights | {f"base: its copy of them in {config.base.dtype}": stored} | found


def host_memory(config: Config, processes: int) -> dict[str, float]:
    """Bytes of the host's memory at the largest moment of training by `processes` and of `export`.

    UserError as from `plan`. No step is rehearsed: this takes seconds.
    """
    model = hollow(config)
    base, added = (sum(parameters(part).values()) for part in (model.backbone.model, model))
    return _host(config, processes, base * BYTES[config.base.dtype], base, added)


def hollow(config: Config, processes: int = 1) -> VisMemModel:
    """The base, as `hollow_base`, and what VisMem adds, without values. UserError for a base that cannot be read."""
    with beside_dispatch(), Shapes():
        return VisMemModel(hollow_base(config.base, processes), config.memory, config.invocation)


def _host(config: Config, processes: int, stored: float, base: float, added: float) -> dict[str, float]:
    export = 8 * (base + added) if config.export.graphs else stored + 4 * added
    held = "a share of the base" if config.base.tensor_parallel else "the base before it moves"
    if config.base.tensor_parallel:
        stored = sum(parameters(hollow(config, processes).backbone.model).values()) * BYTES[config.base.dtype]
    return {
        f"training: {processes} processes, each with {held}": processes * (stored + 4 * added + PROCESS),
        "export": export + PROCESS,
    }

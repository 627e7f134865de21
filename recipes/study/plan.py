"""The study's settings, and its jobs: every seed has a folder with the outputs of the steps, `seed-N/`.

`transfer-N/` holds those of the models that are trained on half of the tasks, `stages-N-K/` those of stage K of four
that follow each other, each on other tasks and with a quarter of the steps. No choice is made here, and the test split
is answered once, by the step `evaluate`.
"""

import math
import os
import sys
from pathlib import Path
from typing import Any

from pydantic import Field

from recipes.study.claims import Values
from recipes.study.jobs import Job
from vismem.config import Config, ScenesSource, Section, Source
from vismem.data.tasks import NEEDS
from vismem.files import write_text
from vismem.params_file import render_params
from vismem.steps import BASELINES, BY_NAME

STAGES = 4  # of continual learning (paper Table 8)


class Settings(Section):
    """What is repeated; each is a flag of the command. UserError for an unknown arm."""

    seeds: int = Field(3, ge=1, description="repetitions, with the seeds `seed`, `seed` + 1 and so on")
    arms: tuple[str, ...] = Field(
        (
            "vanilla", "vismem", "short_only", "long_only", "random_25", "random_50", "random_100", "forced_short",
            "forced_long", "vismem@1", "vismem@2", "forced_short@1", "forced_short@2", "forced_short@3",
            "forced_long@1", "forced_long@2", "no_memory", "as_short", "as_long", "shuffled", "noise", "swapped",
            "relook", "full_resolution", "static_prefix", "continuous", "sft_lora", "sft_lora_matched",
            "sft_lora_vision", "grpo_lora", "grpo_lora_vision",
        ),
        description="arms that answer the test split; those named like a baseline are also trained",
    )  # fmt: skip
    long_seeds: int = Field(1, ge=0, description="repetitions that also train baselines for as long as VisMem")
    long_arms: tuple[str, ...] = Field(("sft_lora_long", "grpo_lora_long"), description="arms of those")
    transfer_seeds: int = Field(1, ge=0, description="repetitions that also train on half of the tasks")
    transfer_arms: tuple[str, ...] = Field(("vanilla", "vismem", "sft_lora"), description="arms of those")
    stage_seeds: int = Field(1, ge=0, description="repetitions that also train in four stages, each on other tasks")
    stage_arms: tuple[str, ...] = Field(
        ("vanilla", "vismem", "no_memory", "sft_lora", "grpo_lora"), description="arms of those"
    )
    jobs: int = Field(2, ge=1, description="steps that run at a time, one thread each")


def parameters(config: Config, settings: Settings) -> Values:
    """All parameters of a study as JSON values; the number of jobs at a time changes no result and is left out."""
    study = settings.model_dump(mode="json", exclude={"jobs"})
    return {**config.model_dump(mode="json", by_alias=True), "study": study}


def changed(before: Values, now: Values, place: str = "") -> dict[str, tuple[Any, Any]]:
    """The values that differ, (before, now) by full name, such as `stage1.steps`."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= changed(old, new, f"{place}{name}.")
        elif old != new:
            found[f"{place}{name}"] = (old, new)
    return found


def plan(config: Config, settings: Settings, folder: Path) -> list[Job]:
    """Write the parameters of each repetition and return all jobs, named FOLDER/STEP.

    Evaluations are timed jobs: no training runs beside them. The base is the same in all seeds: a seed draws other
    questions and trains anew on them.
    """
    scenes = tuple(source for source in config.prepare.sources if isinstance(source, ScenesSource))
    jobs: list[Job] = []
    for number in range(settings.seeds):
        seed = config.seed + number
        variant = config.model_copy(update={"seed": seed})
        long = settings.long_arms if number < settings.long_seeds else ()
        jobs += _steps(variant, (*settings.arms, *long), folder, f"seed-{seed}")
        if scenes and number < settings.transfer_seeds:
            halves = tuple(source.model_copy(update={"train_tasks": trained_half(source)}) for source in scenes)
            half = variant.model_copy(update={"prepare": config.prepare.model_copy(update={"sources": halves})})
            jobs += _steps(half, settings.transfer_arms, folder, f"transfer-{seed}")
        if scenes and number < settings.stage_seeds:
            short = shortened(variant)
            for stage, trained in enumerate(stage_tasks(scenes[0]), 1):
                first = scenes[0].model_copy(update={"tasks": stage_tasks(scenes[0])[0], "train_tasks": trained})
                staged = short.model_copy(update={"prepare": config.prepare.model_copy(update={"sources": (first,)})})
                before = f"stages-{seed}-{stage - 1}" if stage > 1 else None
                jobs += _steps(staged, settings.stage_arms, folder, f"stages-{seed}-{stage}", before)
    return jobs


def shortened(config: Config) -> Config:
    """The same with a quarter of every training's steps, so that all STAGES together train as long as one training."""

    def quarter(section: Section, *names: str) -> Section:
        inner = {name: quarter(getattr(section, name)) for name in names}
        steps = {"steps": math.ceil(section.steps / STAGES)} if hasattr(section, "steps") else {}
        return section.model_copy(update={**inner, **steps})

    sections = {
        "stage1": quarter(config.stage1, "warm_start"),
        "stage2": quarter(config.stage2),
        "baselines": quarter(config.baselines, "supervised", "grpo"),
    }
    return config.model_copy(update=sections)


def trained_half(source: Source) -> tuple[str, ...]:
    """The tasks that transfer trains on: every other one of each need, in the order of `vismem.data.tasks`.

    A need with a single task in the source is trained on. No tasks for a source other than scenes.
    """
    tasks = (source.tasks or tuple(NEEDS)) if isinstance(source, ScenesSource) else ()
    chosen: list[str] = []
    for need in dict.fromkeys(NEEDS.values()):
        chosen += [task for task in NEEDS if NEEDS[task] == need and task in tasks][::2]
    return tuple(chosen)


def stage_tasks(source: ScenesSource) -> list[tuple[str, ...]]:
    """The tasks of each of the STAGES, as many of each need as the source's order gives."""
    tasks = source.tasks or tuple(NEEDS)
    return [tasks[stage::STAGES] for stage in range(STAGES)]


def _steps(config: Config, arms: tuple[str, ...], folder: Path, name: str, before: str | None = None) -> list[Job]:
    """The steps of one repetition; each training starts from what the same one left in `before`, if that is given."""
    params = folder / name / "params.yaml"
    evaluate = config.evaluate.model_copy(update={"arms": arms})
    write_text(params, render_params(config.model_copy(update={"evaluate": evaluate})))
    baselines = tuple(step.name for step in BASELINES if step.name in arms)
    options = ("--params", os.fspath(params), "--artifacts", os.fspath(folder / name))
    jobs = []
    for step in ("prepare", "validate", "base", "stage1", "stage2", *baselines, "evaluate"):
        inputs = BY_NAME[step].inputs + (baselines if step == "evaluate" else ())
        needs = [f"{name}/{needed}" for needed in inputs]
        start: tuple[str, ...] = ()
        if before and step in ("stage1", *baselines):
            section, made = ("stage1", f"{before}/stage2") if step == "stage1" else ("baselines", f"{before}/{step}")
            start = ("--set", f"{section}.start_from={(folder / made).absolute()}")
            needs.append(made)
        command = (sys.executable, "-m", "vismem.cli", step, *options, *start)
        jobs.append(Job(f"{name}/{step}", command, tuple(needs), timed=step == "evaluate"))
    return jobs

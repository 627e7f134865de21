"""The study's report: `report.json`, `report.md` and `study.png`, all computed from the steps' outputs."""

import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from recipes.study.budgets import checked_memories, nearest_rate
from recipes.study.claims import Answers
from recipes.study.figures import check_figures, long_figures, study_figures, transfer_figures
from recipes.study.jobs import Job, busy_seconds, read_records
from recipes.study.page import COSTS, headline, pictures, render
from recipes.study.plan import Settings, changed, parameters, trained_half
from recipes.study.stages import stage_figures
from recipes.study.verdicts import PLAN, read_plan, verdicts
from vismem.config import Config, resolve
from vismem.evaluation.predictions import predictions_file, read_predictions
from vismem.files import read_json, write_json, write_text
from vismem.provenance import versions
from vismem.records import VANILLA, VISMEM, Metrics
from vismem.steps import BASELINES
from vismem.training.run import CHECKS

ROOT = Path(__file__).parents[2]


def write_report(
    config: Config, settings: Settings, jobs: Sequence[Job], folder: Path, command: str, write: Path | None
) -> str:
    """Write `report.json`, `report.md` and the plot into `folder`, and a copy to `write`; return a sentence."""
    evaluated = [folder / job.name.removesuffix("/evaluate") for job in jobs if job.timed]
    seeds, halves = (
        {int(place.name.removeprefix(kind)): place for place in evaluated if place.name.startswith(kind)}
        for kind in ("seed-", "transfer-")
    )
    stages: dict[int, list[Answers]] = {}
    for place in evaluated:  # in the order of the stages
        if place.name.startswith("stages-"):
            stages.setdefault(int(place.name.split("-")[1]), []).append(read_answers(place, settings.stage_arms))
    answers = {seed: read_answers(place, settings.arms) for seed, place in seeds.items()}
    longer = {seed: place for seed, place in seeds.items() if seed < config.seed + settings.long_seeds}
    compared = [*(arm for arm in (VANILLA, VISMEM) if arm in settings.arms), *settings.long_arms]
    long = {seed: read_answers(place, compared) for seed, place in longer.items()}
    moved = {seed: read_answers(place, settings.transfer_arms) for seed, place in halves.items()}
    took = {seed: Metrics.read(place / "evaluate").arms for seed, place in seeds.items()}
    seconds = {seed: {arm: row[arm]["seconds_per_sample"] for arm in settings.arms} for seed, row in took.items()}
    runs = {name: runs for name, runs in read_records(folder).items() if name in {job.name for job in jobs}}
    records = [record for each in runs.values() for record in each]
    differing = changed(parameters(resolve(), Settings()), parameters(config, settings))
    half = [task for source in config.prepare.sources for task in trained_half(source)]
    resamples = config.evaluate.bootstrap
    lengths = {"short": config.memory.short_length, "long": config.memory.long_length}
    trained = trainings(list(seeds.values()), settings.arms)
    random = nearest_rate(checked_memories(trained[VISMEM]["validation"]["stage2"]))
    figures = {
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "commits": sorted({record["commit"] for record in records}),
        "wall_seconds": busy_seconds(records),
        "jobs": {name: sum(record["seconds"] for record in each) for name, each in runs.items()},
        "at_once": settings.jobs,
        "parameters": {name: value for name, (_, value) in differing.items()},
        "seeds": list(seeds),
        "items": {seed: len(rows[VANILLA]) for seed, rows in answers.items()},
        **study_figures(answers, seconds, lengths, random, resamples),
        "training": trained,
        "long": long_figures(long, trainings(list(longer.values()), compared), resamples) if long else None,
        "transfer": transfer_figures(moved, half, resamples) if moved else None,
        "checks": checks(seeds, resamples),
        "stages": stage_figures(stages, resamples) if stages else None,
        "base": base_facts(config),
    }
    figures["plan"] = verdicts(read_plan(ROOT / PLAN), figures)
    write_json(folder / "report.json", figures)
    for page, name in {folder / "report.md": "study", **({write: write.stem} if write else {})}.items():
        write_text(page, render(figures, name))
        for file, picture in pictures(figures, name).items():
            (page.parent / file).write_bytes(picture)
    return f"{headline(figures)} Report: {write or folder / 'report.md'}"


def read_answers(place: Path, arms: Sequence[str]) -> Answers:
    """The answers that a repetition's evaluation wrote."""
    return {arm: read_predictions(predictions_file(place / "evaluate", arm)) for arm in arms}


def checks(seeds: Mapping[int, Path], resamples: int) -> Mapping[str, Any]:
    """What GRPO changed in both stages: `check_figures` of what each kept, with the answers that all seeds sampled."""
    found: dict[str, Any] = {}
    for step in ("stage1", "stage2"):
        rollouts = sum(read_json(place / step / "metrics.json")["train_rollouts"] for place in seeds.values())
        kept = {seed: read_json(place / step / CHECKS) for seed, place in seeds.items()}
        found |= check_figures(kept, rollouts, resamples)
    return found


def base_facts(config: Config) -> Mapping[str, Any]:
    """What the base says of its own training; nothing where it says nothing."""
    folder = config.base.folder()
    facts = folder / "training.json" if folder else None
    return read_json(facts) if facts and facts.is_file() else {}


def trainings(folders: Sequence[Path], arms: Sequence[str]) -> dict[str, Any]:
    """The `training` of VisMem, and of those arms that are baselines."""
    baselines = {step.name: (step.name,) for step in BASELINES if step.name in arms}
    return {arm: training(folders, steps) for arm, steps in {VISMEM: ("stage1", "stage2"), **baselines}.items()}


def training(folders: Sequence[Path], steps: Sequence[str]) -> Mapping[str, Any]:
    """What training took, from the steps' `metrics.json`: sums over the steps, means over the folders (seeds).

    COSTS, each None where a step does not say; and `validation` {step: its validation figures, a list over folders}.
    """
    read = {step: [read_json(folder / step / "metrics.json") for folder in folders] for step in steps}
    costs: dict[str, Any] = {}
    for cost in COSTS:
        values = [metrics.get(cost) for runs in read.values() for metrics in runs]
        costs[cost] = None if None in values else float(sum(values)) / len(folders)
    return {**costs, "validation": {step: [m.get("validation") for m in runs] for step, runs in read.items()}}


def machine() -> str:
    """Processor, cores, memory and system, without names of anything private."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: *(.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{os.cpu_count()} cores of {found[1] if found else platform.machine()}, {memory:.0f} GiB, {platform.system()}"
    )

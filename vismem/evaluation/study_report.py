"""The report of `vismem study`: `report.json`, `report.md` and `study.png`, all computed from the steps' outputs."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vismem.config import Config
from vismem.evaluation import plots
from vismem.evaluation.arms import VANILLA, VISMEM
from vismem.evaluation.predictions import read_predictions
from vismem.evaluation.study_figures import (
    CONTENT,
    ORDER,
    Evaluation,
    against,
    bar,
    judge,
    summarise_arms,
    transfer,
    yes_no_tasks,
)  # fmt: skip
from vismem.evaluation.study_page import COSTS, headline, render
from vismem.jobs import busy_seconds, read_records
from vismem.provenance import versions
from vismem.records import Metrics
from vismem.steps import BASELINES
from vismem.study import on_half, plan, seeds, transfer_seeds

PLOT = "study.png"


def write_report(config: Config, folder: Path, command: str, write: Path | None = None) -> str:
    """Write `report.json`, `report.md` and the plot into `folder`, and a copy to `write`; return a line."""
    figures = collect(config, folder, command)
    picture = plots.gain_plot(figures["arms"])
    (folder / "report.json").write_text(json.dumps(figures, indent=1) + "\n")
    (folder / "report.md").write_text(render(figures, PLOT))
    (folder / PLOT).write_bytes(picture)
    shown = folder / "report.md"
    if write is not None:
        write.parent.mkdir(parents=True, exist_ok=True)
        write.write_text(render(figures, f"{write.stem}.png"))
        write.with_suffix(".png").write_bytes(picture)
        shown = write
    return f"{headline(figures)} Report: {shown}"


def collect(config: Config, folder: Path, command: str) -> dict[str, Any]:
    """All figures of the report, as JSON values."""
    resamples = config.evaluate.bootstrap
    evaluations = [load(folder / f"seed-{seed}", seed) for seed in seeds(config)]
    arms = list(evaluations[0].answers)
    baselines = [step.name for step in BASELINES if step.name in arms]
    halves = [load(folder / f"transfer-{seed}", seed) for seed in transfer_seeds(config)]
    records = read_records(folder)
    jobs = {job.name: records[job.name] for job in plan(config, folder) if job.name in records}
    figures = summarise_arms(evaluations, resamples=resamples)
    return {
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "commits": sorted({record["commit"] for record in jobs.values()}),
        "wall_seconds": busy_seconds(list(jobs.values())),
        "jobs": {name: record["seconds"] for name, record in jobs.items()},
        "at_once": config.study.jobs,
        "parameters": changed_parameters(config),
        "seeds": seeds(config),
        "items": {e.seed: e.metrics["n"] for e in evaluations},
        **figures,
        "bar": bar(figures["arms"]),
        "yes_no_tasks": yes_no_tasks(evaluations[0].answers[VANILLA]),
        "claims": {
            "order": judge(ORDER, evaluations, resamples=resamples),
            "content": judge(CONTENT, evaluations, resamples=resamples),
            "baselines": judge(against(baselines), evaluations, resamples=resamples),
        },
        "training": {
            arm: training([folder / f"seed-{seed}" for seed in seeds(config)], steps)
            for arm, steps in {VISMEM: ("stage1", "stage2"), **{name: (name,) for name in baselines}}.items()
        },
        "transfer": transfer(halves, _trained(config), resamples=resamples) if halves else None,
    }


def load(folder: Path, seed: int) -> Evaluation:
    """One repetition's evaluation from its folder."""
    metrics = Metrics.read(folder / "evaluate").model_dump()
    answers = {arm: read_predictions(folder / "evaluate" / "predictions" / f"{arm}.parquet") for arm in metrics["arms"]}
    return Evaluation(seed, metrics, answers)


def training(folders: Sequence[Path], steps: Sequence[str]) -> dict[str, Any]:
    """What training took, by the steps' `metrics.json`: sums over the steps, means over the folders (seeds).

    COSTS, each None where a step does not say; and `validation` {step: its validation figures, a list over folders}.
    """
    read = {step: [json.loads((f / step / "metrics.json").read_text()) for f in folders] for step in steps}
    costs: dict[str, Any] = {}
    for cost in COSTS:
        values = [metrics.get(cost) for runs in read.values() for metrics in runs]
        costs[cost] = None if None in values else float(sum(values)) / len(folders)
    return {**costs, "validation": {step: [m.get("validation") for m in runs] for step, runs in read.items()}}


def changed_parameters(config: Config) -> dict[str, Any]:
    """The parameters that differ from the defaults, `stage1.steps` and so on, as JSON values."""
    here, default = (c.model_dump(mode="json", by_alias=True) for c in (config, Config()))
    return _changed(here, default, "")


def machine() -> str:
    """Processor, cores, memory and system, without names of anything private."""
    processor = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = models[0] if models else processor
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores of {processor}, {memory:.0f} GiB, {platform.system()}"


def _changed(here: Mapping[str, Any], default: Mapping[str, Any], place: str) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for name, value in here.items():
        usual = default.get(name)
        if isinstance(value, Mapping) and isinstance(usual, Mapping):
            changed |= _changed(value, usual, f"{place}{name}.")
        elif value != usual:
            changed[f"{place}{name}"] = value
    return changed


def _trained(config: Config) -> list[str]:
    """The tasks that the transfer models were trained on."""
    return [task for source in on_half(config).prepare.sources for task in getattr(source, "train_tasks", ())]

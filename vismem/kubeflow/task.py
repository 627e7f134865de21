"""A task around a step: run it with its inputs, describe the output. The only place that calls `vismem.launch`."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from vismem.config import parse_config
from vismem.files import write_json, write_text
from vismem.kubeflow.parameters import IDENTITY, take_s3_keys
from vismem.kubeflow.results import describe, render_report
from vismem.launch import LaunchConfig, launch_step
from vismem.registry import GIVEN_RUN
from vismem.registry.live_run import LiveRun

WORK, LAUNCH = "VISMEM_WORK", "VISMEM_LAUNCH"


class Artifact(Protocol):
    """What is used of an artifact of Kubeflow."""

    path: str
    metadata: dict[str, Any]


def run_task(
    parameters: Mapping[str, Any],
    out: Artifact,
    *,
    image: str = "",
    run: str = "",
    metrics: Artifact | None = None,
    report: Artifact | None = None,
    **inputs: Artifact,
) -> None:
    """Run the step whose name the folder of `out` has into that folder.

    `parameters`: what `parameters_of` gave; `inputs`: the artifact of each step that it reads; `image`: that of all
    tasks and of nodes which Kubeflow Trainer starts, and `run`: the id of the pipeline's run; empty outside a cluster.
    Afterwards `out` has its provenance as metadata, `metrics` its figures, `report` its page. Raises what the step
    raises.

    The variable VISMEM_WORK may name a folder that outlives the task: long steps keep their checkpoints there, and a
    task that was killed resumes from them when it runs again, with the same parameters, inputs and code. The variable
    VISMEM_LAUNCH may hold the other fields of `LaunchConfig`, as JSON.
    """
    take_s3_keys()
    os.environ.update({name: value for name, value in {"KFP_RUN_ID": run, "VISMEM_IMAGE": image}.items() if value})
    folder = Path(out.path)
    name = folder.name
    config = parse_config({key: value for key, value in parameters.items() if key != IDENTITY}, f"parameters of {name}")
    folders = {step: Path(artifact.path) for step, artifact in inputs.items()}
    work = Path(os.environ[WORK]) / parameters[IDENTITY]["code"][:12] if os.environ.get(WORK) else None
    launch = json.loads(os.environ.get(LAUNCH) or "{}")
    if launch.get("backend") == "trainer":
        launch["image"] = image
    live, outcome = LiveRun(config, folder.parent, end_seconds=60), "FAILED"  # the pod ends with this process
    try:
        if os.environ.get(GIVEN_RUN):  # Kubeflow's MLflow plugin is on
            live.begin(name)
        print(launch_step(name, config, folder.parent, folders, LaunchConfig(**launch), work))
        live.done(name)
        outcome = "FINISHED"
    finally:
        live.end(outcome)
    metadata, figures = describe(name, folder)
    out.metadata.update(metadata)
    if metrics is not None:
        metrics.metadata.update(figures)
        write_json(Path(metrics.path), figures)  # a cache of tasks takes an artifact without a file for lost
    if report is not None:
        write_text(Path(report.path), render_report(name, folder))


def run_preflight(parameters: Mapping[str, Any], report: Artifact) -> None:
    """Run the preflight's checks; their table goes to `report`. UserError names every check that failed."""
    from vismem.preflight import preflight

    take_s3_keys()
    page, work = Path(report.path), os.environ.get(WORK)
    preflight(
        parse_config(dict(parameters), "parameters of preflight"), page.parent, page, Path(work) if work else None
    )

"""A pipeline's task around a step: journal, step, and what it made, in plain values."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vismem.config import parse_config
from vismem.launch import LaunchConfig, launch_step
from vismem.orchestration import journal as notes
from vismem.orchestration.parameters import IDENTITY
from vismem.orchestration.results import Result, describe, write_json, write_page

WORK = "VISMEM_WORK"


def run_task(
    name: str,
    parameters: dict[str, Any],
    out: str,
    inputs: Mapping[str, str],
    journal: str = "",
    how: Mapping[str, Any] | None = None,
    metrics: str = "",
) -> Result:
    """Run the step `name` into the folder `out`, whose own name must be the step's; returns what is told of it.

    `parameters`: what `parameters_of` gave; `inputs`: the folder of each step that it reads; `journal`: where the run's
    journal is kept, or nothing; `how`: fields of `vismem.launch.LaunchConfig`; `metrics`: a file that gets the metrics as
    JSON, since an artifact without a file passes for lost. Raises what the step raises.

    The variable VISMEM_WORK may name a folder that outlives the task: there long steps keep their checkpoints, and a
    task that was killed goes on from them when it runs again, with the same parameters, inputs and code.
    """
    folder = Path(out)
    assert folder.name == name, f"{name} writes a folder of that name, not {out}"
    with notes.entry(journal, notes.run_of(out), name) as page:
        sections = {key: value for key, value in parameters.items() if key != IDENTITY}
        config = parse_config(sections, f"parameters of {name}")
        folders = {step: Path(path) for step, path in inputs.items()}
        work = _work_folder(parameters[IDENTITY]["code"])
        page.text = launch_step(name, config, folder.parent, folders, LaunchConfig(**(how or {})), work)
        print(page.text)
        made = describe(name, folder, page.text)
        if metrics:
            write_json(metrics, made.metrics)
        return made


def refusal_note(promote: str, page: str, journal: str = "") -> None:
    """Write into the file `page` which version `promote` refused, and why, as Markdown."""
    with notes.entry(journal, notes.run_of(page), "not-promoted") as entry:
        release = json.loads((Path(promote) / "release.json").read_text())
        version = f"{release['name']} version {release['version']}"
        reasons = [f"- {reason}" for reason in release["reasons"]]
        lines = [f"# Not promoted: {version}", "", *reasons, "", "Nothing was deployed; what is served stays as it is."]
        write_page(page, "\n".join([*lines, ""]))
        entry.text = f"{version} was refused, and nothing deployed"


def launch_fields(
    backend: str,
    num_processes: int,
    num_nodes: int,
    image: str = "",
    resources: Mapping[str, str | int] | None = None,
    tolerations: Sequence[Mapping[str, Any]] = (),
    node_selector: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The fields of `vismem.launch.LaunchConfig` that matter to this back end, as plain values.

    Empty for a single process, so that a cache of tasks does not depend on what plays no part.
    UserError as from `LaunchConfig`.
    """
    fields: dict[str, Any] = {"backend": backend, "num_processes": num_processes, "num_nodes": num_nodes}
    if backend == "trainer":
        fields |= {
            "image": image,
            "resources": dict(resources or {}),
            "tolerations": [dict(item) for item in tolerations],
            "node_selector": dict(node_selector or {}),
        }
    LaunchConfig(**fields)
    return {} if backend == "process" else fields


def _work_folder(code: str) -> Path | None:
    folder = os.environ.get(WORK)
    return Path(folder) / code[:12] if folder else None

"""How the gain depends on parameters (paper Figure 10): `vismem sweep` draws the DVC experiments that varied them."""

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from markupsafe import Markup
from matplotlib.axes import Axes

from vismem.config import PARAMS_FILE
from vismem.errors import UserError
from vismem.evaluation.panels import BLUE, GREY, Panel, say, to_svg
from vismem.evaluation.report import signed
from vismem.pages import TIPS, page_environment, storable
from vismem.provenance import git
from vismem.records import Interval
from vismem.steps import STEPS

SCORES = "artifacts/evaluate/scores.json"
QUEUE = "`dvc exp run --queue -S 'memory.queries=2,4,8' evaluate`, then `dvc queue start`"


@dataclass(frozen=True)
class Experiment:
    """A run of the pipeline: its name, all its parameters by dotted key, and VisMem's gain over vanilla in points."""

    name: str
    parameters: Mapping[str, Any]
    gain: float
    interval: Interval


def shown_by_dvc() -> list[dict[str, Any]]:
    """What `dvc exp show` says of the project in the working directory. UserError where DVC fails.

    A workspace or a commit whose parameters were edited since its last run has the scores of others: they are left out.
    """
    command = [sys.executable, "-m", "dvc", "exp", "show", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise UserError(f"`dvc exp show` failed ({said}): run in the project's root, which is a Git repository")
    shown = list(json.loads(done.stdout))
    return [state if _was_run(state) else state | {"data": None} for state in shown]


def _was_run(state: Mapping[str, Any]) -> bool:
    """Whether the steps up to `evaluate` had the state's parameters when they ran, by its dvc.lock."""
    rev, lock = state["rev"], Path("dvc.lock")
    text = git(Path(), "show", f"{rev}:./{lock}") if rev != "workspace" else lock.read_text() if lock.is_file() else ""
    stages = (yaml.safe_load(text or "") or {}).get("stages", {})
    now, names = _content((state["data"] or {}).get("params"), PARAMS_FILE.name), [step.name for step in STEPS]
    used = [stages.get(name, {}).get("params") or {} for name in names[: names.index("evaluate") + 1]]
    kept = [item for files in used for item in files.get(PARAMS_FILE.name, {}).items()]
    return "evaluate" in stages and all(now.get(key) == value for key, value in kept)


def experiments(shown: Sequence[Mapping[str, Any]]) -> list[Experiment]:
    """Those that have scores, each set of parameters once; what is queued, runs or failed has none."""
    found: dict[str, Experiment] = {}
    for state in (*(run["revs"][0] for each in shown for run in each["experiments"] or ()), *shown):
        data = state["data"] or {}
        gain = _content(data.get("metrics"), SCORES).get("gain")
        (read,) = pd.json_normalize([_content(data.get("params"), PARAMS_FILE.name)]).to_dict("records")
        parameters = {key: int(x) if isinstance(x, float) and x.is_integer() else x for key, x in read.items()}
        if gain and parameters:
            ends, name = (gain["low"], gain["high"]), state["name"] or state["rev"][:7]
            found.setdefault(json.dumps(parameters), Experiment(name, parameters, gain["points"], ends))
    return list(found.values())


def varied(found: Sequence[Experiment]) -> dict[str, list[Any]]:
    """The parameters of which there are several values, and these in order."""
    values: dict[str, list[Any]] = {}
    for key in dict.fromkeys(key for each in found for key in each.parameters):
        several = {json.dumps(value): value for value in (each.parameters.get(key) for each in found)}.values()
        if len(several) > 1:
            numbers = all(isinstance(value, int | float) for value in several)
            values[key] = sorted(several, key=None if numbers else str)
    return values


def panels(found: Sequence[Experiment], values: Mapping[str, list[Any]]) -> list[Panel]:
    """A panel for each varied parameter: the gain by its value, a line for experiments that are alike in all others."""

    def draw(axes: Axes, key: str, lines: Sequence[Sequence[Experiment]]) -> None:
        axes.axhline(0, color=GREY, linewidth=1, linestyle="--")
        for line in lines:
            colour = BLUE if line is lines[0] else GREY
            places = [values[key].index(each.parameters.get(key)) for each in line]
            axes.plot(places, [each.gain for each in line], color=colour)
            for place, each in zip(places, line, strict=True):
                axes.vlines(place, *each.interval, color=colour, linewidth=1, alpha=0.5)
                say(axes.scatter(place, each.gain, s=44, color=colour, zorder=3), described(each, values))
        axes.set_xticks(range(len(values[key])), [storable(str(value)) for value in values[key]])
        axes.set_xlim(-0.4, len(values[key]) - 0.6)
        axes.grid(axis="y")
        axes.set_ylabel("gain (points)")

    return [
        Panel(key, f"The gain by {key}; the table has the figures", 2.4, partial(draw, key=key, lines=lines))
        for key in values
        if (lines := alike(found, key, values))
    ]


def alike(found: Iterable[Experiment], key: str, values: Mapping[str, list[Any]]) -> list[list[Experiment]]:
    """The experiments that differ in nothing but `key`, together, in the order of its values; the most first."""
    lines: dict[str, list[Experiment]] = defaultdict(list)
    for each in sorted(found, key=lambda each: values[key].index(each.parameters.get(key))):
        lines[json.dumps([each.parameters.get(other) for other in values if other != key])].append(each)
    return sorted((line for line in lines.values() if len(line) > 1), key=len, reverse=True)


def described(experiment: Experiment, values: Iterable[str]) -> str:
    """An experiment in words: what it varied, its gain and its name."""
    settings = ", ".join(f"{key} {experiment.parameters.get(key)}" for key in values)
    low, high = experiment.interval
    return f"{settings}: {experiment.gain:+.1f} points ({low:+.1f} to {high:+.1f}), {experiment.name}"


def render(shown: Sequence[Mapping[str, Any]]) -> str:
    """The page. UserError where no two experiments with scores differ in a parameter."""
    found = experiments(shown)
    if not (values := varied(found)):
        raise UserError(f"{len(found)} experiments with scores, and no parameter that differs: queue some with {QUEUE}")
    environment = page_environment("vismem.evaluation")
    environment.filters["signed"] = signed
    page: str = environment.get_template("sweep.html.j2").render(
        found=sorted(found, key=lambda each: [values[key].index(each.parameters.get(key)) for key in values]),
        values=values,
        charts=[(panel.words, to_svg(panel)) for panel in panels(found, values)],
        script=Markup(TIPS),
    )
    return storable(page)


def _content(files: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
    """What DVC has read of a file; nothing where it could not."""
    return dict(((files or {}).get(name) or {}).get("data") or {})

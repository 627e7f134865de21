"""The study's figures as a Markdown page and a plot. Every sentence that claims something is computed from them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from recipes.study.budgets import lines_plot
from recipes.study.claims import AIM
from vismem.evaluation import plots
from vismem.evaluation.arms import find_arm, label
from vismem.evaluation.metrics import CAPABILITIES
from vismem.evaluation.summary import change
from vismem.records import VANILLA, VISMEM, Difference

Values = Mapping[str, Any]

COSTS = {
    "trainable_parameters": "parameters trained",
    "train_samples": "questions trained on",
    "train_rollouts": "answers sampled",
    "train_seconds": "training seconds",
}  # of a training step's metrics.json
KINDS = {"without": "all but yes/no", "only": "yes/no only"}
SHOWN_BY_TASK = (VANILLA, VISMEM, "short_only", "long_only", "sft_lora", "grpo_lora", "full")


def headline(figures: Values) -> str:
    """The result in one sentence, of what was run."""
    arms, count = figures["arms"], len(figures["seeds"])
    asked = f"of {sum(figures['items'].values())} test questions ({count} seed{'s' if count > 1 else ''})"
    if VISMEM not in arms:
        return f"Vanilla answers {arms[VANILLA]['mean']:.1f} % {asked} correctly."
    score, gain = arms[VISMEM]["mean"], change(Difference(**arms[VISMEM]["gain"]["pooled"]))
    return f"VisMem answers {score:.1f} % {asked} correctly, vanilla {arms[VANILLA]['mean']:.1f} %: {gain}."


def gain_plot(arms: Values) -> bytes:
    """Every arm's gain over vanilla with the pooled 95 % interval, as PNG; the small dots are single seeds."""
    gains = {arm: row["gain"] for arm, row in arms.items() if arm != VANILLA}
    figure = Figure(figsize=(7.2, 1.0 + 0.27 * len(gains)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color=plots.GREY, linewidth=1)
    for y, (arm, gain) in enumerate(gains.items()):
        plots.draw_dot(axes, gain["pooled"]["delta"], y, arm, gain["pooled"]["ci95"])
        deltas = [seed["delta"] for seed in gain["seeds"].values()]
        axes.scatter(deltas, [y + 0.28] * len(deltas), s=7, color="#000000", zorder=4)
    plots.name_rows(axes, [label(arm) for arm in gains])
    axes.set_xlabel("points over vanilla, with the 95 % interval; small dots: single seeds")
    return plots.to_png(figure)


def pictures(figures: Values, name: str) -> dict[str, bytes]:
    """The page's plots as PNG by their file names beside it: the gains, and where limits were compared the budgets."""
    plots_of = {f"{name}.png": gain_plot(figures["arms"])}
    return plots_of | ({f"{name}-memories.png": lines_plot(figures["budgets"])} if figures["budgets"] else {})


def render(figures: Values, name: str) -> str:
    """The page; `name` is that of its plots (`pictures`)."""
    loader = PackageLoader("recipes.study", ".")
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True)  # a missing figure is a fault
    environment.filters |= {f.__name__: f for f in (difference, claim_table, arm_table, gain_table, stage_table)}
    page = environment.get_template("report.md.j2").render(
        **figures,
        name=name,
        aim=AIM,
        label=label,
        headline=headline(figures),
        duration=timedelta(seconds=round(figures["wall_seconds"])),
        kinds=KINDS,
        gain=figures["arms"].get(VISMEM, {}).get("gain"),
        table=tables(figures),
    )
    return re.sub(r"\n{3,}", "\n\n", page).strip() + "\n"


def tables(figures: Values) -> dict[str, str]:
    """The tables that occur once, by name."""
    arms, pooled, training = (figures[name] for name in ("arms", "pooled", "training"))
    shown = [arm for arm in SHOWN_BY_TASK if arm in arms]
    groups, costs, tasks = [], [], []
    for arm, row in arms.items():
        name, apart = label(arm), pooled["yes_no"]["arms"][arm]
        by_group = [*map(pooled["arms"][arm].get, CAPABILITIES), *map(apart.get, KINDS)]
        said, rest = numbers([apart.get("says_yes")], "{:.0f} %"), [pooled["unparsed"][arm], pooled["unfinished"][arm]]
        groups.append([name, *numbers(by_group), *said, *numbers(rest)])
        spent = numbers(map(training.get(arm, {}).get, COSTS), "{:,.0f}")
        overhead = "" if arm == VANILLA else f"{np.mean(row['overhead']):+.0%}"
        costs.append([name, *spent, f"{1000 * row['seconds']:.1f}", overhead])
    for task, row in pooled["tasks"].items():
        name = task.replace("_", " ") + (" (yes/no)" if task in figures["yes_no_tasks"] else "")
        tasks.append([name, row["capability"], row["n"], *numbers(map(row["arms"].get, shown))])
    validation = [
        [step, label(arm), *numbers(run[arm]["score"] for run in runs)]
        for cost in training.values()
        for step, runs in cost["validation"].items()
        for arm in runs[0] or ()
    ]
    limits = [
        [label(placement), point["limit"] or ("none" if point["limit"] == 0 else "the model's own"),
         f"{point['memories']:.2f}", interval(point)]
        for placement, points in figures["budgets"].items()
        for point in points
    ]  # fmt: skip
    by_step = pd.Series(figures["jobs"]).groupby(lambda job: job.split("/")[1])
    use = {label(arm): row for arm, row in pooled["invocation_by_arm"].items() if not memoryless(arm)}
    return {
        "groups": table(["arm", *CAPABILITIES, *KINDS.values(), "says yes", "unparsed", "unfinished"], groups),
        "tasks": table(["task", "capability", "n", *map(label, shown)], tasks),
        "needs": need_table(figures["needs"]),
        "limits": table(["placement", "limit", "memories an answer", "score"], limits),
        "costs": table(["arm", *COSTS.values(), "ms per sample", "over vanilla"], costs),
        "use": use_table("arm", use),
        "use_by_task": use_table("task", pooled["invocation"].get("tasks", {})),
        "validation": table(["step", "decoding", *columns(figures["seeds"])], validation),
        "jobs": table(["step", "runs", "seconds per run"], [[k, len(v), f"{v.mean():.0f}"] for k, v in by_step]),
        "parameters": table(["parameter", "value"], [[f"`{k}`", f"`{v}`"] for k, v in figures["parameters"].items()]),
    }


def arm_table(arms: Values) -> str:
    """Each arm's scores and its gain over vanilla."""
    rows = []
    for arm, row in arms.items():
        spread = "" if row["spread"] is None else f" ± {row['spread']:.1f}"
        gain = difference(row["gain"]["pooled"]) if row["gain"] else ""
        rows.append([label(arm), f"{row['mean']:.1f}{spread}", *numbers(row["seeds"].values()), gain])
    return table(["arm", "mean ± spread", *columns(arms[VANILLA]["seeds"]), "gain"], rows)


def gain_table(arms: Values) -> str:
    """Each arm's gain over vanilla by seed."""
    gains = {arm: row["gain"]["seeds"].values() for arm, row in arms.items() if row["gain"]}
    rows = [[label(arm), *map(difference, seeds)] for arm, seeds in gains.items()]
    return table(["arm", *columns(arms[VANILLA]["seeds"])], rows)


def need_table(needs: Values) -> str:
    """Each arm's score by what a question needs, and its gain over vanilla there; nothing where none is known."""
    header = ["arm"] + [cell for need, row in needs.items() for cell in (f"{need} (n = {row['n']})", "gain")]
    rows = []
    for arm in next(iter(needs.values()))["arms"] if needs else ():
        gains = ["" if arm == VANILLA else difference(row["gains"][arm]["pooled"]) for row in needs.values()]
        scores = numbers(row["arms"][arm] for row in needs.values())
        rows.append([label(arm), *(cell for pair in zip(scores, gains, strict=True) for cell in pair)])
    return table(header, rows)


def stage_table(stages: Values) -> str:
    """Each arm's score on the first stage's tasks after each stage, and what it lost."""
    rows = []
    for arm, row in stages["arms"].items():
        less = difference(stages["less"][arm]["pooled"]) if arm in stages["less"] else ""
        rows.append([label(arm), *numbers(row["scores"]), difference(row["lost"]["pooled"]), less])
    count = len(next(iter(stages["arms"].values()))["scores"])
    return table(["arm", *(f"stage {k}" for k in range(1, count + 1)), "lost", "more than VisMem"], rows)


def claim_table(claims: Sequence[Values]) -> str:
    """What each claim came to, in how many seeds it holds, and in how many its opposite does."""
    rows = []
    for claim in claims:
        opposite = f"; the opposite in {claim['reversed']}" if claim["reversed"] else ""
        holds = f"{claim['holds']} of {len(claim['seeds'])} seeds{opposite}"
        rows.append(
            [
                claim["text"],
                claim["id"],
                claim["verdict"],
                holds,
                *map(difference, (claim["pooled"], *claim["seeds"].values())),
            ]
        )
    return table(["claim", "plan", "verdict", "holds in", "difference, pooled", *columns(claims[0]["seeds"])], rows)


def memoryless(arm: str) -> bool:
    """Whether the arm has no memory at all."""
    found = find_arm(arm)
    return found is not None and found.policy.limit == 0


def use_table(first: str, uses: Values) -> str:
    """`metrics.memory_use` by arm or task; nothing where there is none."""
    rows = []
    for name, use in uses.items():
        kinds = [use[kind][figure] for kind in ("short", "long") for figure in ("per_answer", "mean_position")]
        rows.append([name.replace("_", " "), f"{use['answers_with_memory']:.0f} %", *numbers(kinds, "{:.2f}")])
    return table([first, "answers with memory", "short an answer", "at", "long an answer", "at"], rows)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, the first column left-aligned and the others right-aligned; nothing where there are no rows."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    escaped = ([str(cell).replace("|", r"\|").strip() for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped) if rows else ""


def difference(found: Values) -> str:
    """A difference with its interval: `+5.3 (+2.1 to +8.4)`."""
    return f"{found['delta']:+.1f} ({found['ci95'][0]:+.1f} to {found['ci95'][1]:+.1f})"


def interval(found: Values) -> str:
    """A score with its interval: `55.3 (52.1 to 58.4)`."""
    return f"{found['score']:.1f} ({found['ci95'][0]:.1f} to {found['ci95'][1]:.1f})"


def numbers(values: Iterable[float | None], form: str = "{:.1f}") -> list[str]:
    """Formatted numbers; None is an empty cell."""
    return ["" if value is None else form.format(value) for value in values]


def columns(seeds: Iterable[int]) -> list[str]:
    """The seeds' column headings."""
    return [f"seed {seed}" for seed in seeds]

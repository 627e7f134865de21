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
from recipes.study.claims import NOT_RUN
from vismem.evaluation import panels
from vismem.evaluation.arms import find_arm, label
from vismem.evaluation.metrics import CAPABILITIES
from vismem.evaluation.statistics import holm
from vismem.evaluation.summary import change
from vismem.records import VANILLA, VISMEM, Difference, p_value

Figures = Mapping[str, Any]

COSTS = {
    "trainable_parameters": "parameters trained",
    "train_samples": "questions trained on",
    "train_rollouts": "answers sampled",
    "train_seconds": "training seconds",
}  # of a training step's metrics.json
KINDS = {"without": "all but yes/no", "only": "yes/no only"}
AIMS = {  # what the study is to show, and the claim of the plan that says so
    "VisMem above each kind alone above random above vanilla": "M4",
    "at least 15 points above vanilla": "M7",
    "above SFT-LoRA": "F1",
}
SHOWN_BY_TASK = (VANILLA, VISMEM, "short_only", "long_only", "sft_lora", "grpo_lora", "full")


def headline(figures: Figures) -> str:
    """The result in one sentence, of what was run."""
    arms, count = figures["arms"], len(figures["seeds"])
    asked = f"of {sum(figures['items'].values())} test questions ({count} seed{'s' if count > 1 else ''})"
    if VISMEM not in arms:
        return f"Vanilla answers {arms[VANILLA]['mean']:.1f} % {asked} correctly."
    score, gain = arms[VISMEM]["mean"], change(Difference(**arms[VISMEM]["gain"]["pooled"]))
    return f"VisMem answers {score:.1f} % {asked} correctly, vanilla {arms[VANILLA]['mean']:.1f} %: {gain}."


def aims(plan: Sequence[Figures]) -> str:
    """What became of each of AIMS."""
    verdict = {claim["id"]: claim["verdict"] for claim in plan}
    return "; ".join(f"{aim} ({id_}): {verdict.get(id_, NOT_RUN)}" for aim, id_ in AIMS.items())


def tally(plan: Sequence[Figures]) -> str:
    """How many claims of the plan came to each verdict."""
    counts = pd.Series([claim["verdict"] for claim in plan]).value_counts(sort=False)
    return ", ".join(f"{verdict} {count}" for verdict, count in counts.items())


def gain_plot(arms: Figures) -> bytes:
    """Every arm's gain over vanilla with the pooled 95 % interval, as PNG; the small dots are single seeds."""
    gains = {arm: row["gain"] for arm, row in arms.items() if arm != VANILLA}
    figure = Figure(figsize=(7.2, 1.0 + 0.27 * len(gains)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color=panels.GREY, linewidth=1)
    for y, (arm, gain) in enumerate(gains.items()):
        panels.draw_dot(axes, gain["pooled"]["delta"], y, arm, gain["pooled"]["ci95"])
        deltas = [seed["delta"] for seed in gain["seeds"].values()]
        axes.scatter(deltas, [y + 0.28] * len(deltas), s=7, color="#000000", zorder=4)
    panels.name_rows(axes, [label(arm) for arm in gains])
    axes.set_xlabel("points over vanilla, with the 95 % interval; small dots: single seeds")
    return panels.to_png(figure)


def pictures(figures: Figures, name: str) -> dict[str, bytes]:
    """The page's plots as PNG by their file names beside it: the gains, and where limits were compared the budgets."""
    plots_of = {f"{name}.png": gain_plot(figures["arms"])}
    return plots_of | ({f"{name}-memories.png": lines_plot(figures["budgets"])} if figures["budgets"] else {})


def render(figures: Figures, name: str) -> str:
    """The page; `name` is that of its plots (`pictures`)."""
    loader = PackageLoader("recipes.study", ".")
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True)  # a missing figure is a fault
    environment.filters |= {f.__name__: f for f in (difference, arm_table, stage_table)}
    page = environment.get_template("report.md.j2").render(
        **figures,
        name=name,
        label=label,
        headline=headline(figures),
        aims=aims(figures["plan"]),
        tally=tally(figures["plan"]),
        duration=timedelta(seconds=round(figures["wall_seconds"])),
        kinds=KINDS,
        gain=figures["arms"].get(VISMEM, {}).get("gain"),
        table=tables(figures),
    )
    return re.sub(r"\n{3,}", "\n\n", page).strip() + "\n"


def tables(figures: Figures) -> dict[str, str]:
    """The tables that occur once, by name."""
    arms, pooled, training = (figures[name] for name in ("arms", "pooled", "training"))
    shown = [arm for arm in SHOWN_BY_TASK if arm in arms]
    groups, costs, tasks = [], [], []
    for arm in shown:
        apart = pooled["yes_no"]["arms"][arm]
        by_group = [*map(pooled["arms"][arm].get, CAPABILITIES), *map(apart.get, KINDS)]
        said, rest = numbers([apart.get("says_yes")], "{:.0f} %"), [pooled["unparsed"][arm], pooled["unfinished"][arm]]
        groups.append([label(arm), *numbers(by_group), *said, *numbers(rest)])
    for arm, row in arms.items():
        spent = numbers(map(training.get(arm, {}).get, COSTS), "{:,.0f}")
        overhead = "" if arm == VANILLA else f"{np.mean(row['overhead']):+.0%}"
        tokens, time = (np.mean([*row[unit].values()]) for unit in ("tokens", "milliseconds"))
        costs.append([label(arm), *spent, *numbers([tokens, time]), overhead])
    for task, row in pooled["tasks"].items():
        name = task.replace("_", " ") + (" (yes/no)" if task in figures["yes_no_tasks"] else "")
        length = "{mean:.0f} (up to {max:.0f})".format_map(figures["lengths"][task])
        tasks.append([name, row["n"], length, *numbers(map(row["arms"].get, shown))])
    limits = [
        [label(placement), label(point["arm"]), f"{point['memories']:.2f}", interval(point)]
        for placement, points in figures["budgets"].items()
        for point in points
    ]
    by_step = pd.Series(figures["jobs"]).groupby(lambda job: job.split("/")[1])
    use = {label(arm): row for arm, row in pooled["invocation_by_arm"].items() if not memoryless(arm)}
    return {
        "plan": plan_table(figures["plan"]),
        "parts": part_table(figures["plan"], figures["seeds"]),
        "groups": table(["arm", *CAPABILITIES, *KINDS.values(), "says yes", "unparsed", "unfinished"], groups),
        "tasks": table(["task", "n", "tokens an answer", *map(label, shown)], tasks),
        "needs": need_table(figures["needs"]),
        "limits": table(["placement", "arm", "memories an answer", "score"], limits),
        "costs": table(["arm", *COSTS.values(), "visual tokens", "ms per question", "over vanilla"], costs),
        "use": use_table("arm", use),
        "use_by_task": use_table("task", pooled["invocation"].get("tasks", {}) if pooled["invocation"] else {}),
        "jobs": table(["step", "runs", "seconds per run"], [[k, len(v), f"{v.mean():.0f}"] for k, v in by_step]),
        "parameters": table(["parameter", "value"], [[f"`{k}`", f"`{v}`"] for k, v in figures["parameters"].items()]),
    }


def plan_table(plan: Sequence[Figures]) -> str:
    """Every claim of the plan: what was predicted, what came out."""
    rows = []
    for claim in plan:
        results = [(part["text"], result(part)) for part in claim["parts"]]
        found = [f"{text}: {said or NOT_RUN}" for text, said in results] if any(said for _, said in results) else []
        rows.append([claim["id"], claim["claim"], claim["prediction"], "; ".join(found), f"**{claim['verdict']}**"])
    lines = table(["", "claim", "prediction", "found", "verdict"], rows).splitlines()
    return "\n".join([*lines[:1], "| --- | --- | --- | --- | --- |", *lines[2:]])


def result(part: Figures) -> str:
    """A part's figures: the pooled difference with its interval, and in how many seeds that is above 0."""
    found = part.get("found")
    if found:
        seeds = f"above 0 in {found['holds']} of {len(found['seeds'])}"
        seeds += f", below in {found['reversed']}" if found["reversed"] else ""
        said = f"{difference(found['pooled'])}, {seeds}"
    else:
        said = part.get("said", "")
    return said + (f" ({part['note']})" if part.get("note") else "")


def part_table(plan: Sequence[Figures], seeds: Sequence[int]) -> str:
    """The differences of all parts by seed; a part that other seeds were asked has empty cells."""
    parts = [(claim, part) for claim in plan for part in claim["parts"] if part.get("found")]
    adjusted = holm([part["found"]["pooled"]["p"] for _, part in parts])
    rows = []
    for (claim, part), p in zip(parts, adjusted, strict=True):
        found = part["found"]
        by_seed = [difference(found["seeds"][seed]) if seed in found["seeds"] else "" for seed in seeds]
        pooled = [difference(found["pooled"]), p_value(p).removeprefix("p ").removeprefix("= ")]
        rows.append([part["text"], claim["id"], part["verdict"], *pooled, *by_seed])
    return table(["difference, in points", "claim", "verdict", "pooled", "p, Holm", *columns(seeds)], rows)


def arm_table(arms: Figures) -> str:
    """Each arm's scores and its gain over vanilla."""
    rows = []
    for arm, row in arms.items():
        spread = "" if row["spread"] is None else f" ± {row['spread']:.1f}"
        gain = difference(row["gain"]["pooled"]) if row["gain"] else ""
        rows.append([label(arm), f"{row['mean']:.1f}{spread}", *numbers(row["seeds"].values()), gain])
    return table(["arm", "mean ± spread", *columns(arms[VANILLA]["seeds"]), "gain"], rows)


def need_table(needs: Figures) -> str:
    """Each arm's score by what a question needs, and its gain over vanilla there; nothing where none is known."""
    header = ["arm"] + [cell for need, row in needs.items() for cell in (f"{need} (n = {row['n']})", "gain")]
    rows = []
    for arm in next(iter(needs.values()))["arms"] if needs else ():
        gains = ["" if arm == VANILLA else difference(row["gains"][arm]["pooled"]) for row in needs.values()]
        scores = numbers(row["arms"][arm] for row in needs.values())
        rows.append([label(arm), *(cell for pair in zip(scores, gains, strict=True) for cell in pair)])
    return table(header, rows)


def stage_table(stages: Figures) -> str:
    """Each arm's score on the first stage's tasks after each stage, and what it lost."""
    rows = []
    for arm, row in stages["arms"].items():
        less = difference(stages["less"][arm]["pooled"]) if arm in stages["less"] else ""
        rows.append([label(arm), *numbers(row["scores"]), difference(row["lost"]["pooled"]), less])
    count = len(next(iter(stages["arms"].values()))["scores"])
    return table(["arm", *(f"stage {k}" for k in range(1, count + 1)), "lost", "more than VisMem"], rows)


def memoryless(arm: str) -> bool:
    """Whether the arm has no memory at all."""
    found = find_arm(arm)
    return found is not None and found.policy.limit == 0


def use_table(first: str, uses: Figures) -> str:
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


def difference(found: Figures) -> str:
    """A difference with its interval: `+5.3 (+2.1 to +8.4)`."""
    return f"{found['delta']:+.1f} ({found['ci95'][0]:+.1f} to {found['ci95'][1]:+.1f})"


def interval(found: Figures) -> str:
    """A score with its interval: `55.3 (52.1 to 58.4)`."""
    return f"{found['score']:.1f} ({found['ci95'][0]:.1f} to {found['ci95'][1]:.1f})"


def numbers(values: Iterable[float | None], form: str = "{:.1f}") -> list[str]:
    """Formatted numbers; None is an empty cell."""
    return ["" if value is None else form.format(value) for value in values]


def columns(seeds: Iterable[int]) -> list[str]:
    """The seeds' column headings."""
    return [f"seed {seed}" for seed in seeds]

"""The study's figures as a Markdown page. Every sentence that claims something is computed from them."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from itertools import groupby
from typing import Any

import numpy as np

from vismem.evaluation.arms import VANILLA, VISMEM, label
from vismem.evaluation.metrics import CAPABILITIES
from vismem.steps import BASELINES

Figures = Mapping[str, Any]

COSTS = {
    "trainable_parameters": "parameters trained",
    "train_samples": "questions trained on",
    "train_rollouts": "answers sampled",
    "train_seconds": "training seconds",
}  # of a training step's metrics.json
PAPER_OVERHEAD = 0.438  # the most that the paper reports, over vanilla's seconds a sample
MEMORYLESS = (VANILLA, *(step.name for step in BASELINES))
SHOWN_BY_TASK = (VANILLA, VISMEM, "short_only", "long_only", "sft_lora", "grpo_lora", "full")


def headline(figures: Figures) -> str:
    """The result in one sentence, of what was run."""
    arms, items = figures["arms"], sum(figures["items"].values())
    asked = f"of {items} test questions ({_seeds(figures)})"
    if VISMEM not in arms:
        return f"Vanilla answers {arms[VANILLA]['mean']:.1f} % {asked} correctly."
    gain = arms[VISMEM]["gain"]
    return (
        f"VisMem answers {arms[VISMEM]['mean']:.1f} % {asked} correctly, vanilla {arms[VANILLA]['mean']:.1f} %: "
        f"{gain['delta']:+.1f} points (95 % interval {gain['ci95'][0]:+.1f} to {gain['ci95'][1]:+.1f})."
    )


def render(figures: Figures, picture: str) -> str:
    """The page; `picture` is the plot's file name beside it."""
    sections = (
        _opening(figures, picture), _arms(figures), _groups(figures), _tasks(figures), _claims(figures),
        _costs(figures), _memory(figures), _transfer(figures), _validation(figures), _making(figures),
    )  # fmt: skip
    return "\n\n".join(part for section in sections for part in section) + "\n"


def _opening(figures: Figures, picture: str) -> Iterable[str]:
    yield "# The study: VisMem against its base, its ablations and fine-tuning"
    yield (
        f"Made by `{figures['command']}` on {figures['machine']}, in "
        f"{timedelta(seconds=round(figures['wall_seconds']))} (h:mm:ss); commit {', '.join(figures['commits'])}. "
        "The page is written by the command: do not edit it."
    )
    yield f"**{headline(figures)}**"
    if bar := figures["bar"]:
        yield (
            f"The bar is a gain of {bar['points']:.0f} points overall, with a 95 % interval above 0 in each seed: "
            f"{bar['gain']:+.1f} points, above 0 in {bar['seeds_above_0']} of {bar['seeds']} seeds; "
            f"it is {'met' if bar['met'] else 'not met'}."
        )
    yield f"![Gain over vanilla of every arm]({picture})"
    yield (
        "Every seed has its own scenes, base, memory and baselines, and its own test questions, which were answered "
        "once. Intervals are paired bootstrap intervals over test questions (95 %), pooled over all seeds unless a "
        "seed is named; ± is the standard deviation over seeds."
    )


def _arms(figures: Figures) -> Iterable[str]:
    yield "## Arms"
    arms, seeds = figures["arms"], figures["seeds"]
    rows = [
        [label(arm), _mean(row), *(f"{row['seeds'][seed]:.1f}" for seed in seeds), _difference(row["gain"])]
        for arm, row in arms.items()
    ]
    yield "Score in percent, and the gain over vanilla in points."
    yield table(["arm", "mean ± spread", *_columns(seeds), "gain"], rows)
    yield "The gain in each seed, with its interval:"
    rows = [
        [label(arm), *(_difference(row["gain_by_seed"][seed]) for seed in seeds)]
        for arm, row in arms.items()
        if arm != VANILLA
    ]
    yield table(["arm", *_columns(seeds)], rows)


def _groups(figures: Figures) -> Iterable[str]:
    yield "## By capability, and yes/no questions apart"
    pooled = figures["pooled"]
    capabilities = [name for name in CAPABILITIES if name in pooled["counts"]]
    kinds = [name for name in ("without", "only") if name in pooled["yes_no"]["arms"][VANILLA]]
    names = {"without": "all but yes/no", "only": "yes/no only"}
    rows = []
    for arm, scores in pooled["arms"].items():
        apart = pooled["yes_no"]["arms"][arm]
        said = [f"{apart['says_yes']:.0f} %"] if "says_yes" in apart else []
        cells = [*(f"{scores[n]:.1f}" for n in capabilities), *(f"{apart[n]:.1f}" for n in kinds), *said]
        rows.append([label(arm), *cells, f"{pooled['unparsed'][arm]:.1f}", f"{pooled['unfinished'][arm]:.1f}"])
    says = ["says yes"] if pooled["yes_no"]["n"] else []
    header = ["arm", *capabilities, *(names[kind] for kind in kinds), *says, "unparsed", "unfinished"]
    yield table(header, rows)
    if VISMEM in pooled["arms"]:
        gains = {**pooled["gain"], **{names[kind]: pooled["yes_no"]["gain"][kind] for kind in kinds}}
        parts = [f"{name} {_difference(gain)}" for name, gain in gains.items()]
        yield f"VisMem's gain over vanilla: {'; '.join(parts)}."


def _tasks(figures: Figures) -> Iterable[str]:
    tasks = figures["pooled"]["tasks"]
    arms = [arm for arm in SHOWN_BY_TASK if arm in figures["arms"]]
    yield "## By task"
    rows = [
        [
            task.replace("_", " ") + (" (yes/no)" if task in figures["yes_no_tasks"] else ""),
            row["capability"],
            str(row["n"]),
            *(f"{row['arms'][arm]:.1f}" for arm in arms),
        ]
        for task, row in tasks.items()
    ]
    yield table(["task", "capability", "n", *(label(arm) for arm in arms)], rows)


def _claims(figures: Figures) -> Iterable[str]:
    headings = (
        ("order", "The paper's claims", "Its ablation order: complete > one kind only > random > vanilla."),
        ("content", "Is it the memory's content?", "VisMem against the same with other content in a memory's place."),
        ("baselines", "Against fine-tuning", "The same base, data and rewards, trained without memory."),
    )  # fmt: skip
    for name, heading, words in headings:
        if claims := figures["claims"][name]:
            yield f"## {heading}"
            yield f"{words} A claim holds in a seed whose paired interval is above 0."
            yield _claim_table(claims, figures["seeds"])


def _costs(figures: Figures) -> Iterable[str]:
    yield "## What it costs"
    rows = []
    for arm, row in figures["arms"].items():
        cost = figures["training"].get(arm, {})
        overhead = "" if row["overhead"] is None else f"{np.mean(row['overhead']):+.0%}"
        rows.append(
            [
                label(arm),
                *(_number(cost.get(name)) for name in COSTS),
                f"{1000 * row['seconds']:.1f}",
                overhead,
            ]
        )
    header = ["arm", *COSTS.values(), "ms a sample", "over vanilla"]
    yield table(header, rows)
    yield (
        "Means over seeds. Training is counted behind the common base, every pass over a question anew; arms without "
        "figures there use VisMem's weights, or none. Training ran on one thread, "
        f"up to {figures['at_once']} steps at a time. Decoding was timed when no training ran, one thread each, the "
        "arms of a seed in turn batch by batch in one process, beside at most the evaluation of another seed: ratios "
        "between arms are safe, and milliseconds are this machine's."
    )
    if VISMEM in figures["arms"]:
        overheads = figures["arms"][VISMEM]["overhead"]
        within = sum(overhead <= PAPER_OVERHEAD for overhead in overheads)
        yield (
            f"The paper's overhead of VisMem in seconds a sample, at most {PAPER_OVERHEAD:.1%} over vanilla, holds in "
            f"{within} of {len(overheads)} seeds."
        )


def _memory(figures: Figures) -> Iterable[str]:
    use = figures["pooled"]["invocation_by_arm"]
    rows = [[label(arm), *_use(use[arm])] for arm in use if arm not in MEMORYLESS]
    if not rows:
        return
    header = ["answers with memory", "short an answer", "at", "long an answer", "at"]
    yield "## How memory is used"
    yield "Invocations an answer by kind, and their mean relative position in the answer (0 is its start)."
    yield table(["arm", *header], rows)
    if by_task := figures["pooled"]["invocation"].get("tasks"):
        yield "VisMem by task:"
        yield table(["task", *header], [[task.replace("_", " "), *_use(row)] for task, row in by_task.items()])


def _transfer(figures: Figures) -> Iterable[str]:
    if not (moved := figures["transfer"]):
        return
    yield "## Transfer and forgetting"
    yield (
        "The same bases, every arm trained on half of the tasks only (of each capability every other one): "
        f"{', '.join(task.replace('_', ' ') for task in moved['tasks'])}. Gains are over vanilla, which is VisMem with "
        "memory off; a negative gain on the other tasks is forgetting."
    )
    for half, words in (("trained", "Tasks trained on"), ("untrained", "Tasks not trained on")):
        if half in moved["halves"]:
            yield f"{words} ({moved['n'][half]} questions):"
            arms = moved["halves"][half]
            seeds = list(arms[VANILLA]["gain_by_seed"])
            rows = []
            for arm, row in arms.items():
                gains = [row["gain"], *row["gain_by_seed"].values()] if arm != VANILLA else [None] * (1 + len(seeds))
                rows.append([label(arm), f"{row['score']:.1f}", *map(_difference, gains)])
            yield table(["arm", "score", "gain", *_columns(seeds)], rows)
            if claims := moved["claims"][half]:
                yield _claim_table(claims, seeds)


def _validation(figures: Figures) -> Iterable[str]:
    rows = []
    for cost in figures["training"].values():
        for step, runs in cost["validation"].items():
            for arm in runs[0] or ():
                scores = [run[arm]["score"] for run in runs]
                rows.append([step, label(arm), *(f"{score:.1f}" for score in scores)])
    if rows:
        yield "## Validation"
        yield "Scores (%) on the validation split behind each training step, from which choices may be made."
        yield table(["step", "decoding", *_columns(figures["seeds"])], rows)


def _making(figures: Figures) -> Iterable[str]:
    yield "## How it was made"
    by_step = sorted((name.split("/")[1], seconds) for name, seconds in figures["jobs"].items())
    groups = [(step, [seconds for _, seconds in rows]) for step, rows in groupby(by_step, key=lambda item: item[0])]
    rows = [[step, str(len(seconds)), f"{np.mean(seconds):.0f}"] for step, seconds in groups]
    yield table(["step", "runs", "seconds a run"], rows)
    if figures["parameters"]:
        yield "Parameters that differ from the defaults:"
        yield table(["parameter", "value"], [[f"`{n}`", f"`{v}`"] for n, v in figures["parameters"].items()])
    else:
        yield "All parameters are the defaults."
    yield ", ".join(f"{name} {version}" for name, version in figures["versions"].items()) + "."


# --- pieces ---


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    escaped = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)


def _claim_table(claims: Sequence[Figures], seeds: Sequence[int]) -> str:
    rows = [
        [claim["text"], _verdict(claim), _difference(claim["pooled"]), *map(_difference, claim["seeds"].values())]
        for claim in claims
    ]
    return table(["claim", "holds in", "difference, pooled", *_columns(seeds)], rows)


def _verdict(claim: Figures) -> str:
    """In how many seeds the claim holds, and in how many its opposite does."""
    opposite = f"; the opposite in {claim['reversed']}" if claim["reversed"] else ""
    return f"{claim['holds']} of {len(claim['seeds'])} seeds{opposite}"


def _use(use: Figures) -> list[str]:
    cells = [f"{use['answers_with_memory']:.0f} %"]
    for kind in ("short", "long"):
        place = use[kind]["mean_position"]
        cells += [f"{use[kind]['per_answer']:.2f}", "" if place is None else f"{place:.2f}"]
    return cells


def _difference(difference: Figures | None) -> str:
    if difference is None:
        return ""
    low, high = difference["ci95"]
    return f"{difference['delta']:+.1f} ({low:+.1f} to {high:+.1f})"


def _mean(row: Figures) -> str:
    return f"{row['mean']:.1f}" if row["spread"] is None else f"{row['mean']:.1f} ± {row['spread']:.1f}"


def _columns(seeds: Iterable[int]) -> list[str]:
    return [f"seed {seed}" for seed in seeds]


def _seeds(figures: Figures) -> str:
    return f"{len(figures['seeds'])} seed{'s' if len(figures['seeds']) > 1 else ''}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"

"""What became of every claim of docs/results/plan.md. Pure but for `read_plan`.

Every claim is a list of parts {id, text, verdict} with `found`, a `claims.compare`, or `said`, its figures in words. A
part may have a `note` behind them.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from recipes.study.claims import (
    EQUAL_SECONDS,
    HOLDS,
    NOT_RUN,
    NOT_SHOWN,
    REVERSED,
    TRANSFER,
    Values,
    judge,
    majority,
    overall,
    part,
    told,
)
from vismem.evaluation.arms import label
from vismem.records import VISMEM

PLAN = Path("docs/results/plan.md")
CONVERGED = 3.0  # points that the base's last phase once more may gain it (G2)
AS_LONG = 0.9  # times the method's seconds from which on a baseline trained as long (F5)
FORGOTTEN = 6.5  # points that may be lost (C1)


def read_plan(file: Path) -> dict[str, dict[str, str]]:
    """{id: {claim, prediction}} of the tables of the plan. ValueError for an id that stands there twice."""
    found: dict[str, dict[str, str]] = {}
    for line in file.read_text().splitlines():
        row = re.fullmatch(r"\| ([A-Z]\d+) ([^|]+)\|[^|]*\|[^|]*\|([^|]*)\|", line)
        if row and row[1] in found:
            raise ValueError(f"{file}: {row[1]} is there twice")
        if row:
            found[row[1]] = {"claim": row[2].strip(), "prediction": row[3].strip()}
    return found


def verdicts(plan: Mapping[str, Mapping[str, str]], figures: Values) -> list[Values]:
    """Each claim of the plan: {id, claim, prediction, verdict, parts}; see `overall`."""
    parts = all_parts(figures)
    listed = []
    for id_, row in plan.items():
        own = [part for part in parts if part["id"] == id_]
        listed.append({"id": id_, **row, "verdict": overall([part["verdict"] for part in own]), "parts": own})
    return listed


def all_parts(figures: Values) -> list[Values]:
    """The parts of all claims, from the figures of `report.json`."""
    long = figures["long"] or {"claims": judge(EQUAL_SECONDS, None, 0), "training": {}}
    return [
        *figures["claims"],
        *(_at_equal_seconds(claim, long["training"]) for claim in long["claims"]),
        *_converged(figures["base"]),
        *_cheaper(figures["arms"]),
        *_reinforced(figures["checks"]),
        _chosen(figures["oracle"]),
        *_kept(figures["stages"]),
        *(figures["transfer"]["claims"] if figures["transfer"] else judge(TRANSFER, None, 0)),
    ]


def _at_equal_seconds(claim: Values, training: Values) -> Values:
    """F5: the part of a baseline that trained for less than the method's seconds was not run."""
    own, method = (training.get(claim[side], {}).get("train_seconds") for side in ("below", "above"))
    if claim["found"] is None or own is None or not method:
        return {**claim, "verdict": NOT_RUN}
    enough, note = own >= AS_LONG * method, f"trained {own / method:.2f} times as long as {label(VISMEM)}"
    return {**claim, "note": note} if enough else {**claim, "note": f"{note}: too short", "verdict": NOT_RUN}


def _converged(base: Values) -> list[Values]:
    """G2, from the base's own `training.json`: `scores.longer`, before and after its last phase once more, by need."""
    longer = base.get("scores", {}).get("longer", {})
    before, after = longer.get("before", {}), longer.get("after", {})
    parts = []
    for need in ("coarse", "compute"):
        text = f"the base with more steps - the base, {need}"
        if need not in after or need not in before:
            parts.append(told("G2", text))
            continue
        gain = after[need] - before[need]
        parts.append(told("G2", text, REVERSED if gain > CONVERGED else HOLDS, f"{gain:+.1f}"))
    return parts


def _cheaper(arms: Values) -> list[Values]:
    """M11: fewer tokens in the language model's context, and fewer seconds, than whole images in each seed."""
    own, whole = arms.get(VISMEM), arms.get("full_resolution")
    if not own or not whole:
        return [told("M11", text) for text in ("visual tokens", "seconds")]
    score = f"score {own['mean']:.1f} against {whole['mean']:.1f}"
    score += f" (relook {arms['relook']['mean']:.1f})" if "relook" in arms else ""
    parts = []
    for text, name, said in (
        ("visual tokens, memories counted in", "tokens", f"{{:.1f}} against {{:.1f}}; {score}"),
        ("milliseconds a question", "milliseconds", "{:.1f} against {:.1f}"),
    ):
        pairs = list(zip(own[name].values(), whole[name].values(), strict=True))
        fewer, more = sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)
        means = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
        held = HOLDS if fewer == len(pairs) else majority(0, more, len(pairs))
        parts.append(told("M11", text, held, f"{said.format(*means)}; fewer in {fewer} of {len(pairs)} seeds"))
    return parts


def _reinforced(checks: Mapping[str, Values]) -> list[Values]:
    """R1 and R2: what GRPO changed on validation questions."""
    parts = []
    for id_, name, text in (
        ("R1", "random_50", "after - before stage I's GRPO, random 50 %"),
        ("R2", "vismem_sampled", "after - before stage II's GRPO, sampled"),
    ):
        check = checks.get(name)
        row = part(id_, text, check["found"] if check else None)
        if check:
            row["note"] = f"{check['rollouts']:,.0f} rollouts, {check['n']} validation questions"
        if id_ == "R2" and check and "vismem" in checks:
            greedy = checks["vismem"]["found"]["pooled"]
            low, high = greedy["ci95"]
            row["note"] += f"; greedy {greedy['delta']:+.1f} ({low:+.1f} to {high:+.1f})"
        parts.append(row)
    return parts


def _chosen(oracle: Values | None) -> Values:
    """R3: the share of the way from a random choice to the oracle, above 0 in two thirds of the seeds."""
    text = "share of oracle - random choice"
    if oracle is None:
        return told("R3", text)
    intervals = [seed["share_ci95"] or (0.0, 0.0) for seed in oracle["seeds"].values()]
    above, below = sum(low > 0 for low, _ in intervals), sum(high < 0 for _, high in intervals)
    share, ends = oracle["share"], oracle["share_ci95"]
    said = "the three never differ" if share is None else f"{share:.0f} % ({ends[0]:.0f} to {ends[1]:.0f})"
    said += f", above 0 in {above} of {len(intervals)}"
    return told("R3", text, majority(above, below, len(intervals)), said)


def _kept(stages: Values | None) -> list[Values]:
    """C1 to C3."""
    lost = f"lost by {label(VISMEM)} after four stages"
    others = ("sft_lora", "grpo_lora")
    texts = [f"lost by {label(arm)} - {lost}" for arm in others]
    if stages is None:
        return [told("C1", lost), told("C2", "answers changed"), *(part("C3", text, None) for text in texts)]
    found, changed = stages["arms"][VISMEM]["lost"], stages["changed"]
    over = sum(seed["ci95"][0] > FORGOTTEN for seed in found["seeds"].values())
    held = NOT_SHOWN if not over else majority(0, over, len(found["seeds"]))
    held = HOLDS if found["pooled"]["delta"] <= FORGOTTEN else held
    less = [stages["less"].get(arm) for arm in others]
    return [
        {"id": "C1", "text": lost, "verdict": held, "found": found},
        told("C2", "answers changed", REVERSED if changed else HOLDS, str(changed)),
        *(part("C3", text, row) for text, row in zip(texts, less, strict=True)),
    ]

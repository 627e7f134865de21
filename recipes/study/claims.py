"""The study's claims: that one arm, or the mean of several, scores above another.

Their ids are those of docs/results/plan.md. Claims that share an id make one claim, which holds where all of them do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from vismem.data.tasks import NEEDS
from vismem.evaluation.arms import label
from vismem.evaluation.statistics import paired_difference
from vismem.records import VANILLA, VISMEM

RANDOM = ("random_25", "random_50", "random_75", "random_100")
ONLY = ("short_only", "long_only")
FORCED = ("forced_short", "forced_long")
LEARNED, STEP_BY_STEP = (VISMEM,), ("M1", "M2", "M3")  # of whose claims M4 is made
AIM = 15.0  # points over vanilla
PLAN_IDS = {  # of VisMem against a baseline
    "sft_lora": "F1",
    "sft_lora_matched": "F2",
    "sft_lora_vision": "F3",
    "grpo_lora": "F4",
    "grpo_lora_vision": "F4",
    "sft_lora_long": "F5",
    "grpo_lora_long": "F5",
    "static_prefix": "M10",
    "continuous": "M10",
}
TRANSFER_IDS = {VANILLA: "T1", "sft_lora": "T2"}  # on tasks that were not trained on

Values = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """The mean of the arms `above` is above that of `below`, by `margin` points, on the questions of one `need`."""

    id: str  # of the plan; "" where the plan has no such claim
    text: str
    above: Sequence[str]
    below: Sequence[str]
    margin: float = 0.0
    need: str | None = None  # of `vismem.data.tasks.NEEDS`; None: all questions


CONTENT = (  # is it the memory's content that helps?
    Claim("M8", "VisMem is above its own policy with memory off", LEARNED, ("no_memory",)),
    Claim("M9", "VisMem is above the same with another row's memories", LEARNED, ("shuffled",)),
    Claim("M9", "VisMem is above the same with noise for memories", LEARNED, ("noise",)),
    Claim("M9", "VisMem is above the same with short and long swapped", LEARNED, ("swapped",)),
    Claim("", "VisMem is above showing the image's tokens once more", LEARNED, ("relook",)),
)


def order(best: str | None, nearest: str | None) -> list[Claim]:
    """The order of the paper's Tables 3 and 9: learned > one kind only > random > vanilla, at the same limit.

    Random invocation is all rates' mean, the `best` rate, and the rate `nearest` to VisMem's number of memories (None:
    none was run), which is the plan's.
    """
    claims = [
        Claim("", "VisMem is above vanilla", LEARNED, (VANILLA,)),
        Claim("M7", f"VisMem is at least {AIM:g} points above vanilla", LEARNED, (VANILLA,), margin=AIM),
        *(Claim("M1", f"VisMem is above {label(arm)}", LEARNED, (arm,)) for arm in ONLY),
    ]
    sides: list[tuple[str, Sequence[str], Sequence[str]]] = [("the mean of the rates", RANDOM, ("", "", ""))]
    sides += [(f"the best rate, {label(best)}", (best,), ("", "", ""))] if best else []
    sides += [(f"the rate nearest to VisMem's, {label(nearest)}", (nearest,), ("M2", "M3", ""))] if nearest else []
    for words, arms, (one_kind, nothing, learned) in sides:
        claims += [
            Claim(learned, f"VisMem is above random ({words})", LEARNED, arms),
            *(Claim(one_kind, f"{label(arm)} is above random ({words})", (arm,), arms) for arm in ONLY),
            Claim(nothing, f"random ({words}) is above vanilla", arms, (VANILLA,)),
        ]
    more = "more is not better: random 25 to 75 % (mean) is above every delimiter"
    return [*claims, Claim("", more, RANDOM[:3], RANDOM[3:])]


def by_need() -> list[Claim]:
    """Short memory is for detail, long memory for computation."""
    claims = []
    for (short, long), ids in ((ONLY, ("", "")), (FORCED, ("M5", "M6"))):
        for (above, below), need, id_ in zip(((short, long), (long, short)), ("detail", "compute"), ids, strict=True):
            text = f"{label(above)} gains more than {label(below)} on {need} tasks"
            claims.append(Claim(id_, text, (above,), (below,), need=need))
    return claims


def vismem_above(arms: Sequence[str], ids: Mapping[str, str]) -> list[Claim]:
    """VisMem compared with each of the arms; `ids`: the plan's, by arm."""
    return [Claim(ids.get(arm, ""), f"VisMem is above {label(arm)}", LEARNED, (arm,)) for arm in arms]


def judge(claims: Sequence[Claim], scores: pd.DataFrame, resamples: int) -> list[Values]:
    """`compare` for every claim whose arms were all run and whose questions were asked.

    Each has its `id`, `text` and `verdict`: "holds" where two thirds of the seeds do, "reversed" where their intervals
    are below 0, else "not shown". A claim with a margin holds where the pooled difference is that large and every
    seed's interval is above 0.
    """
    needs = scores.index.get_level_values("task").map(lambda task: NEEDS.get(task, ""))
    judged = []
    for claim in claims:
        asked = scores if claim.need is None else scores[needs == claim.need]
        if {*claim.above, *claim.below} <= set(scores) and len(asked):
            found = compare(asked, claim.above, claim.below, resamples)
            judged.append({"id": claim.id, "text": claim.text, "verdict": verdict(found, claim.margin), **found})
    return judged


def verdict(found: Mapping[str, Any], margin: float = 0.0) -> str:
    """What a comparison shows over all its seeds, as `judge` says."""
    count = len(found["seeds"])
    enough = (
        found["holds"] == count and found["pooled"]["delta"] >= margin if margin else 3 * found["holds"] >= 2 * count
    )
    if enough:
        return "holds"
    return "reversed" if 3 * found["reversed"] >= 2 * count else "not shown"


def whole_order(judged: Sequence[Values]) -> Values | None:
    """M4: in which seeds all intervals of M1, M2 and M3 are above 0; None unless all five claims were judged.

    {seeds, holds: those of them, verdict: "holds" for two thirds of the seeds}.
    """
    steps = [claim for claim in judged if claim["id"] in STEP_BY_STEP]
    if len(steps) < 5:
        return None
    seeds = list(steps[0]["seeds"])
    held = [seed for seed in seeds if all(claim["seeds"][seed]["ci95"][0] > 0 for claim in steps)]
    return {"seeds": seeds, "holds": held, "verdict": "holds" if 3 * len(held) >= 2 * len(seeds) else "not shown"}


def compare(scores: pd.DataFrame, above: Sequence[str], below: Sequence[str], resamples: int) -> Values:
    """The paired difference {delta, ci95, p} in points of two sides, each the mean of its arms.

    {pooled, seeds {seed: ...}, holds, reversed}: `holds` counts the seeds in which the 95 % interval is above 0,
    `reversed` those in which it is below.
    """

    def difference(rows: pd.DataFrame, seed: int) -> Values:
        sides = (rows[list(side)].to_numpy().mean(axis=1) for side in (above, below))
        return paired_difference(*sides, resamples=resamples, seed=seed).model_dump(mode="json")

    seeds = {int(seed): difference(rows, int(seed)) for seed, rows in scores.groupby(level="seed")}
    return {
        "pooled": difference(scores, min(seeds)),
        "seeds": seeds,
        "holds": sum(found["ci95"][0] > 0 for found in seeds.values()),
        "reversed": sum(found["ci95"][1] < 0 for found in seeds.values()),
    }

"""The plan's claims that one arm scores above another, under the ids of docs/results/plan.md, and when one holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from vismem.data.tasks import NEEDS
from vismem.evaluation.arms import label
from vismem.evaluation.predictions import Prediction
from vismem.evaluation.statistics import paired_difference
from vismem.records import VANILLA, VISMEM

HOLDS, REVERSED, NOT_SHOWN, NOT_RUN = "holds", "reversed", "not shown", "not run"
VERDICTS = (REVERSED, NOT_SHOWN, NOT_RUN, HOLDS)  # of several parts the first of these is the claim's
ONLY = ("short_only", "long_only")
STEP_BY_STEP = ("M1", "M2", "M3")  # of whose parts M4 is made
AIM = 15.0  # points over vanilla

Values = dict[str, Any]
Answers = Mapping[str, Sequence[Prediction]]  # by arm: the same questions in the same order, vanilla among the arms


@dataclass(frozen=True)
class Claim:
    """A part of claim `id`: the arm `above` scores above `below`, by `margin` points, on questions of one `need`."""

    id: str
    above: str
    below: str
    margin: float = 0.0
    need: str | None = None  # of `vismem.data.tasks.NEEDS`; None: all questions

    @property
    def text(self) -> str:
        """What is compared, as the page says it."""
        return f"{label(self.above)} - {label(self.below)}{f', {self.need}' if self.need else ''}"


def of_arms(random: str) -> list[Claim]:
    """Every claim about two arms of the main repetitions; `random`: the arm that stands for random invocation."""
    return [
        Claim("G1", "relook", VANILLA, margin=AIM, need="detail"),
        *(Claim("M1", VISMEM, arm) for arm in ONLY),
        *(Claim("M2", arm, random) for arm in ONLY),
        Claim("M3", random, VANILLA),
        Claim("M5", "forced_short", "forced_long", need="detail"),
        Claim("M6", "forced_long", "forced_short", need="compute"),
        Claim("M7", VISMEM, VANILLA, margin=AIM),
        Claim("M8", VISMEM, "no_memory"),
        *(Claim("M9", VISMEM, arm) for arm in ("shuffled", "noise", "swapped")),
        *(Claim("M10", VISMEM, arm) for arm in ("static_prefix", "continuous")),
        Claim("F1", VISMEM, "sft_lora"),
        Claim("F2", VISMEM, "sft_lora_matched"),
        Claim("F3", VISMEM, "sft_lora_vision"),
        *(Claim("F4", VISMEM, arm) for arm in ("grpo_lora", "grpo_lora_vision")),
    ]


EQUAL_SECONDS = tuple(Claim("F5", VISMEM, arm) for arm in ("sft_lora_long", "grpo_lora_long"))
TRANSFER = (Claim("T1", VISMEM, VANILLA), Claim("T2", VISMEM, "sft_lora"))  # on tasks that were not trained on


def judge(claims: Sequence[Claim], scores: pd.DataFrame | None, resamples: int) -> list[Values]:
    """Each claim's `part`, with its arms `above` and `below`; not run without these, or without questions."""
    judged = []
    for claim in claims:
        asked = scores
        if scores is not None and claim.need is not None:
            asked = scores[needs_of(scores) == claim.need]
        found = None
        if asked is not None and {claim.above, claim.below} <= set(asked) and len(asked):
            found = compare(asked, claim.above, claim.below, resamples)
        sides = {"above": claim.above, "below": claim.below}
        judged.append({**part(claim.id, claim.text, found, claim.margin), **sides})
    return judged


def part(id_: str, text: str, found: Values | None, margin: float = 0.0) -> Values:
    """A part of the claim `id_` that rests on a comparison: {id, text, verdict, found}; None: it was not run."""
    return {"id": id_, "text": text, "verdict": verdict(found, margin) if found else NOT_RUN, "found": found}


def told(id_: str, text: str, verdict_: str = NOT_RUN, said: str = "") -> Values:
    """A part of the claim `id_` whose figures are `said` in words: {id, text, verdict, said}."""
    return {"id": id_, "text": text, "verdict": verdict_, "said": said}


def verdict(found: Mapping[str, Any], margin: float = 0.0) -> str:
    """What a `compare` shows over all its seeds: as `majority`.

    With a margin it holds where the pooled difference is that large and every seed's interval is above 0.
    """
    count, held = len(found["seeds"]), found["holds"]
    if margin and not (held == count and found["pooled"]["delta"] >= margin):
        held = 0
    return majority(held, found["reversed"], count)


def majority(held: int, against: int, count: int) -> str:
    """Holds where it does in two thirds of the seeds; reversed where its opposite does in as many."""
    if 3 * held >= 2 * count:
        return HOLDS
    return REVERSED if 3 * against >= 2 * count else NOT_SHOWN


def overall(verdicts: Sequence[str]) -> str:
    """A claim holds where all its parts do; else it is what the worst of them is. Not run without parts."""
    return min(verdicts, key=VERDICTS.index) if verdicts else NOT_RUN


def whole_order(judged: Sequence[Values]) -> Values:
    """The part of M4: in which seeds all intervals of M1, M2 and M3 are above 0."""
    steps, text = [claim for claim in judged if claim["id"] in STEP_BY_STEP], "all five comparisons of M1 to M3"
    if not steps or any(claim["found"] is None for claim in steps):
        return told("M4", text)
    seeds = list(steps[0]["found"]["seeds"])
    held = [seed for seed in seeds if all(claim["found"]["seeds"][seed]["ci95"][0] > 0 for claim in steps)]
    return told("M4", text, majority(len(held), 0, len(seeds)), f"in {len(held)} of {len(seeds)} seeds")


def needs_of(scores: pd.DataFrame) -> pd.Index:
    """(questions,) what each needs, by its task; NaN where that is not known."""
    return scores.index.get_level_values("task").map(NEEDS)


def clusters_of(scores: pd.DataFrame) -> npt.NDArray[np.int64]:
    """(questions,) the cluster of each, numbered. Validation questions name none: the study's have a picture each."""
    if "cluster" not in scores.index.names:
        return np.arange(len(scores))
    return np.unique(scores.index.get_level_values("cluster"), return_inverse=True)[1]


def compare(scores: pd.DataFrame, above: str, below: str, resamples: int) -> Values:
    """The paired `Difference` in points of two columns, by the clusters of the questions.

    {pooled, seeds {seed: ...}, holds, reversed}: `holds` counts the seeds in which the 95 % interval is above 0,
    `reversed` those in which it is below.
    """

    def difference(rows: pd.DataFrame, seed: int) -> Values:
        sides = rows[above].to_numpy(), rows[below].to_numpy()
        return paired_difference(*sides, clusters_of(rows), resamples=resamples, seed=seed).model_dump(mode="json")

    seeds = {int(seed): difference(rows, int(seed)) for seed, rows in scores.groupby(level="seed")}
    return {
        "pooled": difference(scores, min(seeds)),
        "seeds": seeds,
        "holds": sum(found["ci95"][0] > 0 for found in seeds.values()),
        "reversed": sum(found["ci95"][1] < 0 for found in seeds.values()),
    }

"""What several seeds' evaluations say together: arms, claims and transfer as plain figures. Pure; scores in percent.

A pooled interval is over the items of all seeds; the spread over seeds is reported beside it, since each seed also
trains another base and another memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vismem.evaluation.arms import VANILLA, VISMEM, label
from vismem.evaluation.metrics import OVERALL, is_yes_no, summarise
from vismem.evaluation.predictions import Prediction
from vismem.evaluation.statistics import Scores, paired_difference

RANDOM = ("random_25", "random_50", "random_75", "random_100")
ONLY = ("short_only", "long_only")
BAR = 8.0  # points over vanilla that we ask of VisMem

Answers = Mapping[str, Sequence[Prediction]]  # arm -> its answers, the same items in the same order


@dataclass(frozen=True)
class Evaluation:
    """One seed's output of the step `evaluate`: its `metrics.json` and its predictions."""

    seed: int
    metrics: Mapping[str, Any]
    answers: Answers


@dataclass(frozen=True)
class Claim:
    """One arm, or the mean of several, should score above another."""

    text: str
    above: tuple[str, ...]
    below: tuple[str, ...]


ORDER = (  # of the paper's Tables 3 and 9
    Claim("VisMem is above vanilla", (VISMEM,), (VANILLA,)),
    Claim("VisMem is above short memory only", (VISMEM,), ("short_only",)),
    Claim("VisMem is above long memory only", (VISMEM,), ("long_only",)),
    Claim("one kind of memory only (mean of both) is above random invocation (mean of the rates)", ONLY, RANDOM),
    Claim("VisMem is above random invocation (mean of the rates)", (VISMEM,), RANDOM),
    Claim("random invocation (mean of the rates) is above vanilla", RANDOM, (VANILLA,)),
    Claim("more is not better: random 25 to 75 % (mean) is above every delimiter", RANDOM[:3], RANDOM[3:]),
)
CONTENT = (  # is it the memory's content that helps?
    Claim("VisMem is above the same with another row's memories", (VISMEM,), ("shuffled",)),
    Claim("VisMem is above the same with noise for memories", (VISMEM,), ("noise",)),
    Claim("VisMem is above the same with short and long swapped", (VISMEM,), ("swapped",)),
    Claim("VisMem is above showing the image's tokens once more", (VISMEM,), ("relook",)),
)


def against(arms: Sequence[str]) -> tuple[Claim, ...]:
    """VisMem compared with each of the trained baselines."""
    return tuple(Claim(f"VisMem is above {label(arm)}", (VISMEM,), (arm,)) for arm in arms)


def pool(evaluations: Sequence[Evaluation]) -> dict[str, list[Prediction]]:
    """Every arm's answers of all seeds in turn; ids get the seed in front, since seeds ask other questions."""
    return {
        arm: [replace(a, id=f"{e.seed}/{a.id}") for e in evaluations for a in e.answers[arm]]
        for arm in evaluations[0].answers
    }


def summarise_arms(evaluations: Sequence[Evaluation], *, resamples: int) -> dict[str, Any]:
    """All arms over all seeds: `pooled`, the content of `metrics.summarise` over all items, and for every arm

    arms {arm: {seeds {seed: score}, mean, spread, gain, gain_by_seed, seconds, overhead}}. `spread` is the sample
    standard deviation over seeds, None for one seed; gains are over vanilla: {delta, ci95, p}; seconds are a sample's.
    """
    seconds = {
        arm: float(np.mean([e.metrics["arms"][arm]["seconds_per_sample"] for e in evaluations]))
        for arm in evaluations[0].answers
    }
    pooled = summarise(pool(evaluations), seconds, seed=evaluations[0].seed, resamples=resamples)
    arms: dict[str, Any] = {}
    for arm in evaluations[0].answers:
        scores = {e.seed: e.metrics["arms"][arm][OVERALL] for e in evaluations}
        arms[arm] = {
            "seeds": scores,
            "mean": float(np.mean(list(scores.values()))),
            "spread": _spread(list(scores.values())),
            "gain": gain_of(pooled, arm),
            "gain_by_seed": {e.seed: gain_of(e.metrics, arm) for e in evaluations},
            "seconds": seconds[arm],
            "overhead": [e.metrics["overhead"][arm] for e in evaluations] if arm != VANILLA else None,
        }
    return {"arms": arms, "pooled": pooled}


def gain_of(metrics: Mapping[str, Any], arm: str) -> dict[str, Any] | None:
    """An arm's overall gain over vanilla in a `metrics.json`: {delta, ci95, p}; None for vanilla itself."""
    if arm == VANILLA:
        return None
    gains: dict[str, Any] = metrics["gain"] if arm == VISMEM else metrics["ablations"][arm]
    overall: dict[str, Any] = gains[OVERALL]
    return overall


def judge(claims: Sequence[Claim], evaluations: Sequence[Evaluation], *, resamples: int) -> list[dict[str, Any]]:
    """Every claim whose arms were all run: {text, above, below, pooled, seeds {seed: ...}, holds}.

    Differences are {delta, ci95, p}. `holds` counts the seeds in which the paired 95 % interval is above 0, and
    `reversed` those in which it is below.
    """
    known = evaluations[0].answers
    pooled = pool(evaluations)
    judged = []
    for claim in claims:
        if not set(claim.above + claim.below) <= set(known):
            continue
        seeds = {e.seed: compare(e.answers, claim, resamples=resamples, seed=e.seed) for e in evaluations}
        judged.append(
            {
                "text": claim.text,
                "above": claim.above,
                "below": claim.below,
                "pooled": compare(pooled, claim, resamples=resamples, seed=evaluations[0].seed),
                "seeds": seeds,
                "holds": sum(difference["ci95"][0] > 0 for difference in seeds.values()),
                "reversed": sum(difference["ci95"][1] < 0 for difference in seeds.values()),
            }
        )
    return judged


def compare(answers: Answers, claim: Claim, *, resamples: int, seed: int) -> dict[str, Any]:
    """The paired difference in points of a claim's two sides over the items: {delta, ci95, p}."""
    above, below = (
        np.stack([_scores(answers[arm]) for arm in side]).mean(axis=0) for side in (claim.above, claim.below)
    )
    found = paired_difference(above, below, resamples=resamples, seed=seed)
    return {"delta": found.delta, "ci95": [found.low, found.high], "p": found.p}


def bar(arms: Mapping[str, Any]) -> dict[str, Any] | None:
    """Whether VisMem gains BAR points over vanilla overall, with an interval above 0 in each seed; None without it."""
    if VISMEM not in arms:
        return None
    gain = arms[VISMEM]["gain"]["delta"]
    above = [difference["ci95"][0] > 0 for difference in arms[VISMEM]["gain_by_seed"].values()]
    return {
        "points": BAR, "gain": gain, "seeds_above_0": sum(above), "seeds": len(above),
        "met": gain >= BAR and all(above),
    }  # fmt: skip


def transfer(evaluations: Sequence[Evaluation], trained: Sequence[str], *, resamples: int) -> dict[str, Any]:
    """Gains over vanilla on the tasks trained on and on the others, of models trained on half of the tasks.

    {trained tasks, n {half: items}, halves {half: {arm: {score, gain, gain_by_seed}}}, claims {half: `judge`}};
    a half is "trained" or "untrained".
    """
    halves: dict[str, Any] = {}
    claims: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for half in ("trained", "untrained"):
        kept = [_only(e, [a.task in trained for a in e.answers[VANILLA]], half == "trained") for e in evaluations]
        pooled = pool(kept)
        counts[half] = len(pooled[VANILLA])
        if counts[half] == 0:
            continue
        arms: dict[str, Any] = {}
        for arm in pooled:
            claim = Claim("", (arm,), (VANILLA,))
            arms[arm] = {
                "score": float(_scores(pooled[arm]).mean()),
                "gain": compare(pooled, claim, resamples=resamples, seed=kept[0].seed),
                "gain_by_seed": {e.seed: compare(e.answers, claim, resamples=resamples, seed=e.seed) for e in kept},
            }
        halves[half] = arms
        claims[half] = judge(against([a for a in pooled if a not in (VANILLA, VISMEM)]), kept, resamples=resamples)
    return {"tasks": list(trained), "n": counts, "halves": halves, "claims": claims}


def yes_no_tasks(answers: Sequence[Prediction]) -> list[str]:
    """The tasks whose every item is answered yes or no, sorted."""
    tasks = {answer.task for answer in answers}
    return sorted(tasks - {answer.task for answer in answers if not is_yes_no(answer)})


def _only(evaluation: Evaluation, flags: Sequence[bool], wanted: bool) -> Evaluation:
    answers = {
        arm: [answer for answer, flag in zip(rows, flags, strict=True) if flag == wanted]
        for arm, rows in evaluation.answers.items()
    }
    return replace(evaluation, answers=answers)


def _scores(answers: Sequence[Prediction]) -> Scores:
    return np.array([100 * answer.score for answer in answers])


def _spread(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None

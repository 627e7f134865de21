"""From predictions to `metrics.json`: scores, paired gains, invocation figures. Pure; all scores are in percent.

Overall means over items, not over tasks, so that the interval and the paired test speak of the same figure.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vismem.data.sample import Capability
from vismem.evaluation.answers import UNPARSED, normalise
from vismem.evaluation.arms import VANILLA, VISMEM
from vismem.evaluation.predictions import Prediction
from vismem.evaluation.statistics import Scores, bootstrap_interval, paired_difference
from vismem.models.kinds import MemoryKind

OVERALL = "overall"
CAPABILITIES = tuple(capability.value for capability in Capability)

Arms = Mapping[str, Sequence[Prediction]]
Masks = dict[str, "np.ndarray[tuple[int], np.dtype[np.bool_]]"]


def summarise(predictions: Arms, seconds: Mapping[str, float], *, seed: int, resamples: int) -> dict[str, Any]:
    """The figures of `metrics.json`: the fields of `vismem.records.Metrics` but for the hashes.

    `predictions`: arm -> its answers, the same items in the same order for every arm, vanilla among them.
    `seconds`: arm -> seconds per sample. A capability without items is left out. ValueError where items differ.
    """
    items = predictions[VANILLA]
    if not items:
        raise ValueError("there are no predictions to summarise")
    for arm, answers in predictions.items():
        if [answer.id for answer in answers] != [item.id for item in items]:
            raise ValueError(f"'{arm}' answered other items, or in another order, than '{VANILLA}'")
    scores = {arm: np.array([100 * answer.score for answer in answers]) for arm, answers in predictions.items()}
    groups = _capability_masks(items)
    others = [arm for arm in predictions if arm not in (VANILLA, VISMEM)]
    options = {"seed": seed, "resamples": resamples}
    return {
        "n": len(items),
        "seed": seed,
        "counts": {name: int(mask.sum()) for name, mask in groups.items() if name != OVERALL},
        "arms": {
            arm: {**_means(scores[arm], groups), "seconds_per_sample": float(seconds[arm])} for arm in predictions
        },
        "intervals": {
            arm: {name: list(bootstrap_interval(scores[arm][mask], **options)) for name, mask in groups.items()}
            for arm in predictions
        },
        "gain": _differences(scores, VISMEM, groups, **options) if VISMEM in predictions else {},
        "ablations": {arm: _differences(scores, arm, groups, **options) for arm in others},
        "overhead": {
            arm: float(seconds[arm] / seconds[VANILLA] - 1)
            for arm in predictions
            if arm != VANILLA and seconds[VANILLA]
        },
        "tasks": _by_task(items, scores),
        "yes_no": _yes_no(predictions, scores, **options),
        "unparsed": {arm: _percent([a.rule == UNPARSED for a in answers]) for arm, answers in predictions.items()},
        "unfinished": {arm: _percent([not a.finished for a in answers]) for arm, answers in predictions.items()},
        "invocation": _invocation(predictions.get(VISMEM, ())),
        "invocation_by_arm": {arm: memory_use(answers) for arm, answers in predictions.items()},
    }


def memory_use(answers: Sequence[Prediction]) -> dict[str, Any]:
    """How memory was used: share of answers with any (percent), and by kind invocations an answer and mean place.

    `mean_position` is the mean relative position in [0, 1], None where that kind was never invoked.
    """
    use: dict[str, Any] = {"answers_with_memory": _percent([bool(answer.invocations) for answer in answers])}
    for kind in MemoryKind:
        places = [e.relative_position for answer in answers for e in answer.invocations if e.kind == kind.value]
        use[kind.value] = {
            "per_answer": len(places) / len(answers),
            "mean_position": float(np.mean(places)) if places else None,
        }
    return use


def is_yes_no(prediction: Prediction) -> bool:
    """Whether the reference is yes or no: such items are reported apart, since a flipped bias looks like a gain."""
    return normalise(prediction.reference) in ("yes", "no")


def _capability_masks(items: Sequence[Prediction]) -> Masks:
    masks: Masks = {OVERALL: np.ones(len(items), dtype=bool)}
    for name in CAPABILITIES:
        mask = np.array([item.capability == name for item in items])
        if mask.any():
            masks[name] = mask
    return masks


def _means(scores: Scores, groups: Masks) -> dict[str, float]:
    return {name: float(scores[mask].mean()) for name, mask in groups.items()}


def _differences(
    scores: Mapping[str, Scores], arm: str, groups: Masks, *, seed: int, resamples: int
) -> dict[str, dict[str, Any]]:
    """The arm minus vanilla in every group: {delta, ci95, p}."""
    found = {}
    for name, mask in groups.items():
        difference = paired_difference(scores[arm][mask], scores[VANILLA][mask], resamples=resamples, seed=seed)
        found[name] = {"delta": difference.delta, "ci95": [difference.low, difference.high], "p": difference.p}
    return found


def _by_task(items: Sequence[Prediction], scores: Mapping[str, Scores]) -> dict[str, Any]:
    """Task -> {capability, n, arms: {arm: score}}, in the order of the capabilities, then by name."""
    order = {name: place for place, name in enumerate(CAPABILITIES)}
    capability = {item.task: item.capability for item in items}
    tasks = {}
    for task in sorted(capability, key=lambda name: (order.get(capability[name], len(order)), name)):
        mask = np.array([item.task == task for item in items])
        tasks[task] = {
            "capability": capability[task],
            "n": int(mask.sum()),
            "arms": {arm: float(values[mask].mean()) for arm, values in scores.items()},
        }
    return tasks


def _yes_no(predictions: Arms, scores: Mapping[str, Scores], *, seed: int, resamples: int) -> dict[str, Any]:
    """Yes/no items apart: each arm's score with, without and only on them, and how often it says yes to them."""
    only = np.array([is_yes_no(item) for item in predictions[VANILLA]])
    groups: Masks = {OVERALL: np.ones(len(only), dtype=bool)}
    groups |= {name: mask for name, mask in (("without", ~only), ("only", only)) if mask.any()}
    arms: dict[str, dict[str, float]] = {}
    for arm, answers in predictions.items():
        arms[arm] = _means(scores[arm], groups)
        if only.any():
            said = [normalise(a.extracted or "") == "yes" for a, wanted in zip(answers, only, strict=True) if wanted]
            arms[arm]["says_yes"] = _percent(said)
    gain = _differences(scores, VISMEM, groups, seed=seed, resamples=resamples) if VISMEM in predictions else {}
    return {"n": int(only.sum()), "arms": arms, "gain": gain}


def _invocation(answers: Sequence[Prediction]) -> dict[str, Any] | None:
    """VisMem's use of memory, overall and by task; None where that arm was not run."""
    if not answers:
        return None
    tasks = {task: [answer for answer in answers if answer.task == task] for task in sorted({a.task for a in answers})}
    return {OVERALL: memory_use(answers), "tasks": {task: memory_use(rows) for task, rows in tasks.items()}}


def _percent(flags: Sequence[bool]) -> float:
    return float(100 * np.mean(flags))

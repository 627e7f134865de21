"""From predictions to `metrics.json`: scores, paired gains, invocation figures. Pure; all scores are in percent.

Overall means over items, not over tasks, so that the interval and the paired test speak of the same figure.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from vismem.data.answer_forms import normalise
from vismem.data.sample import Capability
from vismem.evaluation.answers import UNPARSED
from vismem.evaluation.benchmarks import by_benchmark, macro, task_names
from vismem.evaluation.predictions import Prediction
from vismem.evaluation.statistics import Scores, holm, paired_difference, score_interval
from vismem.models.kinds import MemoryKind
from vismem.records import OVERALL, VANILLA, VISMEM, Difference

CAPABILITIES = tuple(capability.value for capability in Capability)

Masks = dict[str, npt.NDArray[np.bool_]]


def summarise(
    predictions: Mapping[str, Sequence[Prediction]],
    seconds: Mapping[str, float],
    *,
    seed: int,
    resamples: int,
    set_apart: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, Any]:
    """The figures of `metrics.json`: the fields of `vismem.records.Metrics` but for the hashes.

    `predictions`: arm -> its answers, the same items in the same order for every arm, vanilla among them.
    `seconds`: arm -> seconds per sample. `set_apart`: benchmark -> rows in quarantine. A capability without items is
    left out. ValueError where items differ.
    """
    items, used = predictions[VANILLA], predictions.get(VISMEM)
    if not items:
        raise ValueError("there are no predictions to summarise")
    for arm, answers in predictions.items():
        if [answer.id for answer in answers] != [item.id for item in items]:
            raise ValueError(f"'{arm}' answered other items, or in another order, than '{VANILLA}'")
    scores = {arm: np.array([100 * answer.score for answer in answers]) for arm, answers in predictions.items()}
    groups = _masks([item.capability for item in items], CAPABILITIES)
    asked = ["only" if is_yes_no(item) else "without" for item in items]
    yes_no = _masks(asked, ("without", "only"))
    clusters = np.array([cluster_of(item) for item in items])
    options: dict[str, Any] = {"seed": seed, "resamples": resamples}

    def minus(arm: str, other: str, mask: npt.NDArray[np.bool_]) -> Difference:
        return paired_difference(scores[arm][mask], scores[other][mask], clusters[mask], **options)

    def minus_vanilla(masks: Masks, *arms: str) -> dict[str, dict[str, Any]]:
        return _side_by_side({
            (arm, name): minus(arm, VANILLA, mask) for arm in arms for name, mask in masks.items()
        })  # fmt: skip

    benchmarks = by_benchmark(items, scores, set_apart)
    others = [arm for arm in scores if arm != VANILLA]
    differences = minus_vanilla(groups, *others)
    pairs = [(arm, other) for place, arm in enumerate(others) for other in others[:place]]
    return {
        "n": len(items),
        "seed": seed,
        "counts": {name: int(mask.sum()) for name, mask in groups.items() if name != OVERALL},
        "clusters": {name: len(np.unique(clusters[mask])) for name, mask in groups.items()},
        "arms": {
            arm: {
                **_means(scores[arm], groups),
                "seconds_per_sample": float(seconds[arm]),
                "visual_tokens": float(np.mean([answer.visual_tokens for answer in answers])),
            }
            for arm, answers in predictions.items()
        },
        "intervals": {
            arm: {name: list(score_interval(values[mask], clusters[mask])) for name, mask in groups.items()}
            for arm, values in scores.items()
        },
        "gain": differences.pop(VISMEM, {}),
        "ablations": differences,
        "pairs": _side_by_side({(arm, other): minus(arm, other, groups[OVERALL]) for arm, other in pairs}),
        "overhead": {
            arm: float(seconds[arm] / seconds[VANILLA] - 1) for arm in scores if arm != VANILLA and seconds[VANILLA]
        },
        "benchmarks": benchmarks,
        "macro": macro(benchmarks, scores),
        "tasks": _by_task(items, scores),
        "yes_no": {
            "n": asked.count("only"),
            "arms": {arm: _means(scores[arm], yes_no) | _says_yes(predictions[arm], asked) for arm in scores},
            "gain": minus_vanilla(yes_no, VISMEM)[VISMEM] if used else {},
        },
        "unparsed": {arm: _percent([a.rule == UNPARSED for a in answers]) for arm, answers in predictions.items()},
        "unfinished": {arm: _percent([not a.finished for a in answers]) for arm, answers in predictions.items()},
        "invocation": {OVERALL: memory_use(used), "tasks": _use_by_task(used)} if used else None,
        "invocation_by_arm": {arm: memory_use(answers) for arm, answers in predictions.items()},
    }


def memory_use(answers: Sequence[Prediction]) -> dict[str, Any]:
    """How memory was used: share of answers with any (percent), and by kind invocations per answer and mean place.

    `mean_position` is the mean relative position in [0, 1], None where that kind was never invoked.
    """
    use: dict[str, Any] = {"answers_with_memory": _percent([bool(answer.invocations) for answer in answers])}
    for kind in MemoryKind:
        places = invocation_places(answers, kind)
        mean = float(np.mean(places)) if places else None
        use[kind.value] = {"per_answer": len(places) / len(answers), "mean_position": mean}
    return use


def invocation_places(answers: Sequence[Prediction], kind: MemoryKind) -> list[float]:
    """The relative position of every invocation of one kind."""
    return [event.relative_position for answer in answers for event in answer.invocations if event.kind == kind]


def cluster_of(prediction: Prediction) -> str:
    """What a question is drawn with; by itself in files of earlier versions, which do not say."""
    return prediction.cluster or prediction.id


def is_yes_no(prediction: Prediction) -> bool:
    """Whether the reference is yes or no: such items are reported apart, since a flipped bias looks like a gain."""
    return normalise(prediction.reference) in ("yes", "no")


def _side_by_side(cells: Mapping[tuple[str, str], Difference]) -> dict[str, dict[str, Any]]:
    """Row -> column -> a table's differences with Holm's p, all but the one chosen beforehand: VisMem's, overall."""
    others = [cell for cell in cells if cell != (VISMEM, OVERALL)]
    adjusted = dict(zip(others, holm([cells[cell].p for cell in others]), strict=True))
    table: dict[str, dict[str, Any]] = {}
    for (arm, group), found in cells.items():
        fields = found.model_copy(update={"p_holm": adjusted.get((arm, group))}).model_dump(mode="json")
        table.setdefault(arm, {})[group] = fields
    return table


def _masks(keys: Sequence[str], names: Sequence[str]) -> Masks:
    """Overall, then for each of `names` where the items' keys are equal to it; a name without items is left out."""
    masks = {name: np.array([key == name for key in keys]) for name in names if name in keys}
    return {OVERALL: np.ones(len(keys), dtype=bool), **masks}


def _means(scores: Scores, masks: Masks) -> dict[str, float]:
    return {name: float(scores[mask].mean()) for name, mask in masks.items()}


def _says_yes(answers: Sequence[Prediction], asked: Sequence[str]) -> dict[str, float]:
    """How often yes/no questions are answered yes; nothing where there are none."""
    said = [normalise(a.extracted or "") == "yes" for a, kind in zip(answers, asked, strict=True) if kind == "only"]
    return {"says_yes": _percent(said)} if said else {}


def _by_task(items: Sequence[Prediction], scores: Mapping[str, Scores]) -> dict[str, Any]:
    """Task -> {capability, n, arms: {arm: score}}, in the order of the capabilities, then by name."""
    names = task_names(items)
    capability = {name: item.capability for name, item in zip(names, items, strict=True)}
    tasks = {}
    for task in sorted(capability, key=lambda name: (CAPABILITIES.index(capability[name]), name)):
        mask = np.array([name == task for name in names])
        arms = {arm: float(values[mask].mean()) for arm, values in scores.items()}
        tasks[task] = {"capability": capability[task], "n": int(mask.sum()), "arms": arms}
    return tasks


def _use_by_task(answers: Sequence[Prediction]) -> dict[str, Any]:
    named = [*zip(task_names(answers), answers, strict=True)]
    return {task: memory_use([answer for name, answer in named if name == task]) for task in sorted(dict(named))}


def _percent(flags: Sequence[bool]) -> float:
    return float(100 * np.mean(flags))

"""Hand-made predictions of three arms, whose figures can be worked out by hand."""

from project import HASHES

from vismem.evaluation.metrics import summarise
from vismem.evaluation.predictions import InvocationRecord, Prediction
from vismem.records import Metrics

SECONDS = {"vanilla": 0.02, "vismem": 0.025, "short_only": 0.02}
# item: task, capability, reference, vanilla right, vismem right, short_only right
ITEMS = [
    ("count", "understanding", "2", 1, 1, 1),
    ("count", "understanding", "3", 0, 1, 1),
    ("count", "understanding", "4", 0, 1, 0),
    ("match", "understanding", "red", 1, 1, 1),
    ("chain", "reasoning", "blue", 1, 0, 1),
    ("chain", "reasoning", "blue", 0, 0, 0),
    ("exists", "generation", "yes", 0, 1, 0),
    ("exists", "generation", "No", 1, 1, 1),
]


def prediction(place: int, right: int, invocations: tuple[InvocationRecord, ...] = ()) -> Prediction:
    task, capability, reference, *_ = ITEMS[place]
    wrong = {"yes": "no", "No": "yes"}.get(reference)
    extracted = reference if right else wrong
    return Prediction(
        id=f"item-{place}",
        task=task,
        capability=capability,
        source="hand",
        question=f"question {place} <b>?",
        reference=reference,
        text=f"answer: {extracted}",
        marked_text=f"seen,<m_I^s> answer: {extracted} <script>" if invocations else f"answer: {extracted}",
        extracted=extracted,
        rule="answer stated" if extracted else "unparsed",
        score=float(right),
        invocations=invocations,
        answer_length=4,
        finished=place != 5,
        visual_tokens=place + 2,
    )


def hand_made() -> dict[str, list[Prediction]]:
    """Three arms' answers to ITEMS."""
    short, long = InvocationRecord(2, "short", False, 0.25), InvocationRecord(9, "long", False, 0.75)
    used = {0: (short,), 1: (short, long), 2: (InvocationRecord(0, "short", False, 0.0),), 4: (long,)}
    return {
        "vanilla": [prediction(place, item[3]) for place, item in enumerate(ITEMS)],
        "vismem": [prediction(place, item[4], used.get(place, ())) for place, item in enumerate(ITEMS)],
        "short_only": [prediction(place, item[5]) for place, item in enumerate(ITEMS)],
    }


def recorded(predictions: dict[str, list[Prediction]], seed: int = 7, resamples: int = 500) -> Metrics:
    """The content of `metrics.json` for these predictions."""
    figures = summarise(
        predictions, {arm: SECONDS.get(arm, 0.02) for arm in predictions}, seed=seed, resamples=resamples
    )
    return Metrics(**figures, **HASHES)

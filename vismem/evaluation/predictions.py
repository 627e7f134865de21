"""One answered question of one arm, a row of `predictions/<arm>.parquet`, and where in it memory was invoked."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vismem.data.sample import Sample
from vismem.evaluation.answers import is_correct, read
from vismem.generation.types import LATENT, Rollout


@dataclass(frozen=True)
class InvocationRecord:
    """One memory invocation. `relative_position`: share of the answer's text tokens that stand before it, in [0, 1]."""

    position: int  # index in `Rollout.token_ids`
    kind: str  # "short" or "long"
    forced: bool
    relative_position: float


@dataclass(frozen=True)
class Prediction:
    """One question as one arm answered it. `score` is 1.0 or 0.0; `extracted` is None where nothing could be read."""

    id: str
    task: str
    capability: str
    source: str
    question: str
    reference: str
    text: str
    marked_text: str
    extracted: str | None
    rule: str
    score: float
    invocations: tuple[InvocationRecord, ...]
    answer_length: int
    finished: bool


SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.string()),
        ("capability", pa.string()),
        ("source", pa.string()),
        ("question", pa.string()),
        ("reference", pa.string()),
        ("text", pa.string()),
        ("marked_text", pa.string()),
        ("extracted", pa.string()),
        ("rule", pa.string()),
        ("score", pa.float64()),
        (
            "invocations",
            pa.list_(
                pa.struct(
                    [
                        ("position", pa.int64()),
                        ("kind", pa.string()),
                        ("forced", pa.bool_()),
                        ("relative_position", pa.float64()),
                    ]
                )
            ),
        ),
        ("answer_length", pa.int64()),
        ("finished", pa.bool_()),
    ]
)


def predict(sample: Sample, rollout: Rollout) -> Prediction:
    """Read and score a decoded answer. ValueError if the rollout is another sample's."""
    if rollout.sample_id != sample.id:
        raise ValueError(f"the answer to '{rollout.sample_id}' was paired with the question '{sample.id}'")
    found = read(sample, rollout.text)
    places = relative_positions(rollout)
    return Prediction(
        id=sample.id,
        task=sample.task,
        capability=sample.capability.value,
        source=sample.source,
        question=sample.question,
        reference=sample.answer,
        text=rollout.text,
        marked_text=rollout.marked_text,
        extracted=found.value,
        rule=found.rule,
        score=float(is_correct(sample, found)),
        invocations=tuple(
            InvocationRecord(event.position, event.kind.value, event.forced, place)
            for event, place in zip(rollout.invocations, places, strict=True)
        ),
        answer_length=rollout.answer_length,
        finished=rollout.finished,
    )


def relative_positions(rollout: Rollout) -> list[float]:
    """For every invocation, the share of the text's tokens before it (paper Fig. 9); 0.0 is the answer's start.

    Text tokens are all but the invoke tokens, the latents and the end token behind each memory.
    """
    starts = {event.position for event in rollout.invocations}
    ids = rollout.token_ids
    before: list[int] = []  # number of text tokens before each index
    count = 0
    inside = False  # between an invoke token and the end token of its memory
    for place, token in enumerate(ids):
        before.append(count)
        if place in starts:
            inside = True
        elif inside:
            inside = token == LATENT
        else:
            count += 1
    return [before[event.position] / max(count, 1) for event in rollout.invocations]


def write_predictions(predictions: Sequence[Prediction], path: Path) -> None:
    """Write one arm's predictions as Parquet (`SCHEMA`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([asdict(prediction) for prediction in predictions], schema=SCHEMA)
    pq.write_table(table, path, compression="zstd")


def read_predictions(path: Path) -> list[Prediction]:
    """Read what `write_predictions` wrote, in order."""
    rows = pq.read_table(path, schema=SCHEMA).to_pylist()
    for row in rows:
        row["invocations"] = tuple(InvocationRecord(**event) for event in row["invocations"])
    return [Prediction(**row) for row in rows]

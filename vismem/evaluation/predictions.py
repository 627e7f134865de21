"""One answered question of one arm, a row of `predictions_file`, and where in it memory was invoked."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from vismem.data.sample import Sample
from vismem.evaluation.answers import read_and_score
from vismem.generation.types import LATENT, Rollout
from vismem.records import portable


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
    visual_tokens: int = 0  # of the images and videos before the answer
    cluster: str = ""  # what it is drawn with, see `vismem.data.clusters`; empty in files of earlier versions

    @property
    def memories(self) -> list[str]:
        """The kind of each memory that it invoked."""
        return [event.kind for event in self.invocations]


_TYPES: dict[Any, Any] = {str: "string", str | None: "string", int: "int64", float: "float64", bool: "bool"}
_EVENT = pa.struct([(field.name, _TYPES[field.type]) for field in fields(InvocationRecord)])
_TYPES[tuple[InvocationRecord, ...]] = pa.list_(_EVENT)
SCHEMA = pa.schema([(field.name, _TYPES[field.type]) for field in fields(Prediction)])
_ROWS = TypeAdapter(list[Prediction])


def predict(sample: Sample, rollout: Rollout, cluster: str = "") -> Prediction:
    """Read and score a decoded answer. ValueError if the rollout is another sample's."""
    if rollout.sample_id != sample.id:
        raise ValueError(f"the answer to '{rollout.sample_id}' was paired with the question '{sample.id}'")
    found, score = read_and_score(sample, rollout.text)
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
        score=score,
        invocations=tuple(
            InvocationRecord(event.position, event.kind.value, event.forced, place)
            for event, place in zip(rollout.invocations, places, strict=True)
        ),
        answer_length=rollout.answer_length,
        visual_tokens=rollout.visual_tokens,
        finished=rollout.finished,
        cluster=cluster,
    )


def relative_positions(rollout: Rollout) -> list[float]:
    """For every invocation, the share of the text's tokens before it (paper Fig. 9); 0.0 is the answer's start.

    Text tokens are all but the invoke tokens, the latents and the end token behind each memory.
    """
    ids, is_text = rollout.token_ids, np.ones(len(rollout.token_ids), dtype=bool)
    for event in rollout.invocations:
        end = next((place for place in range(event.position + 1, len(ids)) if ids[place] != LATENT), len(ids))
        is_text[event.position : end + 1] = False
    count = max(int(is_text.sum()), 1)
    return [int(is_text[: event.position].sum()) / count for event in rollout.invocations]


def predictions_file(folder: Path, arm: str) -> Path:
    """The file of an arm's predictions in the output of `evaluate`."""
    return folder / "predictions" / f"{portable(arm)}.parquet"


def write_predictions(predictions: Sequence[Prediction], path: Path) -> None:
    """Write one arm's predictions as Parquet (`SCHEMA`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([asdict(prediction) for prediction in predictions], schema=SCHEMA)
    pq.write_table(table, path, compression="zstd")


def read_predictions(path: Path) -> list[Prediction]:
    """Read what `write_predictions` wrote, in order."""
    return _ROWS.validate_python(pq.read_table(path).to_pylist())

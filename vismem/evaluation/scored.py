"""Scored questions from files of any harness: `vismem evaluate`'s, lmms-eval's samples, VLMEvalKit's predictions.

A harness's own score of a question is taken where the file has one; VLMEvalKit's bare predictions are read and scored
by our rules (`vismem.evaluation.answers`).
"""

import csv
import io
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import pandas as pd
import pyarrow as pa
from pydantic import ValidationError

from vismem.data.readers.files import json_lines, require_columns
from vismem.data.sample import Sample, lettered, option_lines
from vismem.errors import UserError
from vismem.evaluation.answers import score
from vismem.evaluation.metrics import cluster_of
from vismem.evaluation.predictions import read_predictions

LMMS_FILE = re.compile(r"(?:.*_)?samples_(?P<task>.+)\.jsonl")
LMMS_KEYS = frozenset((
    "doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash", "input",
    "input_media",
))  # fmt: skip  # what a line holds besides the task's metrics
KIT_SCORES = ("hit", "score", "eval_score", "match")  # columns in which VLMEvalKit's files of results hold a score
FAILED = ("[LMMS_EVAL_REQUEST_FAILED", "Failed to obtain answer")  # how the harnesses' answers of failed calls begin


@dataclass(frozen=True)
class Scored:
    """A question and its score, 0 to 1. `cluster` is what it is drawn with; empty where the file does not say."""

    id: str
    benchmark: str
    reference: str
    score: float
    cluster: str


def read_scored(path: Path, metric: str | None = None, cluster: str | None = None) -> list[Scored]:
    """The questions of a file, in order. `metric`, `cluster`: the key or column of either, where the file has several.

    UserError, naming the place, for a file of another kind, a damaged one, one without a score, with a score outside
    of 0 to 1, or with answers that are failures of a server.
    """
    if not path.is_file():
        raise UserError(f"no file {path}: give files of answers, of `vismem evaluate`, lmms-eval or VLMEvalKit")
    match path.suffix:
        case ".parquet":
            rows = _own(path)
        case ".jsonl":
            rows = [*_lmms(path, metric, cluster)]
        case ".xlsx" | ".tsv" | ".csv" | ".json":
            rows = [*_kit(path, metric, cluster)]
        case _:
            raise UserError(
                f"{path}: no .parquet of `vismem evaluate`, .jsonl of lmms-eval, .xlsx, .tsv, .csv or .json"
            )
    if not rows:
        raise UserError(f"{path} holds no answers")
    return rows


def _own(path: Path) -> list[Scored]:
    try:
        answers = read_predictions(path)
    except (pa.ArrowException, ValidationError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is no file of predictions of `vismem evaluate`, or damaged: {reason}") from None
    return [Scored(a.id, a.source, a.reference, a.score, cluster_of(a)) for a in answers]


def _lmms(path: Path, metric: str | None, cluster: str | None) -> Iterator[Scored]:
    named = LMMS_FILE.fullmatch(path.name)
    if not named:
        raise UserError(f"{path}: lmms-eval calls its files DATE_samples_TASK.jsonl; keep the name, it says the task")
    for where, row in json_lines(path, ("doc_id", "filtered_resps")):
        _refuse_failure(row["filtered_resps"], where)
        found = {key: _number(value) for key, value in row.items() if key not in LMMS_KEYS}
        scores = {key: value for key, value in found.items() if value is not None and metric in (None, key)}
        if len(scores) != 1:
            raise UserError(
                f"{where}: {'several scores' if scores else 'no score'}, the line has {', '.join(found) or 'none'}: "
                "name a metric that is a number per question with --metric"
            )
        (value,) = scores.values()
        task = named["task"]
        own = f"{task}: {_text(row, cluster, where)}" if cluster else ""
        yield Scored(f"{task}-{row['doc_id']}", task, str(row.get("target", "")), _checked(value, where), own)


def _number(value: Any) -> float | None:
    """A score of lmms-eval: a number, or an object that has one as `score`."""
    value = value.get("score") if isinstance(value, dict) else value
    return float(value) if isinstance(value, int | float) else None


def _kit(path: Path, metric: str | None, cluster: str | None) -> Iterator[Scored]:
    rows = _table(path)
    columns = [*rows[0]] if rows else []
    require_columns(path, ("index", "answer", metric or "prediction", *([cluster] if cluster else [])), columns)
    held = metric or next((name for name in KIT_SCORES if name in columns), None)
    if held is None:
        require_columns(path, ("question",), columns)
    benchmark = _dataset(path)
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        _refuse_failure(row.get("prediction", ""), where)
        try:
            value = float(row[held]) if held else _by_our_rules(row)
        except ValueError:
            raise UserError(
                f"{where}: '{held}' is {row[str(held)]!r}, no number: the evaluation is incomplete"
            ) from None
        own = f"{benchmark}: {_text(row, cluster, where)}" if cluster else ""
        yield Scored(f"{benchmark}-{row['index']}", benchmark, row["answer"].strip(), _checked(value, where), own)


def _table(path: Path) -> list[dict[str, str]]:
    """The rows, all cells as text, empty ones as an empty text."""
    try:
        match path.suffix:
            case ".json":
                rows = json.loads(path.read_text("utf-8"))
            case ".xlsx":
                rows = pd.read_excel(path, dtype=str, keep_default_na=False).to_dict("records")
            case ending:
                csv.field_size_limit(sys.maxsize)
                text = path.read_bytes().decode("utf-8-sig")
                if not text.endswith("\n"):
                    raise ValueError("it ends within a row")
                lines = io.StringIO(text, newline="")
                rows = [*csv.DictReader(lines, delimiter="\t" if ending == ".tsv" else ",", strict=True)]
        if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
            raise ValueError("it is no list of objects")
        if any(row.keys() != rows[0].keys() or (None in row.values() and path.suffix != ".json") for row in rows):
            raise ValueError("its rows have different columns")
    except ImportError:
        raise UserError(f"{path}: `pip install openpyxl` reads .xlsx; or run VLMEvalKit with PRED_FORMAT=tsv") from None
    except Exception as error:  # noqa: BLE001 - whatever a reader stumbles over in a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is no table of VLMEvalKit, or damaged: {reason[:300]}") from None
    return [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]


def _dataset(path: Path) -> str:
    """The data set: VLMEvalKit writes MODEL/[RUN/]MODEL_DATASET[_JUDGE_result].xlsx."""
    for folder in path.absolute().parents[:2]:
        if path.stem.startswith(f"{folder.name}_"):
            return re.sub(r"_(?:[^_]+|exact_matching)_result$", "", path.stem.removeprefix(f"{folder.name}_"))
    raise UserError(f"{path}: VLMEvalKit keeps its files in a folder of the model's name; leave it there")


def _by_our_rules(row: Mapping[str, str]) -> float:
    options = [row.get(letter, "") for letter in ascii_uppercase]
    choices = tuple(options[: max((place for place, option in enumerate(options, 1) if option), default=0)])
    question = "\n".join((row["question"], *option_lines(lettered(choices))))
    return score(Sample(row["index"], (), question, row["answer"].strip(), choices), row["prediction"])


def _refuse_failure(answer: Any, where: str) -> None:
    if str(answer[0] if isinstance(answer, list) and answer else answer).startswith(FAILED):
        raise UserError(f"{where}: the answer is a failed request: have the harness ask it again")


def _checked(value: float, where: str) -> float:
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise UserError(f"{where}: the score {value:g} is not between 0 and 1: name another with --metric")
    return value


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    places: Sequence[Mapping[str, Any]] = [row, *(value for value in row.values() if isinstance(value, dict))]
    for place in places:
        if place.get(key) not in (None, ""):
            return str(place[key])
    raise UserError(f"{where}: no '{key}' to cluster by")

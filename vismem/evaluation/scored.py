"""Scored questions from files of any harness: `vismem evaluate`'s, lmms-eval's samples, VLMEvalKit's predictions.

A harness's own score of a question is taken where the file has one; VLMEvalKit's bare predictions are read and scored
by our rules (`vismem.evaluation.answers`).
"""

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import pandas as pd

from vismem.data.benchmarks import BY_FILE, counted, in_every_order, lists_texts
from vismem.data.readers.files import json_lines, require_columns
from vismem.data.readers.lmudata import reference
from vismem.data.sample import Sample, lettered, option_lines
from vismem.errors import UserError, first_line
from vismem.evaluation.answers import score
from vismem.evaluation.metrics import cluster_of
from vismem.evaluation.predictions import read_predictions

LMMS_FILE = re.compile(r"(?:.*_)?samples_(?P<task>.+)\.jsonl")
KIT_SCORES = ("hit", "score", "eval_score", "match")  # columns in which VLMEvalKit's files of results hold a score
GIVEN = ("doc_id", "target")  # numbers of lmms-eval's that are no score
TRUTHS = {"True": 1, "False": 0}
MARK = re.compile(r"<m_I\^([sl])>")  # of a memory in an answer of ours
RESULT = re.compile(r"_(?:auxmatch|gpt[^_]*|(?:[^_]+|exact_matching)_result)$")  # _gpt...: of a judge that gives points
FAILED = ("[LMMS_EVAL_REQUEST_FAILED", "Failed to obtain answer")  # how the harnesses' answers of failed calls begin


@dataclass(frozen=True)
class Scored:
    """An answered question and its score, 0 to 1. `cluster` is what it is drawn with.

    Empty where the file does not say: cluster, question. The answer is as it came; ours has its memories marked.
    """

    id: str
    benchmark: str
    reference: str
    score: float
    cluster: str
    question: str = ""
    marked_text: str = ""
    rule = ""  # by which it was read: not known

    @property
    def memories(self) -> list[str]:
        """The kind of each memory that its marks say it invoked, as a letter."""
        return MARK.findall(self.marked_text)


def read_scored(path: Path, metric: str | None = None, cluster: str | None = None) -> list[Scored]:
    """The questions of a file, in order. `metric`, `cluster`: the key or column of either, where the file has several.

    UserError, naming the place, for a file of another kind, a damaged one, one without a score, with a score outside
    of 0 to 1, or with answers that are failures of a server.
    """
    match path.suffix:
        case ".parquet":
            answers = _loaded(path, read_predictions)
            rows = [
                Scored(a.id, a.source, a.reference, a.score, cluster_of(a), a.question, a.marked_text) for a in answers
            ]
        case ".jsonl":
            rows = [*_lmms(path, metric, cluster)]
        case ".xlsx" | ".tsv" | ".json":
            rows = [*_kit(path, metric, cluster)]
        case _:
            raise UserError(f"{path}: no .parquet of `vismem evaluate`, .jsonl of lmms-eval, .xlsx, .tsv or .json")
    if not rows:
        raise UserError(f"{path} holds no answers")
    return rows


def _loaded(path: Path, read: Callable[[Path], list[Any]]) -> list[Any]:
    try:
        return read(path)
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except ImportError:
        raise UserError(f"{path}: `pip install openpyxl` reads .xlsx; or run VLMEvalKit with PRED_FORMAT=tsv") from None
    except Exception as error:  # noqa: BLE001 - whatever a reader stumbles over in a damaged file
        said = first_line(error)
        raise UserError(f"{path} is damaged, or of another kind than its name says: {said}") from None


def _lmms(path: Path, metric: str | None, cluster: str | None) -> Iterator[Scored]:
    named = LMMS_FILE.fullmatch(path.name)
    if not named:
        raise UserError(f"{path}: lmms-eval calls its files DATE_samples_TASK.jsonl; keep the name, it says the task")
    for where, row in json_lines(path, ("doc_id", "filtered_resps")):
        held = {key: cell.get("score") if isinstance(cell, dict) else cell for key, cell in row.items()}
        scores = {key: float(cell) for key, cell in held.items() if isinstance(cell, int | float) and key not in GIVEN}
        if metric or len(scores) != 1:
            scores = {key: cell for key, cell in scores.items() if key == metric}
        if not scores:
            raise UserError(f"{where}: no score, or several; it has {', '.join(row)}: name a metric with --metric")
        answer, (value,) = row["filtered_resps"], scores.values()
        answer = answer[0] if isinstance(answer, list) and answer else answer
        cells = {key: cell for held in row.values() if isinstance(held, dict) for key, cell in held.items()}
        cells |= row | {"index": row["doc_id"]}
        yield _scored(named["task"], cells, row.get("target"), answer, value, cluster, where)


def _kit(path: Path, metric: str | None, cluster: str | None) -> Iterator[Scored]:
    rows = _loaded(path, _table)
    columns = [*rows[0]] if rows else []
    held, benchmark = metric or next((name for name in KIT_SCORES if name in columns), None), _benchmark(path)
    if not held and benchmark in BY_FILE and BY_FILE[benchmark].judge:
        raise UserError(f"{path}: a judge model scores {benchmark}: give the file in which VLMEvalKit has its scores")
    if not held and {"res", "log"} <= {*columns}:
        raise UserError(
            f"{path}: VLMEvalKit's judge has read its answers and the file has no score of each: give the file of the "
            "bare predictions, which is read by our rules, or one with a score of each and name it with --metric"
        )
    if not held and in_every_order(benchmark):
        orders = f"VLMEvalKit asks a question of {benchmark} in several orders of its options"
        raise UserError(f"{path}: {orders}: give the file in which it has its scores")
    needed = ("index", "answer", "prediction", held or "question", *([cluster] if cluster else []))
    require_columns(path, needed, columns)
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        sample = _sample(row, benchmark)
        if not counted(sample):
            continue
        if not held and lists_texts(sample):
            rule = f"the answer is a list, and {benchmark} counts those by a rule of its own"
            raise UserError(f"{where}: {rule}: give the file in which VLMEvalKit has its scores")
        try:
            value = float(TRUTHS.get(row[held], row[held])) if held else score(sample, row["prediction"])
        except ValueError:
            raise UserError(f"{where}: '{held}' is no number but {row[str(held)]!r}: evaluate it to its end") from None
        yield _scored(benchmark, row, sample.answer, row["prediction"], value, cluster, where)


def _table(path: Path) -> list[dict[str, str]]:
    """The rows, all cells as text, empty ones as an empty text."""
    match path.suffix:
        case ".json":
            rows = json.loads(path.read_text("utf-8"))
        case ".xlsx":
            rows = pd.read_excel(path, dtype=str, keep_default_na=False).to_dict("records")
        case _:
            csv.field_size_limit(sys.maxsize)
            text = path.read_bytes().decode("utf-8-sig")
            if not text.endswith("\n"):
                raise ValueError("it ends within a row")
            rows = [*csv.DictReader(io.StringIO(text, newline=""), delimiter="\t", restval="\0", strict=True)]
    if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise ValueError("it is no list of objects")
    if any(row.keys() != rows[0].keys() or "\0" in row.values() for row in rows):
        raise ValueError("its rows have different columns")
    return [{key: "" if cell is None or cell != cell else str(cell) for key, cell in row.items()} for row in rows]


def _benchmark(path: Path) -> str:
    """The data set: VLMEvalKit writes MODEL/[RUN/]MODEL_DATASET.xlsx, and results behind it, see `RESULT`."""
    for folder in path.absolute().parents[:2]:
        if path.stem.startswith(f"{folder.name}_"):
            return RESULT.sub("", path.stem.removeprefix(f"{folder.name}_"))
    raise UserError(f"{path}: VLMEvalKit keeps its files in a folder of the model's name; leave it there")


def _sample(row: Mapping[str, str], benchmark: str) -> Sample:
    choices = tuple(row.get(letter, "") for letter in ascii_uppercase)
    question = "\n".join((row.get("question", ""), *option_lines(lettered(choices))))
    offered, part = choices if any(choices) else (), row.get("split", "").strip()
    return Sample("", (), question, reference(row), offered, source=benchmark, part=part)


def _scored(
    benchmark: str, row: Mapping[str, Any], reference: Any, answer: Any, value: float, cluster: str | None, where: str
) -> Scored:
    if str(answer).startswith(FAILED):
        raise UserError(f"{where}: the answer is a failed request: have the harness ask it again")
    if not 0 <= value <= 1:  # nor NaN
        raise UserError(f"{where}: the score {value:g} is not between 0 and 1: name another with --metric")
    if cluster and row.get(cluster) in (None, ""):
        raise UserError(f"{where}: no '{cluster}' to cluster by")
    together = f"{benchmark}: {row[cluster]}" if cluster else ""
    question = str(row.get("question") or row.get("input") or "")
    return Scored(f"{benchmark}-{row['index']}", benchmark, str(reference), value, together, question, str(answer))

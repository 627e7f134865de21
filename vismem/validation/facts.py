"""The facts that rules judge: one light row per sample, streamed from the shards; images are looked at and let go."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vismem.config import ValidateConfig
from vismem.data.answer_forms import answer_form, canonical
from vismem.data.clusters import named
from vismem.data.fingerprint import SPLITS, ImageFacts, image_cache, sample_sha256, seen_sha256
from vismem.data.parallel import in_order
from vismem.data.sample import SCHEMA, rows_of, shard_tables
from vismem.runtime.chat import one_turn, said
from vismem.runtime.reserved import Reserved
from vismem.validation.compared import compare
from vismem.validation.texts import MISSING, Named, choice_fault, encoding_fault, mark_fault, markup_fault

TEXT_COLUMNS = tuple(name for name in SCHEMA.names if pa.types.is_string(SCHEMA.field(name).type))


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a split. `fault` says what is wrong with its schema; None where nothing is."""

    split: str
    path: Path
    rows: int
    fault: str | None = None

    @property
    def name(self) -> str:
        """What people see: `train/part-00000`."""
        return f"{self.split}/{self.path.stem}"


def find_shards(folder: Path) -> list[Shard]:
    """The shards of every split below `folder`, in order of the splits' precedence, with their schemas checked."""
    return [_open_shard(split, path) for split in SPLITS for path in sorted((folder / split).glob("part-*.parquet"))]


def collect_facts(
    shards: Sequence[Shard], settings: ValidateConfig, reserved: Reserved, advance: Callable[[int], None]
) -> pd.DataFrame:
    """One row of facts for each sample of faultless shards, in the shards' order (a row's number is its index).

    `reserved` are the base's own tokens. `advance` is called with the number of rows done.
    Columns: split, shard (index into `shards`), position (row in the shard); those of `row_facts`; and, as places of
    other rows: duplicate_of (the first row with the id), copy_of (with the same images, question and answer), conflict
    (a row with the same images and question and another answer), near_leak (a row of a split of higher precedence with
    an image that looks like one of these), asked_in (one that asks and answers the same besides); and leak (the split
    of higher precedence that has one of the images, or the group). What does not apply or is not known is missing.
    """
    examine = image_cache(settings.max_pixels)

    def judged(group: _Group) -> list[dict[str, Any]]:
        own = {"split": shards[group.shard].split, "shard": group.shard}
        numbered = enumerate(rows_of(group.rows), start=group.start)
        return [own | {"position": place} | row_facts(row, examine, reserved) for place, row in numbered]

    def rows() -> Iterator[dict[str, Any]]:
        for facts in in_order(judged, _groups(shards)):
            advance(len(facts))
            yield from facts

    parts = [_table(of_shard) for _, of_shard in groupby(rows(), key=itemgetter("shard"))]
    table = pd.concat([_table(()), *parts], ignore_index=True)
    facts = compare(table, [shard.name for shard in shards], settings.near_duplicate)
    return table.drop(columns=["looks", "tied"]).assign(
        **{name: column.astype(object) for name, column in facts.items()}
    )


def read_rows(path: Path, positions: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Some rows of a shard by their position, reading only the row groups that hold them."""
    wanted, start = set(positions), 0
    found: dict[int, dict[str, Any]] = {}
    file = pq.ParquetFile(path)
    for group in range(file.num_row_groups):
        end = start + file.metadata.row_group(group).num_rows
        here = sorted(position for position in wanted if start <= position < end)
        if here:
            rows = file.read_row_group(group).take([position - start for position in here]).to_pylist()
            found.update(zip(here, rows, strict=True))
        start = end
    return found


_COMPARED = ("image_hashes", "tied", "looks", "asked", "sha256")  # only by which rows are compared
_COLUMNS = {
    **dict.fromkeys(("shard", "position", "id_chars", "images", "videos", "choices"), "int64"),
    **dict.fromkeys(("question_chars", "answer_chars"), "int64"),
    **dict.fromkeys(("min_side", "max_side", "aspect", "contrast", "brightness"), "float64"),  # missing without a size
    **dict.fromkeys(("split", "id", "question", "answer", "value", "task", "capability", "source"), "object"),
    **dict.fromkeys(("null_fault", "token_fault", "image_fault", "mark_fault", "encoding_fault"), "object"),
    **dict.fromkeys(("markup_fault", "choice_fault", "answer_fault", "answer_listed"), "object"),
    **dict.fromkeys(_COMPARED, "object"),
}
FOUND_IN_OTHERS = ("duplicate_of", "copy_of", "conflict", "leak", "near_leak", "asked_in")
KEPT = {*_COLUMNS, *FOUND_IN_OTHERS} - {*_COMPARED}  # what is saved, and rules ask of


def _table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=list(_COLUMNS), dtype=object).astype(_COLUMNS)


def _open_shard(split: str, path: Path) -> Shard:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        return Shard(split, path, 0, f"not a readable Parquet file ({error})")
    faults = []
    for field in SCHEMA:
        if field.name not in file.schema_arrow.names:
            faults.append(f"no column '{field.name}'")
        elif (kind := file.schema_arrow.field(field.name).type) != field.type:
            faults.append(f"column '{field.name}' is {kind}, not {field.type}")
    faults += [f"unknown column '{name}'" for name in file.schema_arrow.names if name not in SCHEMA.names]
    return Shard(split, path, file.metadata.num_rows, "; ".join(faults) or None)


class _Group(NamedTuple):
    """A row group: the number of its shard, the position of its first row there, its rows."""

    shard: int
    start: int
    rows: pa.Table


def _groups(shards: Sequence[Shard]) -> Iterator[_Group]:
    for number, shard in enumerate(shards):
        start = 0
        for table in shard_tables(shard.path):
            yield _Group(number, start, table)
            start += len(table)


def row_facts(
    row: Mapping[str, Any], examine: Callable[[bytes], ImageFacts], reserved: Reserved | None
) -> dict[str, Any]:
    """The facts that a row of `SCHEMA` has by itself, whatever the other rows are. `reserved`: the base's, if known.

    id, question, answer, task, capability, source: as the row has them. id_chars, question_chars, answer_chars; images,
    videos, choices: how many (videos are not looked at). null_fault (names of null columns), token_fault (the base's
    own), image_fault, mark_fault, encoding_fault, markup_fault, choice_fault, answer_fault: in words. min_side,
    max_side (pixels), aspect (the largest ratio of sides), contrast (the smallest range of values of an image, 0 to
    255), brightness (their mean value), image_hashes, looks (of those that decode), tied (they and the row's group),
    value (one text for all answers that score as this one does), answer_listed (it names a choice), asked (what
    identifies images, question and choices), sha256.
    """
    images = [examine(data or b"") for data in row["images"] or ()]
    sizes = [(facts.width, facts.height) for facts in images if facts.width]
    faults = [f"image {n} of {len(images)}: {facts.fault}" for n, facts in enumerate(images, start=1) if facts.fault]
    good = [facts for facts in images if facts.fault is None]
    looks = b"".join(facts.look for facts in good)
    nulls = [f"'{name}'" for name in TEXT_COLUMNS if row[name] is None]
    answer, question = row["answer"] or "", row["question"] or ""
    choices = tuple(choice or "" for choice in row["choices"] or ())
    value = canonical(answer_form(question, answer, choices), answer)
    hashes = tuple(seen_sha256(images, ()))
    texts = [("question", said(one_turn(question, len(images)))), ("answer", answer), ("rationale", row["rationale"])]
    texts += [("choices", choice) for choice in choices]
    tokens = _tokens_of_the_base(texts, reserved) if reserved else None
    asked = repr((hashes, " ".join(question.split()), sorted(choices))).encode("utf-8", "surrogatepass")
    return {
        "id": row["id"] or "",
        "id_chars": len((row["id"] or "").strip()),
        "null_fault": ", ".join(nulls) or None,
        "token_fault": tokens,
        "images": len(images),
        "videos": len(row["videos"] or ()),
        "image_fault": "; ".join(faults) or None,
        "min_side": min(map(min, sizes), default=None),
        "max_side": max(map(max, sizes), default=None),
        "aspect": max((max(size) / min(size) for size in sizes if min(size)), default=None),
        "contrast": min((facts.contrast for facts in good if facts.look), default=None),
        "brightness": sum(looks) / len(looks) if looks else None,
        "image_hashes": hashes,
        "tied": (*hashes, *named(row["source"] or "", row["cluster"] or "")),
        "looks": tuple(facts.look for facts in good),
        "question": question,
        "question_chars": len(question.strip()),
        "choices": sum(map(bool, choices)),
        "answer": answer,
        "answer_chars": len(answer.strip()),
        "value": value,
        "answer_listed": value is not None if any(choices) else None,
        "mark_fault": mark_fault(question, len(images)),
        "encoding_fault": encoding_fault(texts),
        "markup_fault": None if tokens else markup_fault(texts),  # the base's own are named already
        "choice_fault": choice_fault(choices),
        "answer_fault": answer if answer.strip().casefold() in MISSING and not any(choices) else None,
        "task": row["task"] or "",
        "capability": row["capability"] or "",
        "source": row["source"] or "",
        "asked": hashlib.sha256(asked).digest() if images and len(hashes) == len(images) else None,
        "sha256": sample_sha256(row),
    }


def _tokens_of_the_base(texts: Named, reserved: Reserved) -> str | None:
    """The first of the base's own tokens in each text that a prompt or a reference answer is made of."""
    found = {name: token for name, text in texts if text and (token := reserved.find(text))}
    return ", ".join(f"{token} in '{name}'" for name, token in found.items()) or None

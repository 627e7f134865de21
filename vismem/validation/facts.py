"""The facts that rules judge: one light row per sample, streamed from the shards; images are looked at and let go."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vismem.data.answer_forms import answer_form, reference_value
from vismem.data.fingerprint import SPLITS, ImageFacts, image_cache, sample_sha256, seen_sha256
from vismem.data.sample import SCHEMA, iterate_rows
from vismem.runtime.chat import one_turn, said
from vismem.runtime.reserved import Reserved

TEXT_COLUMNS = tuple(name for name in SCHEMA.names if pa.types.is_string(SCHEMA.field(name).type))
BATCH = 64  # rows between two signs of progress


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
    shards: Sequence[Shard], max_side: int, reserved: Reserved, advance: Callable[[int], None]
) -> pd.DataFrame:
    """One row of facts for each sample of faultless shards, in the shards' order (a row's number is its index).

    `reserved` are the base's own tokens. `advance` is called with the number of rows done, from several threads.
    Columns: split, shard (index into `shards`), position (row in the shard), id, id_chars, null_fault (names of null
    columns), token_fault (the base's own tokens in texts), duplicate_of (place of the first row with the id), images
    and videos (how many), image_fault, min_side, max_side (pixels), image_hashes, leak (the split of higher precedence
    that shows one of the images), question_chars, answer, answer_chars, answer_listed (names a choice), task,
    capability, sha256. What does not apply or is not known is missing.
    """
    # Decoding and hashing release the interpreter lock, so threads do for large images, and cost nothing for small.
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        numbered = enumerate(shards)
        read = partial(_shard_facts, max_side=max_side, reserved=reserved, advance=advance)
        parts = list(pool.map(lambda item: _table(read(item[1], item[0])), numbered))
    table = pd.concat([_table(()), *parts], ignore_index=True)
    facts = {"duplicate_of": _duplicates(table, shards), "leak": _leaks(table)}
    return table.assign(**{name: column.astype(object) for name, column in facts.items()})


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


_COLUMNS = {
    **dict.fromkeys(("shard", "position", "id_chars", "images", "videos", "question_chars", "answer_chars"), "int64"),
    **dict.fromkeys(("min_side", "max_side"), "float64"),  # missing where no image has a size
    **dict.fromkeys(("split", "id", "answer", "task", "capability", "sha256"), "object"),
    **dict.fromkeys(("null_fault", "token_fault", "image_fault", "image_hashes", "answer_listed"), "object"),
}


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


def _shard_facts(
    shard: Shard, number: int, max_side: int, reserved: Reserved, advance: Callable[[int], None]
) -> Iterator[dict[str, Any]]:
    examine = image_cache(max_side)
    for position, row in enumerate(iterate_rows(shard.path)):
        yield {"split": shard.split, "shard": number, "position": position} | row_facts(row, examine, reserved)
        if (position + 1) % BATCH == 0:
            advance(BATCH)
    advance(shard.rows % BATCH)


def row_facts(
    row: Mapping[str, Any], examine: Callable[[bytes], ImageFacts], reserved: Reserved | None
) -> dict[str, Any]:
    """The facts that a row of `SCHEMA` has by itself, whatever the other rows are; see `collect_facts`.

    Videos are counted, not looked at. `reserved`: None where the base's tokenizer is not known.
    """
    images = [examine(data or b"") for data in row["images"] or ()]
    sides = [side for facts in images if facts.width for side in (facts.width, facts.height)]
    faults = [f"image {n} of {len(images)}: {facts.fault}" for n, facts in enumerate(images, start=1) if facts.fault]
    nulls = [f"'{name}'" for name in TEXT_COLUMNS if row[name] is None]
    answer, question = row["answer"] or "", row["question"] or ""
    choices = tuple(choice or "" for choice in row["choices"] or ())
    listed = reference_value(answer_form(question, answer, choices), answer) is not None  # as scoring reads it
    return {
        "id": row["id"] or "",
        "id_chars": len((row["id"] or "").strip()),
        "null_fault": ", ".join(nulls) or None,
        "token_fault": _tokens_of_the_base(row, reserved) if reserved else None,
        "images": len(images),
        "videos": len(row["videos"] or ()),
        "image_fault": "; ".join(faults) or None,
        "min_side": min(sides, default=None),
        "max_side": max(sides, default=None),
        "image_hashes": tuple(seen_sha256(images, ())),
        "question_chars": len(question.strip()),
        "answer": answer,
        "answer_chars": len(answer.strip()),
        "answer_listed": listed if any(choices) else None,
        "task": row["task"] or "",
        "capability": row["capability"] or "",
        "sha256": sample_sha256(row),
    }


def _tokens_of_the_base(row: Mapping[str, Any], reserved: Reserved) -> str | None:
    """The first of the base's own tokens in each text that a prompt or a reference answer is made of."""
    asked = said(one_turn(row["question"] or "", len(row["images"] or ())))
    texts = [("question", asked), ("answer", row["answer"]), ("rationale", row["rationale"])]
    texts += [("choices", choice) for choice in row["choices"] or ()]
    found = {name: token for name, text in texts if text and (token := reserved.find(text))}
    return ", ".join(f"{token} in '{name}'" for name, token in found.items()) or None


def _duplicates(table: pd.DataFrame, shards: Sequence[Shard]) -> pd.Series:
    """The place of the first row with the same id; missing where a row is the first, or has none."""
    places = zip(table["shard"], table["position"], strict=True)
    place = pd.Series([f"{shards[shard].name} row {position}" for shard, position in places], dtype=object)
    return place.groupby(table["id"]).transform("first").where(table["id"].duplicated() & (table["id"] != ""))


def _leaks(table: pd.DataFrame) -> pd.Series:
    """The first other split, of higher precedence, that shows one of a row's images; missing where none does."""
    shown = table[["split", "image_hashes"]].explode("image_hashes").dropna()
    owner = shown.groupby("image_hashes", sort=False)["split"].transform("first")  # in order of precedence
    others = owner[owner != shown["split"]]
    return others[~others.index.duplicated()]

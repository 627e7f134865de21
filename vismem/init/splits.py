"""Which question goes into which split: no image, and no group, is ever in two of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from vismem.config.data import Split
from vismem.data.clusters import claim, joined
from vismem.errors import UserError
from vismem.init.rows import Row

SHARES: dict[Split, float] = {"test": 0.2, "validation": 0.1}  # of the rows that are not in a split yet
ORDER: tuple[Split, ...] = ("train", "validation", "test")  # the last keeps its images, see `prepare`
MOST: dict[Split, int] = {"test": 2000, "validation": 500}  # rows; more only take time

Group = list[Row]


@dataclass(frozen=True)
class Splits:
    """The rows of each split in the order that they were read in, and what was left out."""

    rows: dict[Split, list[Row]]
    made: tuple[Split, ...]  # splits that were chosen here, not named by the data
    leaks: tuple[str, ...]  # rows left out, one line each: their image is in another split


def split_rows(rows: Sequence[Row], seed: int) -> Splits:
    """Choose a test and a validation split where the data names none; the rest is for training.

    The groups of rows that share images are put in order by a hash of their images and of `seed`, and the first of
    them are taken: the same data gives the same splits. Where the data names splits, a row whose image an earlier one
    of test, validation, train has is left out, as `prepare` does it. UserError where there are too few images.
    """
    chosen, leaks = _without_leaks(rows)
    made = tuple(split for split in SHARES if not chosen[split])
    groups = sorted(grouped(chosen["train"]), key=lambda group: _hash(group, seed))
    if len(groups) <= len(made):
        raise UserError(
            f"{len(groups)} different images, or groups of rows that share one, cannot be split into "
            f"{', '.join((*made, 'train'))}: at least {len(made) + 1} are needed; or name files with --test and "
            "--validation"
        )
    place, rest = {id(row): n for n, row in enumerate(rows)}, len(chosen["train"])
    for leave, split in zip(range(len(made), 0, -1), made, strict=True):
        chosen[split], groups = _take(groups, min(MOST[split], round(SHARES[split] * rest)), leave)
    chosen["train"] = [row for group in groups for row in group]
    ordered = {split: sorted(chosen[split], key=lambda row: place[id(row)]) for split in ORDER}
    return Splits(ordered, made, tuple(leaks))


def _without_leaks(rows: Sequence[Row]) -> tuple[dict[Split, list[Row]], list[str]]:
    """The rows by the split that they name, train where they name none, but for those whose image is in an earlier."""
    chosen, leaks, owners = dict[Split, list[Row]](), list[str](), dict[str, str]()
    for split in reversed(ORDER):
        chosen[split] = []
        for row in (row for row in rows if (row.split or "train") == split):
            if other := claim(owners, split, _keys(row)):
                leaks.append(f"{row.where}: left out of {split}, its image or group is in {other}")
            else:
                chosen[split].append(row)
    return chosen, leaks


def _keys(row: Row) -> list[str]:
    """What ties a row to others: the hashes of its images, and its group's name; of one with neither, its id."""
    group = [f"group {row.sample.cluster}"] if row.sample.cluster else []
    return [*(digest.hex() for digest in row.pictures), *group] or [f"row {row.values['id']}"]


def grouped(rows: Sequence[Row]) -> list[Group]:
    """The rows, those together that share a key, also over others."""
    groups: dict[str, Group] = {}
    for row, cluster in zip(rows, joined([_keys(row) for row in rows]), strict=True):
        groups.setdefault(cluster, []).append(row)
    return list(groups.values())


def _hash(group: Group, seed: int) -> str:
    """Where the group stands in the order: from its smallest image, whatever the order of its rows."""
    first = min((picture for row in group for picture in row.pictures), default=group[0].sample.question.encode())
    return hashlib.sha256(f"{seed}/".encode() + first).hexdigest()


def _take(groups: Sequence[Group], wanted: int, leave: int) -> tuple[list[Row], list[Group]]:
    """The first groups that together have at most `wanted` rows, at least the smallest; and `leave` groups or more."""
    taken: dict[int, Group] = {}
    count = 0
    for group in groups:
        if len(taken) + leave < len(groups) and count + len(group) <= wanted:
            taken[id(group)] = group
            count += len(group)
    if not taken:
        smallest = min(groups, key=len)
        taken[id(smallest)] = smallest
    return [row for group in taken.values() for row in group], [g for g in groups if id(g) not in taken]

"""The facts that a row has beside other rows: what is there twice, contradicts itself, or is in two splits.

Images are compared by their pixels' hash, and by small copies (`ImageFacts.look`), in a k-d tree instead of all pairs.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from vismem.data.fingerprint import SPLITS
from vismem.runtime.images import LOOK

CHUNK = 4096  # images that are looked up at once
ALIKE = 8  # of the images that look like another, those that look most like it
_CELLS = np.arange(LOOK * LOOK * 3).reshape(LOOK, LOOK, 3)
# The places of a small copy's values in what it is turned and mirrored; as it stands first.
TURNED = [np.rot90(side, quarters).ravel() for side in (_CELLS, _CELLS[:, ::-1]) for quarters in (0, 3, 2, 1)]


def compare(table: pd.DataFrame, shards: Sequence[str], levels: int) -> dict[str, pd.Series]:
    """The columns of `collect_facts` that compare rows, which are in the splits' order of precedence.

    `shards`: their names; `levels`: the largest difference of two images that look alike, 0 to 255; 0: not asked.
    """
    rows = zip(table["shard"], table["position"], strict=True)
    place = pd.Series([f"{shards[shard]} row {position}" for shard, position in rows], index=table.index, dtype=object)
    near_leak, asked_in = _near_leaks(table, place, levels)
    return {
        "duplicate_of": _first(place, [table["id"]], table["id"] != ""),
        "copy_of": _first(place, [table["asked"], table["value"]], table["asked"].notna()),
        "conflict": _conflicts(table, place),
        "leak": _leaks(table),
        "near_leak": near_leak,
        "asked_in": asked_in,
    }


def _first(place: pd.Series, keys: list[pd.Series], asked: pd.Series) -> pd.Series:
    """The place of the first row with the same keys; missing where a row is the first, or not asked."""
    keys = [key[asked] for key in keys]
    again = pd.concat(keys, axis=1).duplicated()
    return place[asked].groupby(keys, sort=False).transform("first")[again]


def _conflicts(table: pd.DataFrame, place: pd.Series) -> pd.Series:
    """Where the same question about the same images is answered otherwise, for each row of such a question."""
    asked = table.loc[table["asked"].notna() & table["value"].notna(), ["asked", "value"]]
    first = asked.groupby("asked", sort=False)["value"].transform("first")
    begins = place[asked.index].groupby(asked["asked"], sort=False).transform("first")
    other = asked[asked["value"] != first].drop_duplicates("asked")  # the first row with another answer
    elsewhere = asked["asked"].map(dict(zip(other["asked"], place[other.index], strict=True)))
    return elsewhere.where(asked["value"] == first, begins)


def _leaks(table: pd.DataFrame) -> pd.Series:
    """The first other split, of higher precedence, that has one of a row's images or its group; missing without one."""
    had = table[["split", "tied"]].explode("tied").dropna()
    owner = had.groupby("tied", sort=False)["split"].transform("first")  # in order of precedence
    others = owner[owner != had["split"]]
    return others[~others.index.duplicated()]


def _near_leaks(table: pd.DataFrame, place: pd.Series, levels: int) -> tuple[pd.Series, pd.Series]:
    """Where another split, of higher precedence, shows an image that looks like one of a row's; and asks the same."""
    shown = table[["split", "image_hashes", "looks"]].explode(["image_hashes", "looks"]).dropna()
    shown = shown.set_axis(["split", "image", "look"], axis=1)
    alike = _alike(shown.drop_duplicates("image"), levels) if levels else {}
    shown["like"] = shown["image"].map({image: others[0] for image, others in alike.items()})
    near = shown.dropna().groupby(level=0).first()
    asked_so = zip(table["question"], table["value"], strict=True)
    words = [f"{' '.join(question.casefold().split())}\n{value}" for question, value in asked_so]
    shows, asks = dict[bytes, str](), dict[tuple[bytes, str], str]()  # the first row with an image; and with the words
    for row, image in shown.loc[shown["image"].isin({*chain(*alike.values())}), "image"].items():
        shows.setdefault(image, place[row])
        asks.setdefault((image, words[row]), place[row])
    asked = {
        row: next((asks[like, words[row]] for like in alike[image] if (like, words[row]) in asks), None)
        for row, image in near["image"].items()
    }
    return near["like"].map(shows), pd.Series(asked, dtype=object)


def _alike(images: pd.DataFrame, levels: int) -> dict[bytes, list[bytes]]:
    """Image -> those of an earlier split that look most like it, ALIKE at most of each turn, as far as they do.

    The one that looks most like it comes first, and those that do as they stand before those that do turned by quarters
    or mirrored. Images whose small copy is almost of one colour are left out: nothing can be seen in it.
    """
    looks = images.loc[images["look"].str.len() > 0]
    cells: NDArray[np.uint8] = np.frombuffer(b"".join(looks["look"]), np.uint8).reshape(-1, LOOK * LOOK, 3)
    clear = np.ptp(cells, axis=1).max(axis=1) > 2 * levels
    looks, cells = looks[clear], cells[clear].reshape(-1, LOOK * LOOK * 3)
    hashes, rank = looks["image"].to_numpy(), looks["split"].map(SPLITS.index).to_numpy()
    alike: dict[bytes, list[bytes]] = defaultdict(list)
    for number in range(1, len(SPLITS)):
        earlier, later = np.flatnonzero(rank < number), np.flatnonzero(rank == number)
        if not len(earlier):
            continue
        tree = cKDTree(cells[earlier])
        for start in range(0, len(later), CHUNK):
            chunk = later[start : start + CHUNK]
            for turn in TURNED:
                turned = cells[chunk][:, turn]
                _, nearest = tree.query(turned, k=range(1, ALIKE + 1), p=np.inf, distance_upper_bound=levels + 0.5)
                for image, others in zip(chunk, nearest, strict=True):
                    if len(found := hashes[earlier[others[others < len(earlier)]]]):
                        alike[hashes[image]] += found.tolist()
    return alike

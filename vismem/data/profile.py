"""What a model was trained on, and how it answered when it was evaluated: what `vismem drift` compares requests with.

Distributions are exact: each value that occurs, with how often it does.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from vismem.data.revisions import DataRevision
from vismem.records import Record

Counts = Mapping[int, int]  # value -> how often it occurs


class Profile(Record, file="profile.json", step="validate"):
    """`profile.json` of `validate`: the clean training rows, each question about the same images once."""

    format: Literal[1]
    question_length: Counts  # characters
    image_min_side: Counts  # pixels, of different images; of several in a row the smallest
    image_max_side: Counts  # the largest
    brightness: Counts  # mean of all pixels' values, 0 to 255
    words: tuple[str, ...]  # of all questions
    unseen_words: Counts  # 1: the row has a word that no other row has, 0: it has none
    repeats: Counts  # how often a question about the same images is there


@dataclass(frozen=True)
class Trained:
    """A registered version, as far as requests are compared with it."""

    version: str
    manifest_sha256: str  # of its bundle
    profile: Profile
    answer_length: Counts  # tokens of the answers that it was evaluated by
    memories: Counts  # invoked in each of them
    newer_data: str | None  # why there is a newer version of other data, if there is
    revisions: tuple[DataRevision, ...]  # of its data, as far as DVC keeps it


def counts(values: Iterable[float]) -> dict[int, int]:
    """How often each value occurs, rounded, in order."""
    return dict(sorted(Counter(round(value) for value in values).items()))


def words_of(question: str) -> set[str]:
    """The different words of a question."""
    return set(re.findall(r"\w+", question.casefold()))


def profile_of(rows: pd.DataFrame) -> Profile:
    """The profile of rows of `validation.facts.collect_facts`; those without images that decode are left out."""
    rows = rows.dropna(subset=["asked"])
    once = rows.drop_duplicates("asked")
    images = rows.drop_duplicates("image_hashes")
    spoken = [words_of(question) for question in once["question"]]
    used = Counter(word for words in spoken for word in words)
    return Profile(
        format=1,
        question_length=counts(once["question_chars"]),
        image_min_side=counts(images["min_side"]),
        image_max_side=counts(images["max_side"]),
        brightness=counts(images["brightness"].dropna()),  # unknown where an image was too large to decode
        words=tuple(sorted(used)),
        unseen_words=counts(any(used[word] == 1 for word in words) for words in spoken),
        repeats=counts(rows["asked"].value_counts()),
    )

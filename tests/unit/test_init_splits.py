"""Splits of a user's rows: no image and no group in two of them, the same again, shares as stated."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vismem.config.data import Split
from vismem.data.sample import Sample
from vismem.errors import UserError
from vismem.init.rows import Row
from vismem.init.splits import MOST, ORDER, Splits, split_rows


def row(number: int, *pictures: int, group: str | None = None, split: Split | None = None) -> Row:
    hashes = tuple(b"%d" % picture for picture in pictures)
    sample = Sample(str(number), (), "?", "a", cluster=group or "")
    return Row(f"line {number}", {"id": str(number)}, split, sample, hashes, ((84, 84),))


def keys(splits: Splits) -> list[set[object]]:
    return [{key for row in of for key in (*row.pictures, row.sample.cluster) if key} for of in splits.rows.values()]


ROWS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 30), min_size=1, max_size=3),
        st.sampled_from([None, None, None, "g", "h"]),
        st.sampled_from([None, None, None, "train", "validation", "test"]),
    ),
    min_size=4,
    max_size=60,
)


@settings(max_examples=100, deadline=None)
@given(ROWS, st.integers(0, 3))
def test_no_image_and_no_group_is_ever_in_two_splits_and_no_row_is_lost(
    drawn: list[tuple[list[int], str | None, Split | None]], seed: int
) -> None:
    rows = [row(n, *pictures, group=group, split=split) for n, (pictures, group, split) in enumerate(drawn)]
    try:
        made = split_rows(rows, seed)
    except UserError:
        return  # too few images
    train, validation, test = keys(made)
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert all(made.rows.values())
    assert sum(map(len, made.rows.values())) + len(made.leaks) == len(rows)
    for name, kept in made.rows.items():
        assert kept == [one for one in rows if one in kept], "in the order that they were read in"
        assert all(one.split == name for one in kept if one.split in ("validation", "test"))


@pytest.mark.parametrize(("rows", "sizes"), [(3, (1, 1, 1)), (60, (42, 6, 12)), (1000, (700, 100, 200))])
def test_a_fifth_is_for_testing_and_a_tenth_for_validation(rows: int, sizes: tuple[int, int, int]) -> None:
    made = split_rows([row(n, n) for n in range(rows)], 0)
    assert tuple(len(made.rows[split]) for split in ORDER) == sizes
    assert made.made == ("test", "validation")


def test_of_very_many_rows_no_more_are_tested_than_time_is_worth() -> None:
    made = split_rows([row(n, n) for n in range(20_000)], 0)
    assert (len(made.rows["test"]), len(made.rows["validation"])) == (MOST["test"], MOST["validation"])


def test_the_split_depends_on_the_images_and_the_seed_and_not_on_the_order_of_the_rows() -> None:
    rows = [row(n, n) for n in range(60)]
    shuffled = random.Random(1).sample(rows, len(rows))
    assert keys(split_rows(rows, 0)) == keys(split_rows(shuffled, 0))
    assert keys(split_rows(rows, 0)) != keys(split_rows(rows, 1))


def test_named_splits_stay_and_a_row_whose_image_is_tested_is_left_out_of_training() -> None:
    rows = [row(1, 1, split="test"), row(2, 1), row(3, 2, split="validation"), row(4, 3), row(5, 2, 4, group="g")]
    made = split_rows([*rows, row(6, 5, group="g", split="test")], 0)
    assert made.made == ()
    named = {split: [one.where for one in kept] for split, kept in made.rows.items()}
    assert named == {"train": ["line 4"], "validation": ["line 3"], "test": ["line 1", "line 6"]}
    assert made.leaks == (
        "line 2: left out of train, its image or group is in test",
        "line 5: left out of train, its image or group is in validation",
    )


def test_one_large_group_cannot_take_a_split_s_place() -> None:
    rows = [row(n, 1) for n in range(98)] + [row(98, 2), row(99, 3)]
    made = split_rows(rows, 0)
    assert tuple(len(made.rows[split]) for split in ORDER) == (98, 1, 1)


def test_too_few_images_are_refused_with_what_is_needed() -> None:
    with pytest.raises(
        UserError, match=r"1 different images.*cannot be split into test, validation, train: at least 3"
    ):
        split_rows([row(1, 1), row(2, 1)], 0)

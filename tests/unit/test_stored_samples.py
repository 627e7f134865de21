"""Samples that are read from their shards as they are asked for are those that were written."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from vismem.data import sample as module
from vismem.data.sample import Sample, StoredSamples, Video, write_shards
from vismem.errors import UserError

ROWS = [
    Sample(str(n), (bytes([n]) * 1000,), "?", "a", choices=("a", "b")[: n % 3], videos=(Video((b"v",), 2.0),) * (n % 2))
    for n in range(23)
]


@pytest.fixture(params=[1, 3000, 2**28], ids=["one row group is kept", "a few are kept", "all are kept"])
def stored(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "CACHED_BYTES", request.param)
    write_shards(ROWS, tmp_path, rows_per_shard=5)
    return tmp_path


def test_a_stored_split_is_the_sequence_that_was_written(stored: Path) -> None:
    samples = StoredSamples(stored)
    assert len(samples) == 23
    assert list(samples) == ROWS
    assert [samples[place] for place in (22, 0, 7, 7, -1, -23)] == [ROWS[place] for place in (22, 0, 7, 7, -1, -23)]
    assert samples[3:12] == ROWS[3:12]
    assert samples[::-4] == ROWS[::-4]
    for place in (23, -24):
        with pytest.raises(IndexError):
            samples[place]


def test_some_places_of_a_split_are_a_sequence_too(stored: Path) -> None:
    places = [20, 4, 4, 11]
    samples = StoredSamples(stored, places)
    assert list(samples) == [ROWS[place] for place in places]
    assert samples[1:] == [ROWS[place] for place in places[1:]]


def test_a_share_has_the_first_rows_of_each_source(tmp_path: Path) -> None:
    sources = ["a"] * 12 + ["b"] * 6 + ["c"] * 2
    write_shards([replace(ROWS[n], source=source) for n, source in enumerate(sources)], tmp_path, rows_per_shard=5)
    samples = StoredSamples(tmp_path)
    assert [sample.id for sample in samples.share(10)] == [str(n) for n in (0, 1, 2, 3, 4, 5, 12, 13, 14, 18)]
    assert list(samples.share(20)) == list(samples.share(99)) == list(samples)
    only = StoredSamples(tmp_path, range(2, 12))
    assert [sample.id for sample in only.share(3)] == ["2", "3", "4"], "one source: its first rows"
    assert list(only.share(0)) == []


def test_an_empty_split_has_no_samples_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    write_shards([], tmp_path / "empty")
    assert list(StoredSamples(tmp_path / "empty")) == []
    with pytest.raises(UserError, match="run `vismem prepare`"):
        StoredSamples(tmp_path)


def test_what_was_read_last_is_kept_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = [Sample(str(n), (bytes(100_000),), "?", "a") for n in range(20)]
    write_shards(large, tmp_path, rows_per_shard=2)
    monkeypatch.setattr(module, "CACHED_BYTES", 500_000)
    before, samples = pa.total_allocated_bytes(), StoredSamples(tmp_path)
    assert [sample.id for sample in samples] == [sample.id for sample in large]
    assert 300_000 < pa.total_allocated_bytes() - before < 900_000


def test_a_damaged_shard_is_one_line_that_names_it(tmp_path: Path) -> None:
    write_shards(ROWS, tmp_path)
    (shard,) = tmp_path.glob("*.parquet")
    whole = shard.read_bytes()
    for content in (whole[:-50], b"", b"PAR1" + whole[4:-8] + b"\xff" * 4 + b"PAR1"):
        shard.write_bytes(content)
        with pytest.raises(UserError, match=r"part-00000\.parquet is damaged \(.*\): run the step"):
            StoredSamples(tmp_path)

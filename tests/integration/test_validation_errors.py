"""The step `validate` on data that stops the pipeline: each rule of severity error broken by real bad data."""

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepared import broken_rules, encoded, good, run, shards, stopped

from vismem.config import BaseConfig, Config
from vismem.data.sample import read_samples
from vismem.errors import UserError
from vismem.validation.validate import validate


def test_an_empty_required_split_stops_the_pipeline(tmp_path: Path) -> None:
    shards(tmp_path, validation=())
    assert broken_rules(stopped(tmp_path, "non_empty_splits: split 'validation' has no good rows")) == [
        "non_empty_splits"
    ]


def test_an_empty_split_that_is_not_required_passes(tmp_path: Path) -> None:
    shards(tmp_path, validation=())
    assert run(tmp_path, required_splits=("train", "test"))["success"] is True
    assert read_samples(tmp_path / "validate" / "data" / "validation") == []


def test_data_without_a_single_row_stops_the_pipeline(tmp_path: Path) -> None:
    shards(tmp_path, train=(), validation=(), test=())
    stopped(tmp_path, "split 'test' has no good rows; split 'validation' .*; split 'train'")


def test_a_split_whose_rows_are_all_bad_counts_as_empty(tmp_path: Path) -> None:
    shards(tmp_path, test=[dataclasses.replace(good("test", 0), images=())])
    stopped(tmp_path, "split 'test' has no good rows")


def test_a_missing_column_stops_the_pipeline_and_is_named(tmp_path: Path) -> None:
    path = shards(tmp_path) / "test" / "part-00001.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["answer"]), path)
    assert broken_rules(stopped(tmp_path, "schema: test/part-00001: no column 'answer'")) == ["schema"]


def test_a_column_of_the_wrong_type_an_unknown_one_and_a_broken_file_are_named(tmp_path: Path) -> None:
    folder = shards(tmp_path) / "train"
    table = pq.read_table(folder / "part-00000.parquet")
    numbers = pa.array(range(table.num_rows))
    place = table.schema.get_field_index("answer")
    pq.write_table(table.set_column(place, "answer", numbers), folder / "part-00000.parquet")
    pq.write_table(table.append_column("label", numbers), folder / "part-00001.parquet")
    (folder / "part-00002.parquet").write_bytes(b"PAR1 and then nothing")
    stopped(
        tmp_path,
        "train/part-00000: column 'answer' is int64, not string; train/part-00001: unknown column 'label'; "
        "train/part-00002: not a readable Parquet file",
    )


def test_too_many_bad_rows_stop_the_pipeline(tmp_path: Path) -> None:
    rows = [good("train", number) for number in range(20)]
    shards(tmp_path, train=[dataclasses.replace(row, images=(b"x",)) for row in rows[:6]] + rows[6:])
    stopped(tmp_path, "quarantined_share: 6 of 60 rows are bad: 10.0%", max_quarantined=0.09)


def test_an_image_of_the_test_split_in_train_stops_the_pipeline_even_in_another_format(tmp_path: Path) -> None:
    leaked = dataclasses.replace(good("train", 0), images=(encoded(1), encoded(3004, kind="WEBP", lossless=True)))
    shards(tmp_path, train=[leaked, good("train", 1)])
    found = stopped(tmp_path, r"no_leakage: 1 of train; first train/part-00000 row 0 \(id 'train-0'\)")
    assert broken_rules(found) == ["no_leakage"]


def test_a_base_whose_tokenizer_is_not_there_is_named(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "base").mkdir()
    config = Config(base=BaseConfig(model=str(tmp_path / "base")))
    with pytest.raises(UserError, match=rf"base\.model '{tmp_path}/base' has no tokenizer\.json"):
        validate(config, {"prepare": tmp_path / "prepare"}, tmp_path)


def test_a_failed_run_leaves_no_data_of_an_earlier_one(tmp_path: Path) -> None:
    shards(tmp_path)
    run(tmp_path)
    shards(tmp_path, test=())
    for stale in (tmp_path / "prepare" / "test").glob("part-0000[1-9].parquet"):
        stale.unlink()
    stopped(tmp_path, "split 'test' has no good rows")

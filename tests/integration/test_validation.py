"""The step `validate`: each rule broken once by real bad data; nothing is lost between clean and quarantine."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from prepared import broken_rules, encoded, good, noise, quarantined, run, shards, verdicts

from vismem.config import BaseConfig, Config, EasyVqaSource, JsonlSource, NlvrSource, PrepareConfig
from vismem.data.prepare import prepare
from vismem.data.sample import SCHEMA, Sample, Video, read_samples
from vismem.errors import UserError
from vismem.models.small_files import read_tokenizer
from vismem.models.tokens import MEMORY_TOKENS
from vismem.validation.validate import total_variation

NLVR = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "nlvr"


def test_good_data_passes_unchanged(tmp_path: Path) -> None:
    source = shards(tmp_path)
    found = run(tmp_path)
    assert found["success"] is True
    assert broken_rules(found) == []
    assert found["rows"]["total"] == found["rows"]["clean"] == 60
    assert quarantined(tmp_path) == []
    for split in ("train", "validation", "test"):
        assert read_samples(tmp_path / "validate" / "data" / split) == read_samples(source / split)


def test_the_hash_of_clean_data_is_the_one_that_prepare_gave(tmp_path: Path) -> None:
    (tmp_path / "prepare").mkdir()
    config = Config(prepare=PrepareConfig(sources=(EasyVqaSource(train=30, validation=20, test=20),)))
    prepare(config, {}, tmp_path / "prepare")
    assert run(tmp_path)["data_sha256"] == json.loads((tmp_path / "prepare" / "stats.json").read_text())["data_sha256"]


# Each bad row breaks exactly the rule that it stands under.
BAD_ROWS: dict[str, tuple[Callable[[Sample], Sample], str]] = {
    "ids_filled": (lambda row: dataclasses.replace(row, id=" "), "empty id"),
    "ids_unique": (lambda row: dataclasses.replace(row, id="test-3"), "same id as test/part-00000 row 3"),
    "images_present": (lambda row: dataclasses.replace(row, images=()), "no image: .* about images"),
    "no_videos": (
        lambda row: dataclasses.replace(row, videos=(Video((encoded(1),), 2.0),)),
        "has a video: a released model takes images only",
    ),
    "images_decode": (
        lambda row: dataclasses.replace(row, images=(*row.images, noise()[:1500])),
        r"image 2 of 2: .*truncated",
    ),
    "image_min_side": (
        lambda row: dataclasses.replace(row, images=(encoded(9999, (40, 27)),)),
        "a side of 27 pixels, less than 28",
    ),
    "image_max_side": (
        lambda row: dataclasses.replace(row, images=(encoded(9999, (101, 40)),)),
        "a side of 101 pixels, more than 100",
    ),
    "question_length": (lambda row: dataclasses.replace(row, question="x" * 51), "51 characters, not 1 to 50"),
    "texts_plain": (
        lambda row: dataclasses.replace(row, question="Is it <m_I^s>?", rationale="<|im_end|>"),
        r"<m_I\^s> in 'question', <\|im_end\|> in 'rationale': one of the base's own tokens",
    ),
    "answers_filled": (lambda row: dataclasses.replace(row, answer=" ", choices=()), "empty answer"),
    "answers_among_choices": (lambda row: dataclasses.replace(row, answer="c"), "'c' is none of the choices"),
    "capability_known": (
        lambda row: dataclasses.replace(row, capability="seeing"),  # type: ignore[arg-type]
        "unknown capability 'seeing'",
    ),
    "fields_filled": (
        lambda row: dataclasses.replace(row, rationale=None, source=None),  # type: ignore[arg-type]
        "'rationale', 'source' is null",
    ),
}


@pytest.mark.parametrize("rule", BAD_ROWS)
def test_a_row_that_breaks_a_rule_goes_to_quarantine_with_the_reason_and_the_rest_goes_on(
    tmp_path: Path, rule: str
) -> None:
    spoil, reason = BAD_ROWS[rule]
    rows = [good("train", number) for number in range(20)]
    bad = spoil(rows[11])
    source = shards(tmp_path, train=[*rows[:11], bad, *rows[12:]])
    found = run(tmp_path, max_pixels=100, max_question_chars=50)
    assert found["success"] is True
    assert broken_rules(found) == [rule]
    assert found["rows"]["splits"]["train"] == {"total": 20, "clean": 19, "quarantined": 1}
    (row,) = quarantined(tmp_path)
    assert re.fullmatch(f"{rule}: .*{reason}.*", row["reason"])
    assert row["split"] == "train"
    assert row["images"] == list(bad.images)
    assert row["question"] == bad.question
    assert read_samples(tmp_path / "validate" / "data" / "train") == [*rows[:11], *rows[12:]]
    assert read_samples(tmp_path / "validate" / "data" / "test") == read_samples(source / "test")


def test_no_text_of_a_clean_row_holds_one_of_the_bases_own_tokens(tmp_path: Path) -> None:
    """Whatever token, in whatever text of the row; and in quarantine it is named with the text that holds it."""
    tokens = read_tokenizer(BaseConfig()).get_added_tokens_decoder().values()
    written = [*MEMORY_TOKENS, *(token.content for token in tokens)]
    assert {"<|image_pad|>", "<|vision_start|>", "<|video_pad|>", "<|im_end|>"} <= set(written)
    spoils: list[Callable[[Sample, str], Sample]] = [
        lambda row, text: dataclasses.replace(row, question=f"{row.question}{text}"),
        lambda row, text: dataclasses.replace(row, answer=text, choices=()),
        lambda row, text: dataclasses.replace(row, choices=("a", "b", f"a {text}")),
        lambda row, text: dataclasses.replace(row, rationale=f"so {text}, so"),
    ]
    rows = [spoil(good("train", n), token) for n, token in enumerate(written) for spoil in spoils]
    rows = [dataclasses.replace(row, id=str(n)) for n, row in enumerate(rows)]
    shards(tmp_path, train=[good("train", 99), *rows])
    run(tmp_path, max_quarantined=1.0, max_split_loss=1.0)
    expected = [
        f"texts_plain: {token} in '{field}': one of the base's own tokens"
        for token in written
        for field in ("question", "answer", "choices", "rationale")
    ]
    assert [row["reason"] for row in quarantined(tmp_path)] == expected
    assert len(read_samples(tmp_path / "validate" / "data" / "train")) == 1


def test_a_row_that_breaks_two_rules_is_quarantined_once_with_both_reasons(tmp_path: Path) -> None:
    bad = dataclasses.replace(good("train", 1), question="", images=(b"",))
    shards(tmp_path, train=[good("train", 0), bad])
    run(tmp_path, max_split_loss=0.5)
    assert [row["reason"] for row in quarantined(tmp_path)] == [
        "images_decode: image 1 of 1: no bytes; question_length: 0 characters, not 1 to 4000"
    ]


def test_nothing_is_lost_when_many_rows_are_bad(tmp_path: Path) -> None:
    rows = [good("train", number) for number in range(30)]
    spoiled = [dataclasses.replace(row, answer="z") if n % 3 == 0 or 8 <= n < 16 else row for n, row in enumerate(rows)]
    shards(tmp_path, train=spoiled)
    run(tmp_path, max_quarantined=1.0, max_split_loss=1.0)
    kept = {sample.id for sample in read_samples(tmp_path / "validate" / "data" / "train")}
    apart = {row["id"] for row in quarantined(tmp_path)}
    assert kept == {row.id for row in spoiled if row.answer != "z"}
    assert apart == {row.id for row in spoiled if row.answer == "z"}


# --- warnings --------------------------------------------------------------------------------------------------------


def test_one_answer_too_often_is_a_warning(tmp_path: Path) -> None:
    shards(tmp_path, train=[dataclasses.replace(good("train", n), answer="a") for n in range(20)])
    found = run(tmp_path)
    assert found["success"] is True
    assert broken_rules(found) == ["label_balance"]
    assert found["rules"]["label_balance"]["message"] == "split 'train': 100% of the answers are 'a'"


def test_another_task_mix_than_the_train_splits_is_a_warning(tmp_path: Path) -> None:
    shards(tmp_path, test=[dataclasses.replace(good("test", n), task="find") for n in range(20)])
    found = run(tmp_path)
    assert broken_rules(found) == ["task_drift"]
    assert found["rules"]["task_drift"]["message"] == "split 'test': total variation distance 50.0%"


def test_a_stored_task_profile_takes_the_place_of_the_train_splits(tmp_path: Path) -> None:
    shards(tmp_path)
    run(tmp_path)
    stored = tmp_path / "validate" / "task_profile.json"
    assert json.loads(stored.read_text()) == {"count": 0.5, "find": 0.5}
    assert broken_rules(run(tmp_path, task_profile=stored)) == []
    (tmp_path / "other.json").write_text('{"count": 1.0}')
    assert broken_rules(run(tmp_path, task_profile=tmp_path / "other.json")) == ["task_drift"]


@pytest.mark.parametrize(("text", "said"), [(None, "is not there"), ("{", "is no JSON"), ("[1]", "must map")])
def test_a_task_profile_that_cannot_be_used_is_explained(tmp_path: Path, text: str | None, said: str) -> None:
    shards(tmp_path)
    if text is not None:
        (tmp_path / "profile.json").write_text(text)
    with pytest.raises(UserError, match=said):
        run(tmp_path, task_profile=tmp_path / "profile.json")


def test_total_variation_is_zero_for_the_same_mix_and_one_for_disjoint_ones() -> None:
    assert total_variation({"a": 0.5, "b": 0.5}, {"b": 0.5, "a": 0.5}) == 0
    assert total_variation({"a": 1.0}, {"b": 1.0}) == 1
    assert total_variation({"a": 0.75, "b": 0.25}, {"a": 0.5, "c": 0.5}) == 0.5


# --- the report, and real data ---------------------------------------------------------------------------------------


def test_the_report_reads_offline_and_shows_bad_text_as_text(tmp_path: Path) -> None:
    bad = dataclasses.replace(good("train", 1), question="<script>alert(1)</script>", answer="c")
    shards(tmp_path, train=[good("train", 0), bad])
    run(tmp_path, max_split_loss=0.5)
    page = (tmp_path / "validate" / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "url(" not in page
    assert page.count('src="data:image/png;base64,') >= 3
    assert 'alt=""' not in page
    for name in verdicts(tmp_path / "validate")["rules"]:
        assert name in page
    for figures in ("required rows 1 to 20; 3 splits judged", "min side 32 px; 42 rows judged", "share 2.4%"):
        assert figures in page


def test_a_broken_image_in_a_jsonl_file_ends_in_quarantine(tmp_path: Path) -> None:
    """From the file a user wrote to the quarantine shard, through prepare."""
    lines = []
    for number in range(30):
        (tmp_path / f"{number}.png").write_bytes(encoded(number) if number != 7 else encoded(number)[:40])
        lines.append({"id": f"mine-{number}", "image": f"{number}.png", "prompt": "?", "answer": "ab"[number % 2]})
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = JsonlSource(kind="jsonl", path=tmp_path / "mine.jsonl", split="train")
    (tmp_path / "prepare").mkdir()
    prepare(Config(prepare=PrepareConfig(sources=(source,))), {}, tmp_path / "prepare")
    run(tmp_path, required_splits=("train",))
    assert [(row["id"], row["reason"].split(":")[0]) for row in quarantined(tmp_path)] == [("mine-7", "images_decode")]
    assert len(read_samples(tmp_path / "validate" / "data" / "train")) == 29


def test_clean_shards_keep_the_schema(tmp_path: Path) -> None:
    shards(tmp_path, train=[good("train", 0), dataclasses.replace(good("train", 1), answer="z")])
    run(tmp_path, max_split_loss=0.5)
    for path in (tmp_path / "validate" / "data").rglob("*.parquet"):
        assert pq.read_schema(path).equals(SCHEMA)


@pytest.mark.skipif(not NLVR.is_dir(), reason=f"the NLVR files are not at {NLVR}")
def test_real_nlvr_splits_pass_and_share_no_image(tmp_path: Path) -> None:
    sources = (
        NlvrSource(kind="nlvr", path=NLVR / "train.parquet", split="train", directories=(0, 1)),
        NlvrSource(kind="nlvr", path=NLVR / "train.parquet", split="validation", directories=(2,)),
        NlvrSource(kind="nlvr", path=NLVR / "dev.parquet", split="test", limit=100),
    )
    (tmp_path / "prepare").mkdir()
    prepare(Config(prepare=PrepareConfig(sources=sources)), {}, tmp_path / "prepare")
    found = run(tmp_path)
    assert found["success"] is True
    assert found["rows"]["quarantined"] == 0
    assert found["rows"]["splits"]["test"]["total"] == 100

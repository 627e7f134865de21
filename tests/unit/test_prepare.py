"""The step `prepare`: deterministic shards, and no image of one split in another."""

import hashlib
import io
import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from vismem.config import Config, EasyVqaSource, JsonlSource, PrepareConfig
from vismem.data.fingerprint import SPLITS, data_sha256, examine_image, sample_sha256
from vismem.data.prepare import prepare
from vismem.data.sample import BYTES_PER_GROUP, SCHEMA, Sample, StoredSamples, read_samples, write_shards
from vismem.errors import UserError


def encoded(color: tuple[int, int, int], kind: str = "PNG", size: tuple[int, int] = (32, 32)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind, lossless=True)
    return file.getvalue()


def jsonl(folder: Path, split: str, images: dict[str, bytes]) -> JsonlSource:
    """A JSONL source with one question for each image."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, data in images.items():
        (folder / f"{split}-{name}").write_bytes(data)
        lines.append({"id": f"{split}-{name}", "image": f"{split}-{name}", "prompt": "Which?", "answer": name})
    path = folder / f"{split}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return JsonlSource(kind="jsonl", path=path, split=split)


def config(*sources: object, seed: int = 0, rows_per_shard: int = 4096) -> Config:
    return Config(seed=seed, prepare=PrepareConfig(sources=sources, rows_per_shard=rows_per_shard))


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path: Path) -> None:
    source = EasyVqaSource(train=40, validation=10, test=10)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        prepare(config(source, seed=seed), {}, tmp_path / name)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a") != files(tmp_path / "c")


def test_leftovers_of_a_killed_run_do_not_survive(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "part-00007.parquet").write_bytes(b"half")
    prepare(config(EasyVqaSource(train=5, validation=5)), {}, tmp_path)
    assert [path.name for path in (tmp_path / "train").iterdir()] == ["part-00000.parquet"]
    assert len(read_samples(tmp_path / "train")) == 5


def test_rows_go_to_shards_of_the_size_asked_for_and_come_back_in_order(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in", "train", {f"{i}.png": encoded((i, 0, 0)) for i in range(7)})
    prepare(config(source, rows_per_shard=3), {}, tmp_path)
    assert len(list((tmp_path / "train").glob("part-*.parquet"))) == 3
    assert [sample.answer for sample in read_samples(tmp_path / "train")] == [f"{i}.png" for i in range(7)]


def test_shards_are_written_and_read_a_few_megabytes_at_a_time(tmp_path: Path) -> None:
    size, alive, most = BYTES_PER_GROUP // 3 + 1, list[weakref.ref[Sample]](), 0

    def samples() -> Iterator[Sample]:
        nonlocal most
        for number in range(20):
            sample = Sample(str(number), (bytes([number]) * size,), "?", "x")
            alive.append(weakref.ref(sample))
            most = max(most, sum(ref() is not None for ref in alive))
            yield sample
            del sample

    write_shards(samples(), tmp_path, rows_per_shard=16)
    assert most <= 3, "rows, not samples, wait for their group"
    groups = [pq.read_metadata(shard) for shard in sorted(tmp_path.glob("*.parquet"))]
    assert [[meta.row_group(n).num_rows for n in range(meta.num_row_groups)] for meta in groups] == [
        [3] * 5 + [1],
        [3, 1],
    ]
    stored = StoredSamples(tmp_path, [19, 2, 16])
    assert [sample.id for sample in stored] == ["19", "2", "16"]
    assert [sample.id for sample in stored[1:]] == ["2", "16"]
    assert stored[0].images == (bytes([19]) * size,)


def test_a_picture_in_two_splits_stays_in_the_one_that_comes_first_in_precedence(tmp_path: Path) -> None:
    shared = (9, 9, 9)
    sources = [
        jsonl(tmp_path / "in", split, {"own.png": encoded((n, 0, 0)), "shared.png": encoded(shared)})
        for n, split in enumerate(("train", "validation", "test"))
    ]
    prepare(config(*sources), {}, tmp_path)
    answers = {split: [sample.answer for sample in read_samples(tmp_path / split)] for split in SPLITS}
    assert answers == {
        "test": ["own.png", "shared.png"],
        "validation": ["own.png"],
        "train": ["own.png"],
    }
    stats = json.loads((tmp_path / "stats.json").read_text())["splits"]
    assert {split: stats[split]["dropped"] for split in SPLITS} == {
        "test": {},
        "validation": {"test": 1},
        "train": {"test": 1},
    }


def test_a_group_in_two_files_stays_in_the_split_that_comes_first_in_precedence(tmp_path: Path) -> None:
    sources = []
    for number, split in enumerate(("train", "validation", "test")):
        source = jsonl(tmp_path, split, {f"{name}.png": encoded((number, name, 0)) for name in range(3)})
        rows = [json.loads(line) for line in source.path.read_text().splitlines()]
        groups = [{"group": 7}, {"group": f"only {split}"}, {}]
        rows = [row | group for row, group in zip(rows, groups, strict=True)]
        source.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append(source)
    prepare(config(*sources), {}, tmp_path / "out")
    answers = {split: [sample.answer for sample in read_samples(tmp_path / "out" / split)] for split in SPLITS}
    rest = ["1.png", "2.png"]
    assert answers == {"test": ["0.png", *rest], "validation": rest, "train": rest}


def test_the_same_picture_in_another_file_format_is_still_the_same_picture(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "in", "train", {"a.webp": encoded((1, 2, 3), "WEBP")})
    test = jsonl(tmp_path / "in", "test", {"a.png": encoded((1, 2, 3))})
    prepare(config(train, test), {}, tmp_path)
    assert len(read_samples(tmp_path / "test")) == 1
    assert read_samples(tmp_path / "train") == []


def test_a_video_in_two_splits_stays_in_the_first_and_one_that_shares_a_frame_stays_too(tmp_path: Path) -> None:
    black, red, blue = (encoded(color) for color in ((0, 0, 0), (9, 0, 0), (0, 0, 9)))
    for name, data in (("black.png", black), ("red.png", red), ("blue.png", blue)):
        (tmp_path / name).write_bytes(data)
    sources = []
    for split, frames in (("train", ["red.png", "blue.png"]), ("test", ["red.png"])):
        videos = [{"frames": ["black.png", frame], "fps": 1} for frame in frames]
        lines = [{"id": str(n), "prompt": "?", "answer": "x", "videos": [video]} for n, video in enumerate(videos)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        sources.append(JsonlSource(kind="jsonl", path=tmp_path / f"{split}.jsonl", split=split))
    prepare(config(*sources), {}, tmp_path)
    assert [sample.videos[0].frames for sample in read_samples(tmp_path / "train")] == [(black, blue)]
    assert [sample.videos[0].frames for sample in read_samples(tmp_path / "test")] == [(black, red)]


def test_rows_with_broken_images_pass_on_to_validate_even_where_two_splits_hold_the_same_bytes(tmp_path: Path) -> None:
    sources = [jsonl(tmp_path / "in", split, {"a.png": b"broken"}) for split in ("train", "test")]
    prepare(config(*sources), {}, tmp_path)
    assert [read_samples(tmp_path / split)[0].images for split in ("train", "test")] == [(b"broken",), (b"broken",)]


def test_stats_count_what_was_written(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in", "train", {f"{i}.png": encoded((i, 0, 0)) for i in range(3)})
    prepare(config(source, EasyVqaSource(train=20, validation=0)), {}, tmp_path)
    stats = json.loads((tmp_path / "stats.json").read_text())
    rows = read_samples(tmp_path / "train")
    assert stats["splits"]["train"] == {"rows": len(rows), "dropped": {}}
    assert len(rows) == 23
    digests = [sample_sha256(sample.as_row()) for sample in rows]
    assert stats["data_sha256"] == data_sha256({"train": digests})


def test_a_source_that_cannot_be_read_ends_with_one_message(tmp_path: Path) -> None:
    source = JsonlSource(kind="jsonl", path=tmp_path / "gone.jsonl", split="train")
    with pytest.raises(UserError, match=r"no JSONL file .*gone\.jsonl"):
        prepare(config(source), {}, tmp_path)


def test_a_data_sets_hash_depends_on_every_field_and_on_the_split() -> None:
    row = {name: "" for name in SCHEMA.names} | {"images": [b"a"], "choices": ["x"]}
    other = {"images": [b"b"], "videos": [{"frames": [b"b"], "fps": 2.0}]}
    changed = [sample_sha256(row | {name: other.get(name, ["y"])}) for name in SCHEMA.names]
    assert len({sample_sha256(row), *changed}) == 1 + len(SCHEMA.names)
    assert data_sha256({"train": [sample_sha256(row)]}) != data_sha256({"test": [sample_sha256(row)]})


def test_an_images_facts_are_those_of_its_pixels() -> None:
    facts = examine_image(encoded((1, 2, 3), size=(40, 30)))
    assert (facts.width, facts.height, facts.fault) == (40, 30, None)
    assert facts.sha256 == examine_image(encoded((1, 2, 3), "WEBP", size=(40, 30))).sha256
    assert facts.sha256 != examine_image(encoded((1, 2, 3), size=(30, 40))).sha256


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "GIF"])
def test_an_image_that_no_server_would_read_has_a_fault(kind: str) -> None:
    assert f"a {kind} file: save it as one of PNG, JPEG, WEBP" in str(examine_image(encoded((1, 2, 3), kind)).fault)


def test_a_truncated_image_has_a_fault_and_the_headers_size() -> None:
    noise = Image.effect_noise((64, 48), 80)
    file = io.BytesIO()
    noise.save(file, "PNG")
    facts = examine_image(file.getvalue()[:1000])
    assert facts.fault is not None
    assert (facts.width, facts.height) == (64, 48)
    assert examine_image(b"").fault == "no bytes"

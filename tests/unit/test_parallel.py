"""Rows looked at by threads: results in order, few items at a time, pictures decoded side by side and once each."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Barrier

import pytest
from PIL import Image

from vismem.config import Config, JsonlSource, PrepareConfig, ValidateConfig
from vismem.data import fingerprint, parallel, sample
from vismem.data.fingerprint import ImageFacts, examine_image, image_cache
from vismem.data.parallel import in_order
from vismem.data.prepare import prepare
from vismem.init.rows import File, read_rows
from vismem.models.small_files import read_tokenizer
from vismem.runtime.reserved import Reserved
from vismem.validation.facts import collect_facts, find_shards

ROWS = 8


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "THREADS", 4)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """A file of questions about as many pictures."""
    rows = []
    for number in range(ROWS):
        Image.new("RGB", (40, 30), (number, 0, 0)).save(tmp_path / f"{number}.png")
        rows.append({"id": str(number), "image": f"{number}.png", "prompt": "which?", "answer": f"number {number}"})
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "mine.jsonl"


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    """A picture is only decoded while another one is."""
    other = Barrier(2)

    def examine(data: bytes, max_side: int | None = None) -> ImageFacts:
        other.wait(timeout=10)
        return examine_image(data, max_side)

    monkeypatch.setattr(fingerprint, "examine_image", examine)


@pytest.mark.usefixtures("threads")
def test_results_come_in_order_and_few_items_are_read_ahead() -> None:
    read, found = list[int](), list[int]()

    def items() -> Iterator[int]:
        for number in range(100):
            read.append(number)
            yield number

    for square in in_order(lambda item: item * item, items()):
        found.append(square)
        assert len(read) - len(found) < 8
    assert found == [n * n for n in range(100)]


@pytest.mark.usefixtures("threads")
def test_what_goes_wrong_ends_it() -> None:
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda item: 1 // item, [1, 1, 0, 1]))


@pytest.mark.usefixtures("together")
def test_init_decodes_pictures_side_by_side(lines: Path) -> None:
    rows = read_rows([File(lines, lines.parent)], ValidateConfig(), lambda _: ())
    assert [row.values["id"] for row in rows.good] == [str(number) for number in range(ROWS)]
    assert rows.bad == []


@pytest.mark.usefixtures("together")
def test_prepare_and_validate_decode_pictures_side_by_side(
    lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "ROWS_PER_GROUP", 1)
    source = JsonlSource(kind="jsonl", path=lines, split="train")
    config = Config(prepare=PrepareConfig(sources=(source,)))
    assert prepare(config, {}, tmp_path / "out").startswith("prepared 0 test, 0 validation, 8 train rows")
    done, reserved = list[int](), Reserved(read_tokenizer(config.base))
    facts = collect_facts(find_shards(tmp_path / "out"), config.validate_, reserved, done.append)
    assert list(facts["id"]) == [str(number) for number in range(ROWS)]
    assert list(facts["position"]) == [*range(ROWS)]
    assert sum(done) == ROWS


@pytest.mark.usefixtures("threads")
def test_a_picture_that_many_rows_share_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    file, decoded = io.BytesIO(), list[bytes]()
    Image.new("RGB", (40, 30)).save(file, "PNG")

    def counted(data: bytes, max_side: int | None = None) -> ImageFacts:
        decoded.append(data)
        time.sleep(0.1)  # the others ask meanwhile
        return examine_image(data, max_side)

    monkeypatch.setattr(fingerprint, "examine_image", counted)
    assert len(set(in_order(image_cache(), [file.getvalue()] * 4))) == 1
    assert len(decoded) == 1


def test_there_are_no_more_threads_than_cores_that_the_process_may_use() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); import vismem.data.parallel as p"
    done = subprocess.run([sys.executable, "-c", f"{code}; print(p.THREADS)"], capture_output=True, text=True)
    assert done.stdout == "1\n"

"""The request log by itself: which requests are in it, its bound on disk, and that no fault of it reaches a caller."""

import io
import json
import os
import stat
import subprocess
import sys
import threading
from collections import Counter as Counts
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prometheus_client import CollectorRegistry, Counter

from vismem.cli import build_parser
from vismem.cli.ask import _set_request_log
from vismem.data.fingerprint import examine_image
from vismem.serving import request_log
from vismem.serving.request_log import FOLDER, IMAGES, MEGABYTES, SHARE, RequestLog

SERVED = {"version": "7", "manifest_sha256": "f00d"}


def counter() -> Counter:
    return Counter("logged", "of a test", ["outcome"], registry=CollectorRegistry())


def opened(folder: Path, share: float = 1.0, most: int = 1_000_000, images: bool = False) -> RequestLog:
    return RequestLog(folder, share, most, images, SERVED, counter())


Asked = tuple[list[Image.Image], dict[str, Any]]


def asked(number: int, question: str = "how many cups?", side: int = 32) -> Asked:
    """A request whose image is its number's alone."""
    image = Image.new("RGB", (side, side + 8), (number % 256, number // 256 % 256, 7))
    return [image], {"question": question, "answer": "two", "tokens": 1}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def outcome(log: RequestLog, name: str) -> int:
    return int(log.count.labels(name)._value.get())


def written(folder: Path, *requests: Asked, **options: Any) -> RequestLog:
    log = opened(folder, **options)
    for request in requests:
        log.add(*request)
    log.close()
    return log


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_line_says_what_was_asked_and_answered_and_an_image_is_known_as_validate_knows_it(tmp_path: Path) -> None:
    log = written(tmp_path / "log", asked(3), images=True)
    (line,) = lines(tmp_path / "log")
    assert outcome(log, "written") == 1
    assert {name: line[name] for name in ("question", "answer", "tokens", "version", "manifest_sha256")} == {
        "question": "how many cups?", "answer": "two", "tokens": 1, **SERVED,
    }  # fmt: skip
    (image,) = line["images"]
    kept = tmp_path / "log" / "images" / f"{image['sha256']}.png"
    facts = examine_image(kept.read_bytes())
    assert (facts.sha256.hex(), facts.width, facts.height, facts.look.hex()) == tuple(
        image[name] for name in ("sha256", "width", "height", "look")
    )


def test_what_a_file_holds_beside_its_pixels_is_not_kept(tmp_path: Path) -> None:
    (image,), line = asked(3)
    file = io.BytesIO()
    image.save(file, "PNG", icc_profile=os.urandom(100_000))
    written(tmp_path / "log", ([Image.open(file)], line), images=True)
    (kept,) = (tmp_path / "log" / "images").iterdir()
    assert kept.stat().st_size < 1_000


def test_only_the_owner_may_read_it_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        written(tmp_path / "log", asked(3), images=True)
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "log", *(tmp_path / "log").rglob("*"))}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}


def test_images_are_kept_only_where_that_is_asked_and_once(tmp_path: Path) -> None:
    written(tmp_path / "without", asked(3))
    assert [path.name for path in (tmp_path / "without").iterdir() if path.is_dir()] == []
    written(tmp_path / "with", asked(3), asked(3, "how many plates?"), images=True)
    assert len(list((tmp_path / "with" / "images").iterdir())) == 1


def test_replicas_choose_the_same_requests_and_about_as_many_as_asked_for(tmp_path: Path) -> None:
    requests = [asked(number) for number in range(2000)]
    for replica, order in (("a", requests), ("b", requests[::-1])):
        written(tmp_path / replica, *order, share=0.1)
    chosen = [{line["request"] for line in lines(tmp_path / replica)} for replica in ("a", "b")]
    assert chosen[0] == chosen[1]
    assert 150 < len(chosen[0]) < 250  # 200 expected, standard deviation 13
    smaller = written(tmp_path / "c", *requests, share=0.02)
    assert {line["request"] for line in lines(tmp_path / "c")} < chosen[0]
    assert outcome(smaller, "lost") == 0


def test_a_request_that_is_asked_again_is_logged_again_under_the_same_name(tmp_path: Path) -> None:
    written(tmp_path, asked(1), asked(1), asked(1, "another?"), asked(2))
    assert sorted(Counts(line["request"] for line in lines(tmp_path)).values()) == [1, 1, 2]


@pytest.mark.parametrize("images", [False, True])
def test_the_folder_never_grows_over_its_bound_and_the_oldest_go(tmp_path: Path, images: bool) -> None:
    (tmp_path / "notes.txt").write_text("x" * 50_000)  # not ours
    log = opened(tmp_path, most=20_000, images=images)
    for number in range(300):
        log._write(*asked(number, f"question {number}"))  # as the thread does, one after the other
        assert size(tmp_path) - 50_000 <= 20_000
    log.close()
    found = [line["question"] for line in lines(tmp_path)]
    assert found == [f"question {number}" for number in range(300 - len(found), 300)]
    assert len(found) > 10
    assert (tmp_path / "notes.txt").is_file()


def test_several_processes_share_a_folder_and_every_line_is_whole(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_request_log as t; from pathlib import Path\n"
        "t.written(Path(sys.argv[2]), *(t.asked(n, sys.argv[3] * 9) for n in range(200)), most=10_000_000)"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path)]
    for process in [subprocess.Popen([*command, name]) for name in "abc"]:
        assert process.wait() == 0
    assert Counts(line["question"][0] for line in lines(tmp_path)) == {"a": 200, "b": 200, "c": 200}


def test_a_file_that_another_process_deleted_is_not_written_to_any_more(tmp_path: Path) -> None:
    log = opened(tmp_path)
    log._write(*asked(1))
    for file in tmp_path.glob("*.jsonl"):
        file.unlink()
    log._write(*asked(2))
    log.close()
    assert len(lines(tmp_path)) == 1


def test_a_full_disk_loses_and_counts_lines_leaves_none_half_and_the_log_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log, write = opened(tmp_path), os.write
    log._write(*asked(0))
    full = threading.Event()

    def some(file: int, data: bytes) -> int:
        return write(file, data[: len(data) // 2]) if full.is_set() else write(file, data)

    monkeypatch.setattr(os, "write", some)
    for number in range(1, 7):
        full.set() if number in (2, 3) else full.clear()
        log.add(*asked(number))
        while log.pending:
            pass
    log.close()
    assert (outcome(log, "written"), outcome(log, "lost")) == (5, 2)
    assert len(lines(tmp_path)) == 5
    assert [record.message for record in caplog.records] == [
        f"requests are not logged in {tmp_path}: [Errno 28] No space left on device"
    ]


@pytest.mark.parametrize("place", ["/dev/full/log", "/proc/vismem", "file/log"])
def test_a_folder_that_cannot_be_written_loses_and_counts_every_request(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    log = written(tmp_path / place, asked(1), asked(2))
    assert (outcome(log, "written"), outcome(log, "lost")) == (0, 2)


def test_a_dead_writer_and_one_that_does_not_keep_up_cost_lines_and_no_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, held = opened(tmp_path), threading.Event()
    monkeypatch.setattr(log, "_write", lambda images, line: held.wait())
    for number in range(10):  # one is written, and of the others as many as PENDING allows wait
        log.add(*asked(number, side=4000))
    assert outcome(log, "lost") == 10 - request_log.PENDING // (4000 * 4008)
    held.set()
    log.close()
    log.add(*asked(1))
    assert outcome(log, "lost") == 11 - request_log.PENDING // (4000 * 4008)
    assert log.pending == 0


def test_an_image_that_cannot_be_read_any_more_costs_its_line_alone(tmp_path: Path) -> None:
    broken = Image.new("RGB", (8, 8))
    broken.close()
    log = written(tmp_path, ([broken], {"question": "what?"}), asked(2, "a \ud800 half"))
    assert (outcome(log, "written"), outcome(log, "lost")) == (1, 1)
    assert lines(tmp_path)[0]["question"] == "a \ud800 half"


def test_it_is_off_unless_the_environment_names_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (FOLDER, SHARE, MEGABYTES, IMAGES):
        monkeypatch.delenv(name, raising=False)
    assert RequestLog.from_environment(SERVED, counter()) is None
    monkeypatch.setenv(FOLDER, str(tmp_path))
    log = RequestLog.from_environment(SERVED, counter())
    assert log is not None
    assert (log.folder, log.share, log.most, log.images) == (tmp_path, 0.05, 1_000_000_000, False)
    log.close()
    monkeypatch.setenv(SHARE, "much")
    with pytest.raises(ValueError, match="much"):
        RequestLog.from_environment(SERVED, counter())


@pytest.mark.parametrize("command", ["serve", "api"])
def test_the_options_of_both_servers_are_what_the_process_that_answers_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (FOLDER, SHARE, MEGABYTES, IMAGES):
        monkeypatch.setenv(name, "")  # and what the command sets is undone after the test
    arguments = [command, "--request-log", "log", "--request-share", "0.5", "--request-log-mb", "3", "--request-images"]
    _set_request_log(build_parser().parse_args([command]))
    assert RequestLog.from_environment(SERVED, counter()) is None
    _set_request_log(build_parser().parse_args(arguments))
    log = RequestLog.from_environment(SERVED, counter())
    assert log is not None
    assert (log.folder, log.share, log.most, log.images) == (tmp_path / "log", 0.5, 3_000_000, True)
    log.close()

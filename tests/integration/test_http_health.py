"""`/health` asks the model, and `/metrics` counts what it did: a well, a hung, a failing and a dead one."""

import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import tiny_stages
from fastapi.testclient import TestClient
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from vismem.generation.torch_executor import TorchExecutor
from vismem.runtime.limits import RequestError
from vismem.serving import answering, health
from vismem.serving.answering import Busy, Runtime
from vismem.serving.http import create_app
from vismem.serving.pieces import Chunk

SAMPLE = tiny.samples()[0]


@pytest.fixture
def runtime(tiny_base: Path) -> Iterator[Runtime]:
    with closing(Runtime(TorchExecutor(tiny_stages.eager_model(tiny_base)), rows=2, waiting=1)) as runtime:
        yield runtime


@pytest.fixture
def client(runtime: Runtime) -> TestClient:
    return TestClient(create_app(runtime, "tiny"))


def begin(runtime: Runtime, **options: Any) -> Iterator[Chunk]:
    images = [Image.open(io.BytesIO(image)) for image in SAMPLE.images]
    return runtime.generate(images, SAMPLE.question, **options)


def ask(runtime: Runtime, **options: Any) -> list[Chunk]:
    return list(begin(runtime, **options))


def counted(client: TestClient) -> dict[str, float]:
    """Every sample of /metrics by its name and labels."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    return {" ".join([sample.name, *sample.labels.values()]): sample.value for sample in samples}


def found(client: TestClient) -> tuple[int, str]:
    reply = client.get("/health")
    return reply.status_code, reply.json()["status"]


def test_a_well_model_is_asked_for_one_token_and_not_again_while_that_is_fresh(client: TestClient) -> None:
    assert found(client) == found(client) == (200, "ok")
    assert counted(client)["vismem_first_token_seconds_count"] == 1
    assert counted(client)["vismem_tokens_total"] <= 1


def test_tokens_for_others_prove_it(client: TestClient, runtime: Runtime) -> None:
    ask(runtime, max_new_tokens=1)
    assert found(client) == (200, "ok")
    assert counted(client)["vismem_first_token_seconds_count"] == 1


def test_a_hung_thread_is_found_and_its_recovery_too(
    client: TestClient, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "PATIENCE", 0.2)
    held, choose = threading.Event(), runtime.executor.choose
    monkeypatch.setattr(runtime.executor, "choose", lambda asked: (held.wait(), choose(asked))[1])
    for _ in range(2):  # the second waits for the question that the first asked
        assert found(client) == (503, "no token was decoded for 0.2 s")
    assert sum(thread.name == "health" for thread in threading.enumerate()) == 1
    held.set()
    monkeypatch.setattr(health, "PATIENCE", 60)
    assert found(client) == (200, "ok")


def test_images_of_others_that_are_decoded_are_no_fault(
    client: TestClient, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "PATIENCE", 0.5)
    held, prepare = threading.Event(), runtime.executor.prepare
    monkeypatch.setattr(runtime.executor, "prepare", lambda *given: (held.wait(60), prepare(*given))[1])
    asking = [threading.Thread(target=ask, args=(runtime,), kwargs={"max_new_tokens": 1}) for _ in range(3)]
    for thread in asking:
        thread.start()
    while len(runtime.places) < 3:
        time.sleep(0.01)
    assert found(client) == (200, "ok"), "they have all places"
    held.set()
    for thread in asking:
        thread.join()


@pytest.mark.parametrize("call", ["join", "choose"])
def test_a_model_that_fails_is_found(
    client: TestClient, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(runtime.executor, call, lambda *given: 1 / 0)
        for _ in range(3):
            status, reason = found(client)
            assert (status, reason) == (503, "the model fails: ZeroDivisionError")
    assert found(client) == (200, "ok")


def test_a_model_that_has_not_answered_yet_is_not_called_well(
    client: TestClient, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, held, join = threading.Event(), threading.Event(), runtime.executor.join
    monkeypatch.setattr(runtime.executor, "join", lambda *given: (asked.set(), held.wait(60), join(*given))[2])
    verdicts = list[tuple[int, str]]()
    first = threading.Thread(target=lambda: verdicts.append(found(client)))
    first.start()
    asked.wait(60)
    assert found(client) == (503, "it has not answered yet")
    held.set()
    first.join()
    assert verdicts == [(200, "ok")]


@pytest.mark.parametrize("call", ["join", "choose"])
def test_a_dead_thread_is_found_and_leaves_nobody_waiting(
    client: TestClient, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def die(*_: object) -> None:
        raise SystemExit

    monkeypatch.setattr(runtime.executor, call, die)
    for _ in range(2):  # the answer in the making, and one that comes later
        with pytest.raises(Busy):
            ask(runtime)
    assert found(client) == (503, "the thread that decodes has ended")


def test_what_was_done_refused_and_failed_is_counted(
    client: TestClient, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.executor.stops = frozenset()
    usage = ask(runtime, max_new_tokens=12)[-1].usage
    assert usage is not None
    assert client.post("/v1/chat/completions", json={}).status_code == 400
    joins, held, join = threading.Event(), threading.Event(), runtime.executor.join
    patched = lambda *given: (joins.set(), held.wait(60), join(*given))[2]  # noqa: E731
    monkeypatch.setattr(runtime.executor, "join", patched)
    asking = [threading.Thread(target=ask, args=(runtime,), kwargs={"max_new_tokens": 1}) for _ in range(3)]
    asking[0].start()
    joins.wait(60)  # it holds up the others
    asking[1].start()
    asking[2].start()
    while len(runtime.waiting) < 2:
        time.sleep(0.01)
    assert counted(client)["vismem_waiting"] == 2
    with pytest.raises(Busy):
        ask(runtime)
    held.set()
    for thread in asking:
        thread.join()
    monkeypatch.setattr(runtime.executor, "choose", lambda asked: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask(runtime)
    now = counted(client)
    kinds = ("short", "long")
    assert now["vismem_tokens_total"] == usage.tokens + 3 == 15
    assert [now[f"vismem_memories_total {kind}"] for kind in kinds] >= [usage.memories.get(kind, 0) for kind in kinds]
    assert now["vismem_first_token_seconds_count"] == 4
    assert (now["vismem_refused_total invalid"], now["vismem_refused_total busy"]) == (1, 1)
    assert now["vismem_failures_total"] == 1
    assert (now["vismem_waiting"], now["vismem_decoding"]) == (0, 0)


def test_the_time_to_the_first_token_begins_before_images_and_prompt_are_read(
    client: TestClient, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [5.0]
    monkeypatch.setattr(answering, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def after(seconds: float, own: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*given: Any, **named: Any) -> Any:
            clock[0] += seconds
            return own(*given, **named)

        return slow

    for name, seconds in (("prepare", 100.0), ("read", 10.0), ("join", 1.0)):
        monkeypatch.setattr(runtime.executor, name, after(seconds, getattr(runtime.executor, name)))
    ask(runtime, max_new_tokens=1)
    assert counted(client)["vismem_first_token_seconds_sum"] == 111


def test_an_answer_that_fails_midway_is_no_longer_decoded(
    client: TestClient, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.executor.stops = frozenset()
    steps, choose = iter([1, 1, 0]), runtime.executor.choose
    monkeypatch.setattr(runtime.executor, "choose", lambda asked: (1 / next(steps), choose(asked))[1])
    with pytest.raises(ZeroDivisionError):
        ask(runtime)
    assert counted(client)["vismem_decoding"] == 0


def test_memories_per_answer_are_of_answers_as_the_evaluation_s(client: TestClient, runtime: Runtime) -> None:
    for options in ({"max_new_tokens": 1}, {"memory": "short"}, {"memory": "off"}):
        ask(runtime, **{"max_new_tokens": 6, **options})
    with closing(begin(runtime, max_new_tokens=6)) as left:  # type: ignore[type-var]
        next(left)  # and is read no further
    names = [f"vismem_memories_per_answer_{part} {kind}" for kind in ("short", "long") for part in ("count", "sum")]
    assert [counted(client)[name] for name in names] == [0, 0, 0, 0]
    usages = [ask(runtime, max_new_tokens=tokens)[-1].usage for tokens in (2, 6, 12)]
    invoked = [sum(usage.memories.get(kind, 0) for usage in usages if usage) for kind in ("short", "long")]
    assert sum(invoked) > 0
    assert [counted(client)[name] for name in names] == [3, invoked[0], 3, invoked[1]]


@pytest.mark.parametrize("lineage", ['{"memories_per_answer": {"short": 0.25, "long": 0}}', "{}", None])
def test_the_evaluation_s_memories_per_answer_are_shown_where_the_bundle_names_them(
    lineage: str | None, client: TestClient, runtime: Runtime, tmp_path: Path
) -> None:
    if lineage is not None:
        (tmp_path / "lineage.json").write_text(lineage)
    runtime.metrics.show_evaluation(tmp_path)
    shown = {name: value for name, value in counted(client).items() if name.startswith("vismem_evaluation_")}
    named = {f"vismem_evaluation_memories_per_answer {kind}": value for kind, value in (("short", 0.25), ("long", 0))}
    assert shown == (named if "memories" in (lineage or "") else {})


def test_a_fault_before_an_answer_begins_is_counted_and_a_refusal_is_not(
    client: TestClient, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise errors.pop()

    errors = [RequestError("has no pixels", "IMAGE"), MemoryError()]
    monkeypatch.setattr(runtime.executor, "prepare", fail)
    for kind, failures in ((MemoryError, 1), (RequestError, 1)):
        with pytest.raises(kind):
            ask(runtime)
        assert counted(client)["vismem_failures_total"] == failures


@pytest.mark.parametrize("broken", ["join", "choose"])
def test_a_runtime_whose_executor_stays_broken_ends_and_one_that_recovers_goes_on(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(count: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(runtime.executor, broken, lambda *_: 1 / 0)
            for _ in range(count):
                with pytest.raises(ZeroDivisionError):
                    ask(runtime)

    for _ in range(2):
        fail(answering.FAULTS - 1)
        ask(runtime, max_new_tokens=1)
    fail(answering.FAULTS)
    assert runtime.thread is not None
    runtime.thread.join(10)
    with pytest.raises(Busy, match="the server stops"):
        ask(runtime)

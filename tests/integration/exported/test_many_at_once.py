"""Many answers at once: each is as it is alone, whoever leaves, whatever fails."""

import collections
import contextlib
import itertools
import math
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import tiny
from pictures import pictures

from vismem.generation.onnx_executor import OnnxExecutor
from vismem.serving.answering import Busy, Runtime


def test_answers_together_are_each_as_alone_however_many_come_and_go(runtime):
    """Four times as many as there are places, of several settings; every third is left in the middle."""
    asked = [
        (sample, {"max_new_tokens": 4 + 3 * (at % 5), "temperature": float(at % 2), "seed": at, "memory": at % 4 != 3})
        for at, sample in enumerate(tiny.samples() * 2)
    ]
    several = Runtime.open(runtime.executor.bundle.folder, rows=6)

    def answer(at, of):
        sample, options = asked[at]
        with contextlib.closing(of.generate(pictures(sample), sample.question, **options)) as chunks:
            return list(itertools.islice(chunks, 2 if at % 3 == 2 else None))

    alone = [answer(at, runtime) for at in range(len(asked))]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(answer, range(len(asked)), [several] * len(asked)))
    assert together == alone
    assert {chunk.event for chunks in alone for chunk in chunks} == {"token", "short", "long", "end"}


def test_an_answer_that_nobody_reads_any_more_is_not_decoded_on(runtime, monkeypatch):
    sample, calls, decoder = tiny.samples()[0], [], runtime.executor.bundle.decoder
    chunks = runtime.generate(pictures(sample), sample.question, max_new_tokens=2000, memory=False)
    monkeypatch.setattr(runtime.executor.bundle, "decoder", lambda **given: calls.append(1) or decoder(**given))
    runtime.executor.stops, stops = frozenset(), runtime.executor.stops
    try:
        next(chunks)
        chunks.close()
        assert list(chunks) == []
        whole = list(runtime.generate(pictures(sample), sample.question, max_new_tokens=3, memory=False))
    finally:
        runtime.executor.stops = stops
    assert len(whole) == 4
    assert len(calls) < 100


@pytest.mark.parametrize("every", [math.inf, 0.0])
def test_a_stop_string_ends_the_decoding_also_of_an_answer_that_is_taken_whole(runtime, every):
    alone, sample = Runtime(OnnxExecutor(runtime.executor.bundle)), tiny.samples()[0]
    alone.executor.stops = frozenset()

    def answer(**options):
        return list(itertools.chain(*alone.stream(pictures(sample), sample.question, memory=False, **options)))

    begins = "".join(chunk.text for chunk in answer(max_new_tokens=9)[:-1])  # without what may be half a character
    assert len(begins) > 1
    decoded = partial(alone.metrics.registry.get_sample_value, "vismem_tokens_total")
    before = decoded()
    whole = answer(max_new_tokens=2000, stop=[begins], every=every)
    alone.close()
    assert whole[-1].usage.finish == "stop"
    assert decoded() - before < 1000


def test_what_is_decoded_in_a_long_interval_comes_together(runtime):
    endless, sample = Runtime(OnnxExecutor(runtime.executor.bundle)), tiny.samples()[0]
    endless.executor.stops = frozenset()
    first, *others = endless.stream(pictures(sample), sample.question, max_new_tokens=200, every=1e6)
    assert len(others) == 1
    alone = list(endless.generate(pictures(sample), sample.question, max_new_tokens=200))
    assert first + others[0] == alone


@pytest.mark.parametrize("every", [0.0, 1e6])
def test_what_was_decoded_before_a_fault_comes_before_it(runtime, monkeypatch, every):
    several, sample = Runtime(OnnxExecutor(runtime.executor.bundle)), tiny.samples()[0]
    expected, choose, calls = list(several.generate(pictures(sample), sample.question)), several.executor.choose, []

    def fails_at_the_fourth(asked):
        calls.append(1)
        return choose(asked) if len(calls) < 4 else 1 / 0

    monkeypatch.setattr(several.executor, "choose", fails_at_the_fourth)
    found, stream = [], several.stream(pictures(sample), sample.question, every=every)
    with pytest.raises(ZeroDivisionError):
        collections.deque(map(found.extend, stream))
    assert found == expected[:3]


@pytest.mark.parametrize("failing", range(1, 12))
def test_a_fault_at_any_call_gives_an_error_or_the_whole_answer_and_never_another(runtime, monkeypatch, failing):
    several = Runtime(OnnxExecutor(runtime.executor.bundle), rows=2)
    bundle, calls = runtime.executor.bundle, itertools.count(1)
    samples, decoder = tiny.samples()[:4], bundle.decoder

    def answer(sample):
        return [c.token for c in several.generate(pictures(sample), sample.question, max_new_tokens=5)]

    def tried(sample):
        with contextlib.suppress(ZeroDivisionError):
            return answer(sample)

    expected = list(map(answer, samples))
    with monkeypatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setattr(bundle, "decoder", lambda **given: 1 / 0 if next(calls) == failing else decoder(**given))
        found = list(pool.map(tried, samples))
    assert all(tokens in (None, whole) for tokens, whole in zip(found, expected, strict=True))
    assert None in found
    assert list(map(answer, samples)) == expected


def test_a_runtime_that_is_closed_ends_what_is_decoded_and_what_waits(runtime):
    few = Runtime(OnnxExecutor(runtime.executor.bundle), rows=1)
    few.executor.stops = frozenset()
    sample = tiny.samples()[0]
    running, waiting = (few.generate(pictures(sample), sample.question, max_new_tokens=2000) for _ in range(2))
    next(running)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(next, waiting)
        while not few.waiting:
            time.sleep(0.01)
        few.close()
        for left in (lambda: list(running), asked.result, lambda: list(few.generate(pictures(sample), "what?"))):
            with pytest.raises(Busy, match="the server stops"):
                left()
    assert not few.thread.is_alive()
    Runtime(OnnxExecutor(runtime.executor.bundle)).close()


def test_between_two_that_join_the_running_ones_get_a_token(runtime, monkeypatch):
    several, sample, seen = Runtime(OnnxExecutor(runtime.executor.bundle), rows=4), tiny.samples()[0], []
    join, choose = several.executor.join, several.executor.choose
    monkeypatch.setattr(several.executor, "choose", lambda asked: (seen.append("token"), choose(asked))[1])

    def joins(*given):
        seen.append("joins")
        while len(several.waiting) < 4 - seen.count("joins"):
            time.sleep(0.01)
        return join(*given)

    monkeypatch.setattr(several.executor, "join", joins)
    asked = [several.generate(pictures(sample), sample.question, max_new_tokens=9) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(list, asked))
    assert seen[:7] == ["joins", "token"] * 3 + ["joins"]
    several.close()


def test_what_nobody_reads_any_more_is_neither_decoded_nor_read(runtime, monkeypatch):
    few, sample, left = Runtime(OnnxExecutor(runtime.executor.bundle)), tiny.samples()[0], threading.Event()
    chunks = few.generate(pictures(sample), sample.question, gone=left)
    left.set()
    for part in ("prepare", "read", "join"):
        monkeypatch.setattr(few.executor, part, lambda *_, **__: pytest.fail("work for nobody"))
    for ask in (lambda: next(chunks), lambda: few.generate(pictures(sample), sample.question, gone=left)):
        with pytest.raises(Busy, match="nobody reads"):
            ask()
    assert not few.places
    few.close()


def test_an_iterator_that_was_never_begun_asks_for_nothing(runtime):
    sample = tiny.samples()[0]
    runtime.generate(pictures(sample), sample.question).close()
    assert not runtime.waiting
    assert not runtime.places


def test_a_fault_reaches_its_callers_and_the_next_are_answered(runtime, monkeypatch):
    sample = tiny.samples()[0]
    forgetful = Runtime(OnnxExecutor(runtime.executor.bundle))  # it reads every question anew

    def ask():
        return list(forgetful.generate(pictures(sample), sample.question, max_new_tokens=4))

    expected = ask()
    for part in ("vision", "decoder"):
        with monkeypatch.context() as patch:
            patch.setattr(runtime.executor.bundle, part, lambda **_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                ask()
        assert ask() == expected
    decoder, left = runtime.executor.bundle.decoder, iter([True, True])  # it fails in the middle of the answer
    with monkeypatch.context() as patch:
        patch.setattr(
            runtime.executor.bundle, "decoder", lambda **given: decoder(**given) if next(left, None) else 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            ask()
    assert ask() == expected


def test_a_fault_while_it_closes_leaves_nobody_waiting(runtime, monkeypatch):
    few, sample = Runtime(OnnxExecutor(runtime.executor.bundle), rows=1), tiny.samples()[0]
    few.executor.stops = frozenset()
    running, waiting = (few.generate(pictures(sample), sample.question, max_new_tokens=2000) for _ in range(2))
    next(running)

    def close_and_fail(*_):
        few.closed = True
        raise ZeroDivisionError

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(next, waiting)
        while not few.waiting:
            time.sleep(0.01)
        monkeypatch.setattr(few.executor, "append", close_and_fail)
        with pytest.raises(ZeroDivisionError):
            list(running)
        with pytest.raises(Busy, match="the server stops"):
            asked.result(timeout=20)


def test_who_waits_is_taken_under_the_lock_under_which_the_others_are_counted(runtime):
    several, owned = Runtime(OnnxExecutor(runtime.executor.bundle), rows=2), []

    class Watched(deque):
        def popleft(self):
            owned.append(several.changed._is_owned())
            return super().popleft()

    several.waiting = Watched()
    with ThreadPoolExecutor(4) as pool:
        samples = tiny.samples()[:4]
        list(pool.map(lambda s: list(several.generate(pictures(s), s.question, max_new_tokens=2)), samples))
    assert owned == [True] * 4

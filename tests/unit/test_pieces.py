"""Tokens from the thread that decodes to an answer's reader: all of them, in order, and together where they may be."""

import itertools
import threading
import time

import pytest

from vismem.serving.pieces import Handover

LONG = 1e6  # seconds: what waits for them hangs


def taken(handed: Handover) -> list[list[int]]:
    """All that is taken until the end."""
    found, ended = list[list[int]](), False
    while not ended:
        tokens, ended = handed.take()
        found.append(tokens)
    return found


@pytest.mark.parametrize("every", [0.0, 1e-5, 1e-3, LONG])
def test_all_tokens_are_taken_once_and_in_order(every: float) -> None:
    handed = Handover(every)

    def decode() -> None:
        for token in range(3000):
            handed.put(token)
        handed.end()

    thread = threading.Thread(target=decode)
    thread.start()
    found = taken(handed)
    thread.join()
    assert list(itertools.chain(*found)) == list(range(3000))
    assert all(found[:-1])  # none is empty but the last


def test_the_first_comes_at_once_and_the_others_together_with_the_end() -> None:
    handed = Handover(LONG)
    handed.put(1)
    assert handed.take() == ([1], False)

    def decode() -> None:
        for token in (2, 3):
            time.sleep(0.01)
            handed.put(token)
        handed.end()

    thread = threading.Thread(target=decode)
    thread.start()
    assert handed.take() == ([2, 3], True)
    thread.join()


def test_a_token_need_not_wait_for_the_one_after_it() -> None:
    handed = Handover(0.02)
    handed.put(1)
    assert handed.take() == ([1], False)
    handed.put(2)  # and nothing more: the thread that decodes is busy
    assert handed.take() == ([2], False)


def test_a_reader_that_waits_is_woken_by_the_next_token_and_by_the_end() -> None:
    handed, found = Handover(0.0), list[tuple[list[int], bool]]()
    reader = threading.Thread(target=lambda: found.extend(handed.take() for _ in range(3)))
    reader.start()
    for token in (1, 2):
        handed.put(token)
        while handed.tokens:
            time.sleep(0.001)
    handed.end()
    reader.join()
    assert found == [([1], False), ([2], False), ([], True)]


@pytest.mark.parametrize("every", [0.0, LONG])
def test_what_ended_an_answer_early_is_kept_behind_its_tokens(every: float) -> None:
    handed = Handover(every)
    handed.put(1)
    assert handed.take() == ([1], False)
    handed.put(2)
    handed.end(ValueError("out of memory"))
    assert handed.take() == ([2], True)
    assert str(handed.error) == "out of memory"

"""Texts at which an answer stops: what they cost, whatever a client sends, and where they leave memories."""

from typing import Any

import pytest
from tokenizers import Tokenizer

from vismem.models.kinds import MemoryKind
from vismem.runtime.limits import RequestError, check_stops
from vismem.runtime.prompt import TextStream
from vismem.serving.pieces import Event, Pieces, Usage

TOKENIZER = Tokenizer.from_file("assets/tiny-vlm/tokenizer.json")

SHORT, INVOKE = MemoryKind.SHORT, -1


class Counted(str):
    """A text that counts how often a part of it is taken."""

    parts = 0

    def __getitem__(self, place: Any) -> str:
        Counted.parts += 1
        return super().__getitem__(place)


def test_a_long_stop_costs_no_more_than_the_text_that_is_held_back() -> None:
    words = TOKENIZER.encode("how many red circles are there").ids
    text = TextStream(TOKENIZER, [Counted("x" * 20_000), "circles are"])
    said = [text.add(word) for word in words]
    assert TOKENIZER.decode(words).startswith("".join(said))
    assert text.stopped
    assert Counted.parts <= len("how many red circles are there") * len(words)


@pytest.mark.parametrize(
    ("stops", "said"),
    [
        (["a"] * 5, "STOP holds 5 texts: send at most 4"),
        (["a", "\N{SNOWMAN}" * 86], "STOP holds a text of 258 bytes: the limit is 256"),
    ],
)
def test_more_or_longer_texts_than_cost_nothing_are_refused(stops: list[str], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        check_stops(stops)
    check_stops(["a" * 256] * 4)


def pieces_of(tokens: list[int], *stop: str) -> tuple[str, list[tuple[Event, int]], Pieces]:
    """An answer's text, its memories with how many characters stand before each, and what made them."""
    pieces = Pieces(TextStream(TOKENIZER, stop))
    chunks = []
    for token in tokens:
        if not pieces.text.stopped:
            chunks += pieces.add(token, SHORT if token == INVOKE else None)
    read = len(chunks)
    chunks += pieces.finish(Usage("stop", 1, 1, {}, 0.0))
    assert [chunk.token for chunk in chunks[:-1]] == tokens[: len(chunks) - 1]
    assert len(chunks) > read
    said, memories = "", list[tuple[Event, int]]()
    for chunk in chunks:
        if chunk.event == SHORT.value:
            memories.append((chunk.event, len(said)))
        said += chunk.text
    assert (pieces.words, pieces.memories[SHORT.value]) == (len(chunks) - 1 - len(memories), len(memories))
    return said, memories, pieces


@pytest.mark.parametrize("stop", ["ed circle", "red circles are missing", "circles", "w many red c", "\0"])
@pytest.mark.parametrize("before", [[0], [2], [3], [3, 4], [2, 2, 6]])
def test_a_memory_keeps_its_place_where_a_stop_may_have_begun(stop: str, before: list[int]) -> None:
    words = TOKENIZER.encode("how many red circles are there").ids
    tokens = [t for at, word in enumerate(words) for t in [INVOKE] * before.count(at) + [word]]
    tokens += [INVOKE] * before.count(len(words))
    whole, memories, _ = pieces_of(tokens)
    assert memories == [(SHORT.value, len(TOKENIZER.decode(words[:at]))) for at in before]
    said, found, pieces = pieces_of(tokens, stop)
    end = whole.find(stop) if stop in whole else len(whole)
    assert said == whole[:end]
    assert found == [(kind, min(place, end)) for kind, place in memories][: len(found)]
    assert pieces.text.stopped == (stop in whole)
    if not pieces.text.stopped:
        assert len(found) == len(memories)

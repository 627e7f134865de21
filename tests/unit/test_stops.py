"""Texts at which an answer stops: what they cost, whatever a client sends."""

from typing import Any

import pytest
from tokenizers import Tokenizer

from vismem.runtime.limits import RequestError, check_stops
from vismem.runtime.prompt import TextStream

TOKENIZER = Tokenizer.from_file("assets/tiny-vlm/tokenizer.json")


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

"""What clients exchange with a model: an answer out of its pieces."""

from vismem.serving.exchange import Answer, Invoked, Token


def test_a_memory_s_place_is_where_it_cuts_the_answer_in_two() -> None:
    pieces = [(" two", "token"), ("", "short"), (" red\n", "token"), ("", "long"), ("cups ", "token"), ("", "short")]
    answer = Answer.of([Token(text, event) for text, event in pieces], {}, 0.0)
    assert answer == "two red\ncups"
    assert answer.invocations == (Invoked("short", 3), Invoked("long", 8), Invoked("short", 12))
    parts = [(answer[: memory.place], answer[memory.place :]) for memory in answer.invocations]
    assert parts == [("two", " red\ncups"), ("two red\n", "cups"), ("two red\ncups", "")]

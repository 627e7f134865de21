"""Reading answers: every rule by itself, their order, and what must stay unparsed."""

import pytest

from vismem.data.answer_forms import AnswerKind, answer_form, normalise
from vismem.data.sample import Sample
from vismem.evaluation.answers import UNPARSED, Extraction, extract, score

ANIMALS = ("a cat", "a dog", "a fox", "an owl")
COLOURS = ("red", "blue", "green")


def read(text: str, choices: tuple[str, ...], answer: str = "B") -> Extraction:
    return extract(text, answer_form("Which?", answer, choices))


@pytest.mark.parametrize(
    ("text", "value", "rule"),
    [
        (r"so \boxed{A} or rather \boxed{\text{B}}", "a dog", "boxed"),
        ("<answer>(C)</answer>", "a fox", "answer tag"),
        ("The answer is A. Final answer: D", "an owl", "final answer"),
        ("The answer is A, no, the answer is B.", "a dog", "answer stated"),
        ("The correct option is (c)", "a fox", "answer stated"),
        ("it has a tail. answer: a fox", "a fox", "answer stated"),
        ("**Answer:** B. a dog", "a dog", "answer stated"),
        ("B", "a dog", "whole reply"),
        ("(b).", "a dog", "whole reply"),
        ("an owl", "an owl", "whole reply"),
        ("C\nbecause it has a red tail", "a fox", "first line"),
        ("because it has a red tail\nC", "a fox", "last line"),
        ("It has a tail, so C is correct.", "a fox", "option is right"),
        ("I see a tail, so it must be C", "a fox", "conclusion"),
        ("this looks like a fox to me", "a fox", "one option"),
        ("<think>A? The answer is A.</think> answer: B", "a dog", "answer stated"),
    ],
)
def test_each_rule_reads_its_form(text: str, value: str, rule: str) -> None:
    found = read(text, ANIMALS)
    assert (found.value, found.rule) == (value, rule)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "answer:",
        "It is A or B",
        "I would not choose B",
        "The tail is like that in B",  # a letter in prose is no answer
        "The answer is clear: B",
        "answer: E",  # there are only four options
        "Option A is tempting, but the answer is E",  # an earlier letter must not be taken instead
        "The answer is B. No: the answer is none of these",
        "a cat beside a dog",
        "A big tail",  # the article
        "<think>the answer is B",  # never came out of its thoughts
        r"\boxed{7}",
    ],
)
def test_what_no_rule_can_read_is_unparsed(text: str) -> None:
    assert read(text, ANIMALS) == Extraction(None, UNPARSED)


def test_our_own_format_is_read_behind_its_last_mark() -> None:
    assert read("3 red, 2 blue, answer: red", COLOURS, "red").value == "red"
    assert read("answer: red, wait, answer: blue", COLOURS, "red").value == "blue"
    words = "first red circle, then blue square. answer: circle, square"
    assert read(words, (), "circle, square").value == "circle, square"


def test_an_option_inside_a_longer_one_does_not_count_twice() -> None:
    assert read("I think the red circle it is", ("red", "red circle", "blue"), "red").value == "red circle"
    assert read("red or blue", COLOURS, "red").rule == UNPARSED


@pytest.mark.parametrize(
    ("question", "answer", "choices", "kind"),
    [
        ("Which?", "a fox", ANIMALS, AnswerKind.CHOICE),
        ("Which?", "C", ANIMALS, AnswerKind.CHOICE),
        ("Which?", "A, C", ANIMALS, AnswerKind.LETTERS),
        ("Which?", "a horse", ANIMALS, AnswerKind.CHOICE),  # for `validate` to find
        ("Which? (A) 5 (B) 6", "6", (), AnswerKind.CHOICE),
        ("Which? a) 5 b) 6", "B", (), AnswerKind.CHOICE),
        ("Which? (A) 5 (B) 6", "7", (), AnswerKind.NUMBER),
        ("Which? (A) 5 (B) 6", "A and B", (), AnswerKind.LETTERS),
        ("Which of the figures?", "D", (), AnswerKind.LETTERS),
        ("Is it?", "Yes.", (), AnswerKind.YES_NO),
        ("Is it?", "no", ("yes", "no"), AnswerKind.YES_NO),
        ("Is it?\nA. yes\nB. no", "no", ("yes", "no"), AnswerKind.CHOICE),
        ("How many?", "three", (), AnswerKind.NUMBER),
        ("How much?", "$1,234.50", (), AnswerKind.NUMBER),
        ("How much?", "12 cm", (), AnswerKind.NUMBER),
        ("How many?", "2", ("1", "2"), AnswerKind.CHOICE),
        ("When?", "12:30", (), AnswerKind.TEXT),
        ("What?", "12 apples", (), AnswerKind.TEXT),
        ("What?", "the second", (), AnswerKind.TEXT),
        ("Who?", "NASA", (), AnswerKind.TEXT),
        ("What?", "", (), AnswerKind.TEXT),
    ],
)
def test_the_kind_of_an_answer_follows_from_question_reference_and_choices(
    question: str, answer: str, choices: tuple[str, ...], kind: AnswerKind
) -> None:
    assert answer_form(question, answer, choices).kind is kind


def test_letters_count_only_where_the_question_offers_them() -> None:
    bare = Sample("1", (), "Which colour?", "red", choices=COLOURS)
    lettered = Sample("2", (), "Which colour?\nA. red\nB. blue\nC. green", "red", choices=COLOURS)
    by_letter = Sample("3", (), "Which colour?", "A", choices=COLOURS)
    assert score(bare, "answer: a") == 0.0
    assert score(lettered, "answer: a") == 1.0
    assert score(by_letter, "answer: red") == 1.0
    assert score(by_letter, "answer: B") == 0.0


def test_the_score_is_exact_after_case_spacing_and_final_stop() -> None:
    sample = Sample("1", (), "Describe.", "red circle, blue square")
    assert score(sample, "answer: Red  circle , blue square .") == 1.0
    assert score(sample, "answer: red circle") == 0.0
    assert score(sample, "answer: red circle, blue square, red circle") == 0.0
    assert score(sample, "red circle, blue square") == 1.0
    assert normalise(" A  cat !") == "a cat"


def test_a_reference_target_scores_one() -> None:
    sample = Sample("1", (), "How many?", "2", choices=("1", "2", "3"), rationale="red at left, red at right, 2 red.")
    assert score(sample, f"{sample.rationale} answer: {sample.answer}") == 1.0


LETTERED = "Which letter marks the thorax?\nA. {}\nB. {}\nC. {}"


@pytest.mark.parametrize("texts", ["KMP", "CAB", "BKA", "kac"])
def test_where_options_are_letters_themselves_a_reply_names_the_one_that_it_is_shown_under(texts: str) -> None:
    """As in AI2D's diagrams, which MMStar has: "A" is the first option, not the one that says A."""
    for gold in "ABC":
        sample = Sample("1", (), LETTERED.format(*texts), gold, choices=tuple(texts))
        own = texts["ABC".index(gold)]
        for shape in ("{}", "({})", "The answer is {}.", "{} because of the line"):
            assert [letter for letter in "ABC" if score(sample, shape.format(letter))] == [gold], shape
        assert score(sample, f"{gold}. {own}") == score(sample, f"({gold}) {own}") == 1.0
    assert score(sample, "Q") == 0.0


def test_an_option_that_is_a_letter_may_be_named_by_it_where_no_option_is_shown_under_it() -> None:
    sample = Sample("1", (), LETTERED.format(*"KMP"), "B", choices=tuple("KMP"))
    assert [score(sample, reply) for reply in ("M", "m", "K", "The answer is M.")] == [1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    "choices", [("STOP", "Stop", "stop."), ("5 mA", "5 MA", "5 A"), ("Stop!", "Stop?", "Go"), ("aB", "AB", "ab")]
)
def test_options_that_differ_in_case_or_marks_alone_are_not_the_same(choices: tuple[str, ...]) -> None:
    for gold, own in zip("ABC", choices, strict=True):
        sample = Sample("1", (), LETTERED.format(*choices), gold, choices=choices)
        assert [score(sample, letter) for letter in "ABC"] == [float(letter == gold) for letter in "ABC"]
        assert [score(sample, option) for option in choices] == [float(option == own) for option in choices]


def test_letters_in_either_case_are_options_of_their_own() -> None:
    sample = Sample("1", (), "Which gene?", "a", choices=("a", "A", "b"))
    assert [score(sample, reply) for reply in ("a", "A", "b", "answer: a")] == [1.0, 0.0, 0.0, 1.0]


def test_options_of_the_same_words_are_told_apart_by_the_letter_of_the_reference() -> None:
    choices = ("red", "red", "blue")
    lettered, spelt = (Sample("1", (), LETTERED.format(*choices), gold, choices=choices) for gold in ("B", "red"))
    assert [score(lettered, reply) for reply in ("A", "B", "B. red", "red", "blue")] == [0.0, 1.0, 1.0, 0.0, 0.0]
    assert [score(spelt, reply) for reply in ("A", "B", "red", "C")] == [1.0, 1.0, 1.0, 0.0]


def test_a_reply_that_fits_several_options_alike_says_none_of_them() -> None:
    for reply in ("stop", "sToP", "I think it says sToP on it"):
        assert read(reply, ("STOP", "Stop", "Yield"), "Stop").rule == UNPARSED
    assert read("It says yield", ("STOP", "Stop", "Yield"), "Stop").value == "Yield"

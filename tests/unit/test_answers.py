"""Reading answers: every rule by itself, their order, and what must stay unparsed."""

import pytest

from vismem.data.sample import Sample
from vismem.evaluation.answers import UNPARSED, extract, normalise, score

ANIMALS = ("a cat", "a dog", "a fox", "an owl")
COLOURS = ("red", "blue", "green")


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
        ("I see a tail, so it must be C", "a fox", "one letter"),
        ("A tail and fur. Therefore B", "a dog", "one letter"),
        ("this looks like a fox to me", "a fox", "one option"),
        ("<think>A? The answer is A.</think> answer: B", "a dog", "answer stated"),
        ("The answer is clear: B", "a dog", "one letter"),
    ],
)
def test_each_rule_reads_its_form(text: str, value: str, rule: str) -> None:
    found = extract(text, ANIMALS)
    assert (found.value, found.rule) == (value, rule)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "answer:",
        "It is A or B",
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
    assert extract(text, ANIMALS) == extract("", ANIMALS)
    assert extract(text, ANIMALS).rule == UNPARSED


def test_our_own_format_is_read_behind_its_last_marker() -> None:
    assert extract("3 red, 2 blue, answer: red", COLOURS).value == "red"
    assert extract("answer: red, wait, answer: blue", COLOURS).value == "blue"
    assert extract("first red circle, then blue square. answer: circle, square", ()).value == "circle, square"


def test_an_option_inside_a_longer_one_does_not_count_twice() -> None:
    assert extract("I think the red circle it is", ("red", "red circle", "blue")).value == "red circle"
    assert extract("red or blue", COLOURS).rule == UNPARSED


def test_yes_and_no_inside_a_sentence_are_no_answer() -> None:
    assert extract("there is no red circle left of", ("yes", "no")).rule == UNPARSED
    assert extract("No, there is none", ("yes", "no")).value == "no"
    assert extract("yes", ("yes", "no")).value == "yes"


def test_an_open_answer_needs_a_marker_or_must_be_the_whole_reply() -> None:
    assert extract("3.", ()).value == "3"
    assert extract("The answer is 3.5", ()).value == "3.5"
    assert extract("first 3, then 4", ()).rule == UNPARSED
    assert extract("answer: ", ()).rule == UNPARSED


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
    assert normalise(" A  cat !") == "a cat"


def test_a_reference_target_scores_one() -> None:
    sample = Sample("1", (), "How many?", "2", choices=("1", "2", "3"), rationale="red at left, red at right, 2 red.")
    assert score(sample, f"{sample.rationale} answer: {sample.answer}") == 1.0

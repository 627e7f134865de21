"""Replies that are easy to misread, from `replies.yaml`: what is read, and what may not change it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from vismem.data.answer_forms import AnswerKind, answer_form, normalise, reference_value
from vismem.data.collate import target_text
from vismem.data.numbers import parse_number, same_number
from vismem.data.sample import Sample
from vismem.evaluation.answers import UNPARSED, read, score

GROUPS = yaml.safe_load((Path(__file__).parent / "replies.yaml").read_text())
CASES = [
    (Sample(group["about"], (), group["question"], group["answer"], choices=tuple(group["choices"])), reply, said)
    for group in GROUPS
    for reply, said in group["replies"]
]
NAMES = [f"{sample.id}: {reply!r}" for sample, reply, _ in CASES]


def agrees(value: str | None, said: str | None) -> bool:
    """Whether what was read is what was meant, numbers by their value."""
    if value is None or said is None:
        return value is said
    numbers = [number for text in (value, said) if (number := parse_number(text))]
    return same_number(*numbers) if len(numbers) == 2 else value.casefold() == said.casefold()


def test_there_are_enough_of_every_kind() -> None:
    assert len(CASES) >= 150
    assert all(len(group["replies"]) >= 3 for group in GROUPS)


@pytest.mark.parametrize(("sample", "reply", "said"), CASES, ids=NAMES)
def test_a_reply_is_read_as_it_was_meant_or_not_at_all(sample: Sample, reply: str, said: str | None) -> None:
    found = read(sample, reply)
    assert agrees(found.value, said), found
    assert (found.rule == UNPARSED) == (said is None)


@pytest.mark.parametrize(
    "change",
    [
        str.upper,
        str.lower,
        lambda reply: f"\n  {reply}\n ",
        lambda reply: reply + ("" if reply.endswith((".", "+", "^")) or not reply else "."),
        lambda reply: f"**{reply}**",
        lambda reply: f"<think>Option A? The answer is C. 99</think>\n{reply}",
    ],
    ids=["upper case", "lower case", "spaces", "final stop", "bold", "thoughts"],
)
def test_case_spaces_final_stops_bold_type_and_thoughts_change_nothing(change: Callable[[str], str]) -> None:
    changed = {}
    for sample, reply, said in CASES:
        if not agrees(value := read(sample, change(reply)).value, said):
            changed[change(reply)] = (said, value)
    assert changed == {}


@pytest.mark.parametrize("number", range(len(GROUPS)), ids=[group["about"] for group in GROUPS])
def test_the_reference_scores_in_every_form_that_people_use_and_no_other_choice_does(number: int) -> None:
    group = GROUPS[number]
    sample = next(sample for sample, _, _ in CASES if sample.id == group["about"])
    forms = ("{}", "{}.", "answer: {}", "The answer is {}.", r"\boxed{{{}}}", "<answer>{}</answer>", "Final answer: {}")
    form = answer_form(sample.question, sample.answer, sample.choices)
    own = reference_value(form, sample.answer)
    for shape in forms:
        assert score(sample, shape.format(sample.answer)) == 1.0, shape
        for letter, option in form.options.items():
            named = (option, *([letter, f"({letter})", f"{letter}. {option}"] if form.by_letter else ()))
            right = form.kind is not AnswerKind.LETTERS and option == own
            assert {score(sample, shape.format(name)) for name in named} == {float(right)}, (shape, option)


WORDS = ["red", "blue", "a", "the", "left", "is", "not", "12", "A", "B", "yes", "no", ",", ";", "(A)", "1/2", "%"]
CHOICES = ["red", "a dog", "12", "yes", "A", "B", "the blue one", ""]


@given(st.lists(st.sampled_from(WORDS), max_size=9), st.lists(st.sampled_from(CHOICES), max_size=5))
def test_the_target_of_training_scores_one_whatever_the_reference(answer: list[str], choices: list[str]) -> None:
    """But where the reference is none of the choices, which `validate` finds."""
    assume(normalise(" ".join(answer)))
    sample = Sample("1", (), "Which?", " ".join(answer), choices=tuple(choices), rationale="I see 3 dogs.")
    form = answer_form(sample.question, sample.answer, sample.choices)
    assert score(sample, target_text(sample)) == float(reference_value(form, sample.answer) is not None)


@given(st.text(max_size=200), st.sampled_from([sample for sample, _, _ in CASES]))
def test_no_text_makes_reading_fail(text: str, sample: Sample) -> None:
    assert score(sample, text) in (0.0, 1.0)
    assert score(replace(sample, answer=text or "?", choices=()), text) in (0.0, 1.0)


@pytest.mark.parametrize(
    "word", ["therefore, ", "(A) ", "the answer is ", "not a dog, ", "\\frac{1}", "1,", "yes, the answer is based on "]
)
def test_a_reply_that_repeats_itself_without_end_is_read_in_the_end(word: str) -> None:
    """Models do so; each reader's time grows with the length alone: with its square this would take hours."""
    for answer, choices in (("yes", ()), ("A", ("dog", "cat", "bird")), ("12", ()), ("A, C", ("x", "y", "z"))):
        read(Sample("i", (), "which?", answer, choices=choices), word * 40_000)

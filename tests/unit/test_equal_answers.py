"""When two rows say the same: answers that score alike, pictures that look alike, texts that are sound."""

import numpy as np
import pandas as pd
import pytest

from vismem.data.answer_forms import answer_form, canonical
from vismem.runtime.images import LOOK
from vismem.validation.compared import compare
from vismem.validation.texts import encoding_fault


@pytest.mark.parametrize(
    ("choices", "same", "other"),
    [
        ((), ["2", "2.0", "two", "4/2"], ["3", "2 cm"]),
        ((), ["12.5%", "12.50 percent"], ["12.5", "12.4%"]),
        ((), ["a cat", "cat", "Cat."], ["a dog"]),
        (("red", "blue", "green"), ["A, B", "B and A"], ["A, C"]),
        (("a cat", "cat"), ["a cat"], ["cat"]),
    ],
)
def test_answers_that_score_alike_have_one_text(choices: tuple[str, ...], same: list[str], other: list[str]) -> None:
    texts = {canonical(answer_form("Which?", answer, choices), answer) for answer in same}
    assert len(texts) == 1
    assert None not in texts
    assert not texts & {canonical(answer_form("Which?", answer, choices), answer) for answer in other}


def test_sets_of_letters_are_the_options_that_they_name() -> None:
    first, second = ("red", "blue", "green"), ("green", "red", "blue")
    assert canonical(answer_form("?", "A, B", first), "A, B") == canonical(answer_form("?", "B, C", second), "B, C")
    assert canonical(answer_form("?", "D", first), "D") is None


def test_a_question_is_found_at_any_picture_that_looks_alike_and_the_leak_at_the_nearest() -> None:
    base = np.linspace(0, 200, LOOK * LOOK * 3).astype(np.uint8)
    rows = [
        ("test", "far", 3, "which colour?", "red"),
        ("test", "near", 1, "how many?", "3"),
        ("train", "same", 0, "Which  colour?", "red"),
        ("train", "else", 0, "which colour?", "blue"),
    ]
    table = pd.DataFrame(
        [
            {
                "split": split, "shard": 0 if split == "test" else 1, "position": place, "id": image, "value": value,
                "asked": f"{image} {question}", "image_hashes": (image,), "tied": (image,),
                "looks": ((base + by).tobytes(),), "question": question,
            }
            for place, (split, image, by, question, value) in enumerate(rows)
        ]
    )  # fmt: skip
    found = compare(table, ["test", "train"], levels=9)
    assert found["near_leak"].to_dict() == {2: "test row 1", 3: "test row 1"}
    assert found["asked_in"].dropna().to_dict() == {2: "test row 0"}


@pytest.mark.parametrize(
    "text",
    [
        "\u201eSpa\u00df\u201c",
        "\u201cCAF\u00c9\u201d",
        "\u00abMARCH\u00c9\u00bb",
        "O\u00d9 EST LE CAF\u00c9\u00a0?",
        "3 \u00d7\u00a04",
        "MEN\u00dc\u2013x",
        "na\u00efve caf\u00e9",
    ],
)
def test_sound_words_before_quotes_and_dashes_are_not_called_damaged(text: str) -> None:
    assert encoding_fault([("question", text)]) is None


@pytest.mark.parametrize(
    "text",
    [
        "caf\u00e9",
        "\u00fcber",
        "\u201cquoted\u201d",
        "\u0414\u0430",
        "\u03b1\u03b2",
        "1\u00a0000",
    ],
)
def test_texts_that_were_read_by_another_encoding_are_found(text: str) -> None:
    damaged = text.encode().decode("cp1252", "ignore")
    assert "in UTF-8 read as another encoding" in str(encoding_fault([("question", damaged)]))

"""Files as VLMEvalKit writes them for each kind of benchmark: which rows count, whose score, by which reference."""

import json
from pathlib import Path

import pytest

from vismem.errors import UserError
from vismem.evaluation.scored import Scored, read_scored


def kit(folder: Path, dataset: str, *rows: dict[str, object]) -> list[Scored]:
    """What is read of a file of the model `m`."""
    file = folder / "m" / f"m_{dataset}.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps([{"index": place, "question": "?"} | row for place, row in enumerate(rows)]))
    return read_scored(file)


def test_of_mmmu_the_validation_part_counts_and_any_answer_of_a_list_is_right(tmp_path: Path) -> None:
    open_one = {"answer": """["Newton's law", '3.429']""", "split": "validation"}
    rows = [open_one | {"prediction": said} for said in ("3.429", "Newton's law", "3", ", ")]
    lettered = {"answer": "A", "A": "x", "B": "y", "prediction": "A"}
    rows += [lettered | {"split": split} for split in ("dev", "validation")]
    found = kit(tmp_path, "MMMU_DEV_VAL", *({"A": None, "B": None} | row for row in rows))
    assert [(row.id, row.score) for row in found] == [
        (f"MMMU_DEV_VAL-{place}", score) for place, score in ((0, 1), (1, 1), (2, 0), (3, 0), (5, 1))
    ]


@pytest.mark.parametrize("answer", ["[", "[{[]: 1}]", "[" * 10_000, "[]", "[1 + ]"])
def test_what_is_no_list_of_answers_is_one_answer(tmp_path: Path, answer: str) -> None:
    found = kit(tmp_path, "MMMU_DEV_VAL", *({"answer": answer, "prediction": said} for said in (answer, "1")))
    assert [row.score for row in found] == [1.0, 0.0]


@pytest.mark.parametrize("dataset", ["MMVet", "MV-MATH"])
def test_what_a_judge_scores_is_not_scored_by_words(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(UserError, match=f"a judge model scores {dataset}: give the file"):
        kit(tmp_path, dataset, {"answer": "-1<AND>-5", "prediction": "-1<AND>-5"})


def test_what_a_judge_has_read_but_not_scored_is_not_read_by_our_rules(tmp_path: Path) -> None:
    """VLMEvalKit's MathVista: `res` is what the judge took out of the prediction."""
    row = {"answer": "3", "prediction": "three or four", "res": "3", "log": "Succeed"}
    with pytest.raises(UserError, match="the file has no score of each: give the file of the bare predictions"):
        kit(tmp_path, "MathVista_MINI_gpt-4-turbo", row)
    (scored,) = kit(tmp_path / "scored", "MathVista_MINI_gpt-4-turbo", row | {"hit": 1})
    assert (scored.benchmark, scored.score) == ("MathVista_MINI", 1.0)


def test_lists_of_texts_count_by_a_rule_that_only_their_benchmark_knows(tmp_path: Path) -> None:
    row = {"answer": "['nokia', 'nokia']", "prediction": "nokia"}
    with pytest.raises(UserError, match="row 1: the answer is a list, and TextVQA_VAL counts those by a rule of its"):
        kit(tmp_path, "TextVQA_VAL", row)
    scored = kit(tmp_path / "scored", "TextVQA_VAL", row | {"score": 0.6})
    numbers = kit(tmp_path / "numbers", "Ours", {"answer": "[0, 4]", "prediction": "[0, 4]"})
    words = kit(tmp_path / "words", "MathVista_MINI", {"answer": "['a']", "prediction": "['a']"})
    assert [found[0].score for found in (scored, numbers, words)] == [0.6, 1.0, 1.0]


@pytest.mark.parametrize("dataset", ["BLINK_circular", "MMBench_DEV_EN_V11"])
def test_questions_that_are_asked_in_every_order_of_their_options_are_not_scored_one_by_one(
    tmp_path: Path, dataset: str
) -> None:
    rows = [{"A": "x", "B": "y", "answer": "A"}, {"A": "y", "B": "x", "answer": "B"}]
    with pytest.raises(UserError, match=f"asks a question of {dataset} in several orders of its options: give the"):
        kit(tmp_path, dataset, *(row | {"prediction": "A"} for row in rows))


@pytest.mark.parametrize(
    ("dataset", "name", "column", "scores"),
    [
        ("MMVet_gpt-4-turbo", "MMVet", "score", [0.7, 0.0]),
        ("LogicVista_gpt4o-mini", "LogicVista", "hit", [1, 0]),
        ("HallusionBench_auxmatch", "HallusionBench", "score", [True, False]),
        ("MMStar_openai_result", "MMStar", "hit", [1, 0]),
        ("BLINK_circular_exact_matching_result", "BLINK_circular", "hit", [1, 0]),
    ],
)
def test_a_file_with_the_kit_s_own_scores_is_its_benchmark_s(
    tmp_path: Path, dataset: str, name: str, column: str, scores: list[float]
) -> None:
    found = kit(tmp_path, dataset, *({"answer": "Yes", "prediction": "?", column: score} for score in scores))
    assert [(row.benchmark, row.id, row.score) for row in found] == [
        (name, f"{name}-{place}", float(score)) for place, score in enumerate(scores)
    ]


def test_of_options_that_are_pictures_the_letter_counts(tmp_path: Path) -> None:
    row = {"question": "Which is like <image>?", "A": "<image>", "B": "<image>", "C": "None", "answer": "B"}
    found = kit(tmp_path, "MUIRBench", *(row | {"prediction": said} for said in ("A", "B", "The answer is (B).", "C")))
    assert [answer.score for answer in found] == [0.0, 1.0, 1.0, 0.0]


def test_of_mathvista_s_choices_the_letter_counts(tmp_path: Path) -> None:
    row = {
        "question": "Which is it?\nChoices:\n(A) D\n(B) A\n(C) F", "question_type": "multi_choice",
        "answer": "A", "answer_option": "B",
    }  # fmt: skip
    found = kit(tmp_path, "MathVista_MINI", *(row | {"prediction": said} for said in ("B", "(B) A", "A", "C")))
    assert [(row.reference, row.score) for row in found] == [("B", 1.0), ("B", 1.0), ("B", 0.0), ("B", 0.0)]


def test_a_reference_that_is_a_number_is_no_score(tmp_path: Path) -> None:
    file = tmp_path / "20261127_200421_samples_Bench.jsonl"
    row = {"doc_id": 0, "target": 1, "filtered_resps": ["0"], "acc": {"pred": "0", "gold": "1"}}
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="line 1: no score, or several"):
        read_scored(file)
    file.write_text(json.dumps(row | {"acc": 0.0}) + "\n")
    assert [scored.score for scored in read_scored(file)] == [0.0]

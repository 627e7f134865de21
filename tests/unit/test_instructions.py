"""The instruction behind a question: which one, what it shows, and that a reply that follows it is read."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from vismem.config import Config, InstructionsConfig, JsonlSource, PrepareConfig, load_config
from vismem.data.answer_forms import AnswerKind, answer_form, reference_value
from vismem.data.collate import ANSWER_MARK, prompt_messages, target_text
from vismem.data.instructions import instructed
from vismem.data.prepare import prepare
from vismem.data.sample import Sample, read_samples
from vismem.evaluation.answers import read, score

ROOT = Path(__file__).parents[2]
GROUPS = yaml.safe_load((Path(__file__).parent / "replies.yaml").read_text())
SAMPLES = [Sample(g["about"], (), g["question"], g["answer"], choices=tuple(g["choices"])) for g in GROUPS]
LARGE = ("qwen2_5_vl_7b", "internvl3_5_8b", "llava_onevision_7b")
EACH = InstructionsConfig(**{kind.value: f"Give {kind.value}." for kind in AnswerKind})
COLOURS = ("red", "", "blue")


def asked(question: str, answer: str, *choices: str) -> str:
    return instructed(Sample("1", (), question, answer, choices=choices), EACH).question


def test_there_is_an_instruction_for_every_kind_and_by_default_none() -> None:
    assert {kind.value for kind in AnswerKind} == set(InstructionsConfig.model_fields)
    assert Config().prepare.instructions == InstructionsConfig()
    assert [instructed(sample, InstructionsConfig()) for sample in SAMPLES] == SAMPLES


def test_the_instruction_of_the_answer_s_kind_stands_behind_the_question() -> None:
    assert asked("How many?", "3") == "How many?\nGive number."
    assert asked("Is it?", "No") == "Is it?\nGive yes_no."
    assert asked("What?", "a lamp") == "What?\nGive text."
    assert asked("Which? A. x\nB. y", "A, B") == "Which? A. x\nB. y\nGive letters."


def test_options_that_the_question_does_not_show_are_shown_once() -> None:
    shown = "Which?\nA. red\nC. blue\nGive choice."
    assert asked("Which?", "red", *COLOURS) == asked("Which?", "C", *COLOURS) == shown
    assert asked("Which?\nA. red\nC. blue", "C", *COLOURS) == shown
    assert asked("Is it?", "no", "yes", "no") == "Is it?\nGive yes_no.", "the words say it"
    assert asked("Which point?", "B", "A", "B") == "Which point?\nGive choice.", "the picture shows them"


@pytest.mark.parametrize("profile", LARGE)
@pytest.mark.parametrize("sample", SAMPLES, ids=[sample.id for sample in SAMPLES])
def test_what_large_models_are_told_changes_no_reading_and_a_reply_that_follows_it_is_right(
    profile: str, sample: Sample
) -> None:
    told = instructed(sample, load_config(ROOT / "params.yaml", profile).prepare.instructions)
    before, after = (answer_form(one.question, one.answer, one.choices) for one in (sample, told))
    assert told.question.startswith(f"{sample.question}\n")
    assert (after.kind, after.options) == (before.kind, before.options)
    assert reference_value(after, told.answer) == reference_value(before, sample.answer)
    assert ANSWER_MARK in told.question.rpartition("\n")[2]
    assert score(told, target_text(told)) == 1.0
    reply = "First I look at A. It may be 7.\nThen at B, which is not it.\n{}".format
    assert score(told, reply(f"{ANSWER_MARK} {sample.answer}")) == 1.0
    for letter, option in after.options.items() if after.by_letter and after.kind is AnswerKind.CHOICE else ():
        assert read(told, reply(f"{ANSWER_MARK} {letter}")).value == option


def test_prepare_writes_it_into_the_rows_that_every_later_step_reads(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    row = {"id": "1", "image": "a.png", "prompt": "Which colour?", "answer": "red", "choices": ["red", "blue"]}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    source = JsonlSource(kind="jsonl", path=tmp_path / "test.jsonl", split="test")
    digests = []
    for instructions in (InstructionsConfig(), EACH):
        out = tmp_path / f"out{len(digests)}"
        out.mkdir()
        prepare(Config(prepare=PrepareConfig(sources=(source,), instructions=instructions)), {}, out)
        digests.append(json.loads((out / "stats.json").read_text())["data_sha256"])
    (sample,) = read_samples(out / "test")
    assert prompt_messages(sample)[0]["content"][-1]["text"] == "Which colour?\nA. red\nB. blue\nGive choice."
    assert sample.answer == "red"
    assert digests[0] != digests[1], "other words are other data"

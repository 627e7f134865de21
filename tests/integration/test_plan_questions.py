"""What `vismem plan` makes of the questions: how many train a run, and how many images each has."""

from pathlib import Path

import pytest
from test_plan import ASKED, LARGE, MACHINE, config_of, planned_and_measured, run, sums

from vismem.config import parse_config
from vismem.data.source_files import train_questions
from vismem.plan.model import Questions
from vismem.plan.rehearsal import Rehearsal


@pytest.mark.parametrize("name", ["stage2", "evaluate"])
def test_questions_about_several_images_hold_what_is_planned(tiny_base: Path, name: str) -> None:
    config = config_of(tiny_base, LARGE)
    plan, real = planned_and_measured(name, config, Questions(ASKED.size, images=3))
    assert sums(plan) == pytest.approx(sums(real), rel=0.02)
    assert plan.bytes > Rehearsal(name, config, MACHINE, ASKED).rehearse().bytes


def test_a_number_of_questions_that_no_file_tells_is_called_assumed(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes, files = {"kind": "scenes", "train": 40}, {"kind": "nlvr", "path": f"{tmp_path}"}
    fetched = {"kind": "dvc", "rev": "v1", "path": "nlvr", "sources": [{**files, "path": "nlvr", "split": "train"}]}
    lines = {"kind": "jsonl", "path": f"{tmp_path / 'none.jsonl'}", "split": "train"}
    trained = files | {"split": "train"}
    assert train_questions(parse_config({"prepare": {"sources": [scenes, files | {"split": "test"}]}})) == 40
    for other in (trained, fetched, lines):
        assert train_questions(parse_config({"prepare": {"sources": [scenes, other]}})) is None
    _, out, _ = run(capsys, tiny_base, "--set", f"prepare.sources={[scenes, trained]}", "--gpus", "1xH100", "stage1")
    assert "\nSteps are those of 1,000 train questions, assumed (--questions).\n" in out


def test_steps_and_hours_are_those_of_the_train_questions(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "train.jsonl"
    rows.write_text("{}\n\n" * 80)
    other = {"kind": "jsonl", "path": f"{rows}", "split": "test"}
    sources = f"prepare.sources={[other | {'split': 'train'}, other]}"
    passes = ("--set", "stage1.steps=0", "--set", "grpo.batch_size=4", "--gpus", "1xH100", "stage1")
    for given, train, steps in ((("--set", sources), 80, 40), (("--questions", "8000"), "8,000", "4,000")):
        for cluster in (0, 1):
            hours = ("--set", "cluster.training_hours=1", "--set", "grpo.max_new_tokens=4000") if cluster else ()
            status, out, err = run(capsys, tiny_base, *given, *passes, *hours)
            assert status == 0
            assert f"\n  10 and {steps} steps: " in out
            assert f"\nSteps are those of {train} train questions (--questions).\n" in out
            assert ("h, and its task on the cluster is stopped after 1: set" in err) == (cluster and steps == "4,000")

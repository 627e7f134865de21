"""The study's figures from hand-made predictions, worked out by hand; and the page that shows them."""

import json
import math
from pathlib import Path

import pytest
import yaml

from vismem.config import Config, parse_config
from vismem.data.sample import Capability
from vismem.data.tasks import TASKS
from vismem.evaluation.metrics import summarise
from vismem.evaluation.predictions import Prediction
from vismem.evaluation.study_figures import (
    ORDER,
    Claim,
    Evaluation,
    bar,
    compare,
    judge,
    pool,
    summarise_arms,
    transfer,
    yes_no_tasks,
)
from vismem.evaluation.study_page import render, table
from vismem.evaluation.study_report import changed_parameters, training
from vismem.study import plan, trained_half

OPTIONS = {"resamples": 200}


def evaluation(seed: int, rights: dict[str, str], tasks: str | None = None) -> Evaluation:
    """One seed; "1101" is an arm's score on each item, `tasks` one letter an item ("y": answered yes or no)."""
    count = len(rights["vanilla"])
    answers = {
        arm: [answer(i, int(r), (tasks or "c" * count)[i]) for i, r in enumerate(row)] for arm, row in rights.items()
    }
    seconds = {arm: 0.01 * (1 + place) * (1 + seed) for place, arm in enumerate(rights)}
    return Evaluation(seed, summarise(answers, seconds, seed=seed, resamples=200), answers)


def answer(place: int, right: int, task: str) -> Prediction:
    reference = "yes" if task == "y" else "red"
    said = reference if right else "no"
    return Prediction(
        id=f"test-{place}", task=task, capability="understanding", source="hand", question="?", reference=reference,
        text=said, marked_text=said, extracted=said, rule="whole reply", score=float(right), invocations=(),
        answer_length=1, finished=True,
    )  # fmt: skip


ARMS = ("vanilla", "vismem", "short_only", "random_25", "random_100")
TWO = (
    evaluation(0, dict(zip(ARMS, ("1000", "1110", "1010", "1000", "0010"), strict=True))),
    evaluation(1, dict(zip(ARMS, ("1100", "1110", "0110", "0110", "0000"), strict=True))),
)


def test_an_arm_has_its_mean_and_spread_over_seeds_and_its_gain_over_all_items() -> None:
    figures = summarise_arms(TWO, **OPTIONS)
    vanilla, vismem = figures["arms"]["vanilla"], figures["arms"]["vismem"]
    assert vanilla["seeds"] == {0: 25.0, 1: 50.0}
    assert (vanilla["mean"], vismem["mean"], vismem["spread"]) == (37.5, 75.0, 0.0)
    assert vanilla["spread"] == pytest.approx(25 / math.sqrt(2))
    assert vanilla["gain"] is None
    assert vismem["gain"]["delta"] == 37.5
    assert vismem["gain"]["p"] == 0.25  # three items better, none worse: 2 / 2**3
    assert [gain["delta"] for gain in vismem["gain_by_seed"].values()] == [50.0, 25.0]
    assert figures["arms"]["short_only"]["gain"]["delta"] == 12.5
    assert vismem["seconds"] == pytest.approx((0.02 + 0.04) / 2)
    assert vismem["overhead"] == pytest.approx([1.0, 1.0])
    assert figures["pooled"]["n"] == 8


def test_one_seed_has_no_spread() -> None:
    assert summarise_arms(TWO[:1], **OPTIONS)["arms"]["vismem"]["spread"] is None


def test_pooled_items_keep_apart_what_seeds_call_by_the_same_name() -> None:
    pooled = pool(TWO)
    assert [row.id for row in pooled["vismem"]] == [f"{seed}/test-{place}" for seed in (0, 1) for place in range(4)]
    assert [row.score for row in pooled["random_100"]] == [0, 0, 1, 0, 0, 0, 0, 0]


def test_a_side_of_several_arms_is_their_mean_item_by_item() -> None:
    claim = Claim("", ("vismem",), ("random_25", "random_100"))
    assert compare(TWO[0].answers, claim, seed=0, **OPTIONS)["delta"] == 75 - (25 + 25) / 2
    assert compare(TWO[1].answers, claim, seed=0, **OPTIONS)["delta"] == 75 - (50 + 0) / 2
    same = Claim("", ("vismem", "vanilla"), ("vanilla", "vismem"))
    assert compare(TWO[0].answers, same, seed=0, **OPTIONS) == {"delta": 0.0, "ci95": [0.0, 0.0], "p": 1.0}


def test_a_pooled_interval_is_that_of_paired_differences() -> None:
    """Arms that differ on every item by the same have no uncertainty, whatever their scores vary."""
    one = evaluation(0, {"vanilla": "0" * 6, "vismem": "1" * 6})
    two = evaluation(1, {"vanilla": "0" * 4, "vismem": "1" * 4})
    assert summarise_arms([one, two], **OPTIONS)["arms"]["vismem"]["gain"]["ci95"] == [100.0, 100.0]


def test_a_claim_holds_in_the_seeds_whose_interval_is_above_0_and_missing_arms_leave_it_out() -> None:
    for_it = evaluation(0, {"vanilla": "0" * 20, "vismem": "1" * 20})
    unclear = evaluation(1, {"vanilla": "01" * 10, "vismem": "10" * 9 + "11"})
    against_it = evaluation(2, {"vanilla": "1" * 20, "vismem": "0" * 20})
    (judged,) = judge(ORDER, [for_it, unclear, against_it], **OPTIONS)
    assert judged["text"] == "VisMem is above vanilla"
    assert (judged["holds"], judged["reversed"]) == (1, 1)
    assert judged["pooled"]["delta"] == pytest.approx(5 / 3)
    assert [row["delta"] for row in judged["seeds"].values()] == [100.0, 5.0, -100.0]


def test_the_bar_asks_for_eight_points_and_an_interval_above_0_in_every_seed() -> None:
    def met(*evaluations: Evaluation) -> bool:
        found = bar(summarise_arms(evaluations, **OPTIONS)["arms"])
        assert found is not None
        return bool(found["met"])

    clear = evaluation(0, {"vanilla": "0" * 40, "vismem": "1" * 20 + "0" * 20})
    unclear = evaluation(1, {"vanilla": "01" * 20, "vismem": "10" * 20})
    small = evaluation(1, {"vanilla": "0" * 100, "vismem": "1" * 6 + "0" * 94})
    assert met(clear, clear)
    assert not met(clear, unclear), "a seed without an interval above 0"
    assert not met(small), "6 points"
    assert bar({"vanilla": {}}) is None


def test_transfer_tells_the_tasks_trained_on_from_the_others() -> None:
    moved = transfer(
        [
            evaluation(0, {"vanilla": "1010", "vismem": "1111", "sft_lora": "1100"}, "aabb"),
            evaluation(1, {"vanilla": "0010", "vismem": "1011", "sft_lora": "1100"}, "aabb"),
        ],
        ["a"],
        **OPTIONS,
    )
    assert moved["n"] == {"trained": 4, "untrained": 4}
    trained, untrained = moved["halves"]["trained"], moved["halves"]["untrained"]
    assert [trained[arm]["score"] for arm in ("vanilla", "vismem", "sft_lora")] == [25.0, 75.0, 100.0]
    assert [untrained[arm]["score"] for arm in ("vanilla", "vismem", "sft_lora")] == [50.0, 100.0, 0.0]
    assert [row["delta"] for row in trained["vismem"]["gain_by_seed"].values()] == [50.0, 50.0]
    assert (untrained["vismem"]["gain"]["delta"], untrained["sft_lora"]["gain"]["delta"]) == (50.0, -50.0)
    (claim,) = moved["claims"]["untrained"]
    assert (claim["text"], claim["pooled"]["delta"], claim["holds"]) == ("VisMem is above SFT-LoRA", 100.0, 2)


def test_a_task_is_yes_no_where_all_its_references_are() -> None:
    mixed = [answer(0, 1, "y"), answer(1, 0, "y"), answer(2, 1, "c")]
    assert yes_no_tasks(mixed) == ["y"]


def test_training_is_summed_over_steps_and_averaged_over_seeds_and_unknown_where_a_step_does_not_say(
    tmp_path: Path,
) -> None:
    for seed, step, seconds in ((0, "stage1", 10), (0, "stage2", 30), (1, "stage1", 20), (1, "stage2", 20)):
        (tmp_path / str(seed) / step).mkdir(parents=True)
        held = {"train_seconds": seconds, "train_samples": 100, "validation": {"vanilla": {"score": seconds}}}
        if step == "stage1":
            held["trainable_parameters"] = 7
        (tmp_path / str(seed) / step / "metrics.json").write_text(json.dumps(held))
    found = training([tmp_path / "0", tmp_path / "1"], ["stage1", "stage2"])
    assert (found["train_seconds"], found["train_samples"], found["trainable_parameters"]) == (40.0, 200.0, None)
    assert found["validation"]["stage1"] == [{"vanilla": {"score": 10}}, {"vanilla": {"score": 20}}]
    assert training([tmp_path / "0"], ["stage1"])["trainable_parameters"] == 7.0


def test_parameters_that_differ_from_the_defaults_are_named_in_full() -> None:
    config = parse_config({"seed": 4, "stage1": {"warm_start": {"steps": 5}}, "memory": {"queries": 8}})
    assert changed_parameters(config) == {"seed": 4, "stage1.warm_start.steps": 5}
    assert changed_parameters(Config()) == {}


# --- the page ---


def figures() -> dict:
    moved = transfer([evaluation(0, {"vanilla": "1010", "vismem": "1111"}, "aabb")], ["a"], **OPTIONS)
    summary = summarise_arms(TWO, **OPTIONS)
    return {
        "command": "vismem study", "machine": "a machine", "versions": {"python": "3"}, "commits": ["abc"],
        "wall_seconds": 3725.4, "jobs": {"seed-0/base": 10.0, "seed-1/base": 20.0}, "at_once": 2, "parameters": {},
        "seeds": [0, 1], "items": {0: 4, 1: 4}, **summary, "bar": bar(summary["arms"]), "yes_no_tasks": [],
        "claims": {"order": judge(ORDER, TWO, **OPTIONS), "content": [], "baselines": []},
        "training": {
            "vismem": {
                "train_seconds": 40.0, "train_samples": 1200.0, "train_rollouts": 0.0, "trainable_parameters": None,
                "validation": {},
            }
        },
        "transfer": moved,
    }  # fmt: skip


def row(page: str, first: str) -> list[str]:
    """The cells of the first table row that starts with `first`."""
    (found, *_) = [line for line in page.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_the_page_shows_the_figures_where_they_belong() -> None:
    page = render(figures(), "study.png")
    assert "VisMem answers 75.0 % of 8 test questions (2 seeds) correctly, vanilla 37.5 %: +37.5 points" in page
    assert "in 1:02:05 (h:mm:ss); commit abc" in page
    assert "](study.png)" in page
    assert row(page, "vanilla") == ["vanilla", "37.5 ± 17.7", "25.0", "50.0", ""]
    assert row(page, "VisMem")[:4] == ["VisMem", "75.0 ± 0.0", "75.0", "75.0"]
    assert row(page, "VisMem")[4].startswith("+37.5 (")
    costs = page[page.index("## What it costs") :]
    assert row(costs, "VisMem") == ["VisMem", "", "1,200", "0", "40", "30.0", "+100%"]
    moved = page[page.index("## Transfer") :]
    assert row(moved, "VisMem")[1:3] == ["100.0", "+50.0 (+0.0 to +100.0)"]
    assert row(page, "base") == ["base", "2", "15"]
    assert "All parameters are the defaults." in page


def test_a_claim_that_fails_is_said_to_fail() -> None:
    held = figures()
    held["claims"]["order"][0] |= {"holds": 0, "reversed": 2}
    held["bar"] = {"points": 8.0, "gain": 1.25, "seeds_above_0": 1, "seeds": 2, "met": False}
    page = render(held, "study.png")
    assert row(page, "VisMem is above vanilla")[1] == "0 of 2 seeds; the opposite in 2"
    assert "+1.2 points, above 0 in 1 of 2 seeds; it is not met." in page


def test_a_cell_cannot_break_its_table() -> None:
    assert table(["a"], [["x|y"]]).splitlines()[-1] == r"| x\|y |"


# --- the plan ---

PLAN = parse_config(
    {
        "seed": 5,
        "study": {
            "seeds": 2,
            "transfer_seeds": 1,
            "arms": ["vanilla", "vismem", "sft_lora"],
            "transfer_arms": ["vanilla", "vismem"],
        },
        "prepare": {"sources": [{"kind": "scenes"}, {"kind": "easy_vqa"}]},
    }
)


def test_the_plan_has_every_step_of_every_seed_and_transfer_shares_the_base(tmp_path: Path) -> None:
    jobs = {job.name: job for job in plan(PLAN, tmp_path)}
    steps = ("prepare", "validate", "base", "stage1", "stage2", "sft_lora", "evaluate")
    wanted = [f"seed-{seed}/{step}" for seed in (5, 6) for step in steps]
    wanted += [f"transfer-5/{step}" for step in ("prepare", "validate", "stage1", "stage2", "evaluate")]
    assert list(jobs) == wanted
    assert jobs["seed-6/evaluate"].needs == tuple(f"seed-6/{n}" for n in ("base", "stage2", "validate", "sft_lora"))
    assert jobs["transfer-5/stage1"].needs == ("seed-5/base", "transfer-5/validate")
    assert {name for name, job in jobs.items() if job.timed} == {name for name in jobs if name.endswith("/evaluate")}
    assert (tmp_path / "transfer-5" / "base").readlink() == Path("../seed-5/base")


def test_every_repetition_has_its_parameters_written_out(tmp_path: Path) -> None:

    plan(PLAN, tmp_path)
    six, moved = (
        parse_config(yaml.safe_load((tmp_path / f / "params.yaml").read_text())) for f in ("seed-6", "transfer-5")
    )
    assert (six.seed, six.evaluate.arms) == (6, ("vanilla", "vismem", "sft_lora"))
    assert six.prepare == PLAN.prepare
    (source,) = moved.prepare.sources
    assert (source.train_tasks, source.tasks, source.pretrain) == (trained_half(), (), 0)  # type: ignore[union-attr]
    assert moved.evaluate.arms == ("vanilla", "vismem")


def test_both_halves_of_the_tasks_have_all_capabilities() -> None:
    half = set(trained_half())
    for capability in Capability:
        inside = [task in half for task in TASKS if TASKS[task] == capability]
        assert inside.count(False) > 0
        assert inside.count(True) - inside.count(False) in (0, 1)
    assert trained_half(("count", "chain", "exists")) == ("count", "chain", "exists")

"""The study's figures from hand-made predictions, worked out by hand; and the page that shows them."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from recipes.study.claims import Answers, compare
from recipes.study.figures import long_figures, score_table, study_figures, tokens_read, transfer_figures
from recipes.study.page import render, stage_table, table
from recipes.study.plan import Settings, changed, parameters
from recipes.study.report import training
from recipes.study.stages import stage_figures
from recipes.study.verdicts import PLAN as FILE
from recipes.study.verdicts import read_plan, verdicts
from vismem.config import Config, parse_config
from vismem.data.tasks import NEEDS
from vismem.evaluation.predictions import InvocationRecord, Prediction

RESAMPLES = 200
PLAN = read_plan(Path(__file__).parents[2] / FILE)


def answers(rights: dict[str, str], tasks: str | None = None) -> Answers:
    """One seed's; "1101" is an arm's score on each item, `tasks` one letter per item ("y": answered yes or no)."""
    letters = tasks or "c" * len(rights["vanilla"])
    return {arm: [answer(i, int(r), letters[i]) for i, r in enumerate(row)] for arm, row in rights.items()}


def figures_of(*seeds: Answers) -> dict:
    """The study's figures; the arms of seed s take 10, 20, 30 ... milliseconds per question, times 1 + s."""
    seconds = {s: {arm: 0.01 * (1 + place) * (1 + s) for place, arm in enumerate(rows)} for s, rows in enumerate(seeds)}
    return study_figures(dict(enumerate(seeds)), seconds, {"short": 4, "long": 8}, "random_25", RESAMPLES)


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
    answers(dict(zip(ARMS, ("1000", "1110", "1010", "1000", "0010"), strict=True))),
    answers(dict(zip(ARMS, ("1100", "1110", "0110", "0110", "0000"), strict=True))),
)


def test_an_arm_has_its_mean_and_spread_over_seeds_and_its_gain_over_all_items() -> None:
    figures = figures_of(*TWO)
    vanilla, vismem = figures["arms"]["vanilla"], figures["arms"]["vismem"]
    assert vanilla["seeds"] == {0: 25.0, 1: 50.0}
    assert (vanilla["mean"], vismem["mean"], vismem["spread"]) == (37.5, 75.0, 0.0)
    assert vanilla["spread"] == pytest.approx(25 / math.sqrt(2))
    assert vanilla["gain"] is None
    assert vismem["gain"]["pooled"]["delta"] == 37.5
    assert vismem["gain"]["pooled"]["p"] == 0.25  # three items better, none worse: 2 / 2**3
    assert [gain["delta"] for gain in vismem["gain"]["seeds"].values()] == [50.0, 25.0]
    assert figures["arms"]["short_only"]["gain"]["pooled"]["delta"] == 12.5
    assert vismem["milliseconds"] == pytest.approx({0: 20.0, 1: 40.0})
    assert vismem["overhead"] == pytest.approx([1.0, 1.0])
    assert figures["pooled"]["n"] == 8
    assert figures["pooled"]["gain"]["overall"] == vismem["gain"]["pooled"], "one way to compute a gain"


def test_one_seed_has_no_spread() -> None:
    assert figures_of(TWO[0])["arms"]["vismem"]["spread"] is None


def test_tokens_read_are_the_visual_ones_and_the_vectors_of_memories() -> None:
    short, long = (InvocationRecord(0, kind, False, 0.0) for kind in ("short", "long"))
    used = ((), (short,), (short, long), (long, long))
    rows = [replace(answer(i, 1, "c"), visual_tokens=9, invocations=events) for i, events in enumerate(used)]
    assert tokens_read(rows, {"short": 4, "long": 8}) == 9 + (0 + 4 + 12 + 16) / 4


def test_a_pooled_interval_is_that_of_paired_differences() -> None:
    """Arms that differ on every item by the same leave what ten items cannot exclude, whatever their scores vary."""
    one, two = (answers({"vanilla": "0" * count, "vismem": "1" * count}) for count in (6, 4))
    assert figures_of(one, two)["arms"]["vismem"]["gain"]["pooled"]["ci95"] == pytest.approx([72.25, 100.0], abs=0.01)


def test_questions_about_one_image_count_together_and_the_same_id_in_two_seeds_does_not() -> None:
    rows = answers({"vanilla": "0" * 6 + "1", "vismem": "1" * 6 + "0"})
    together = {arm: [replace(a, cluster=f"image {n // 3}") for n, a in enumerate(row)] for arm, row in rows.items()}
    found = {
        name: compare(score_table({0: one, 1: one}), "vismem", "vanilla", RESAMPLES)["pooled"]
        for name, one in {"alone": rows, "together": together}.items()
    }
    assert found["alone"]["p"] == pytest.approx(2 * (1 + 14 + 91) / 2**14), "12 of 14 better: other questions each"
    assert found["together"]["p"] == 0.5, "sums 6, 6 and -2 of three images"


def test_a_comparison_counts_the_seeds_whose_interval_is_above_0_and_those_below() -> None:
    for_it = answers({"vanilla": "0" * 20, "vismem": "1" * 20})
    unclear = answers({"vanilla": "01" * 10, "vismem": "10" * 9 + "11"})
    against_it = answers({"vanilla": "1" * 20, "vismem": "0" * 20})
    found = compare(score_table({0: for_it, 1: unclear, 2: against_it}), "vismem", "vanilla", RESAMPLES)
    assert (found["holds"], found["reversed"]) == (1, 1)
    assert found["pooled"]["delta"] == pytest.approx(5 / 3)
    assert [row["delta"] for row in found["seeds"].values()] == [100.0, 5.0, -100.0]
    same = compare(score_table({0: for_it}), "vismem", "vismem", RESAMPLES)
    assert same["pooled"] == {
        "delta": 0.0,
        "ci95": pytest.approx([-16.11, 16.11], abs=0.01),
        "p": 1.0,
        "p_holm": None,
        "detectable": None,
    }


def test_transfer_tells_the_tasks_trained_on_from_the_others() -> None:
    rows = ("1010", "1111", "1100"), ("0010", "1011", "1100")
    seeds = {
        s: answers(dict(zip(("vanilla", "vismem", "sft_lora"), row, strict=True)), "aabb") for s, row in enumerate(rows)
    }
    moved = transfer_figures(seeds, ["a"], RESAMPLES)
    trained, untrained = moved["halves"]["trained"], moved["halves"]["untrained"]
    assert (trained["n"], untrained["n"]) == (4, 4)
    assert [trained["arms"][arm]["mean"] for arm in ("vanilla", "vismem", "sft_lora")] == [25.0, 75.0, 100.0]
    assert [untrained["arms"][arm]["mean"] for arm in ("vanilla", "vismem", "sft_lora")] == [50.0, 100.0, 0.0]
    assert [row["delta"] for row in trained["arms"]["vismem"]["gain"]["seeds"].values()] == [50.0, 50.0]
    gains = [untrained["arms"][arm]["gain"]["pooled"]["delta"] for arm in ("vismem", "sft_lora")]
    assert gains == [50.0, -50.0]
    assert [(claim["id"], claim["text"], claim["found"]["pooled"]["delta"]) for claim in moved["claims"]] == [
        ("T1", "VisMem - vanilla", 50.0), ("T2", "VisMem - SFT-LoRA", 100.0),
    ]  # fmt: skip
    everywhere = transfer_figures(seeds, ["a", "b"], RESAMPLES)
    assert (list(everywhere["halves"]), {claim["verdict"] for claim in everywhere["claims"]}) == (
        ["trained"],
        {"not run"},
    )


def test_a_task_is_yes_no_where_all_its_references_are() -> None:
    assert figures_of(answers({"vanilla": "101", "vismem": "101"}, "yyc"))["yes_no_tasks"] == ["y"]


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
    default = parameters(Config(), Settings())
    assert changed(default, parameters(config, Settings(seeds=1, jobs=7))) == {
        "seed": (0, 4),
        "stage1.warm_start.steps": (Config().stage1.warm_start.steps, 5),
        "study.seeds": (3, 1),
    }
    assert changed(default, parameters(Config(), Settings())) == {}


# --- the page ---


def figures(*seeds: Answers) -> dict:
    moved = transfer_figures({0: answers({"vanilla": "1010", "vismem": "1111"}, "aabb")}, ["a"], RESAMPLES)
    took = {arm: {"train_seconds": 40.0} for arm in ("vismem", "sft_lora_long", "grpo_lora_long")}
    long = {"vanilla": "1010", "vismem": "1111", "sft_lora_long": "1100", "grpo_lora_long": "1000"}
    found = {
        "command": "python -m recipes.study", "machine": "a machine", "versions": {"python": "3"}, "commits": ["abc"],
        "wall_seconds": 3725.4, "jobs": {"seed-0/base": 10.0, "seed-1/base": 20.0}, "at_once": 2, "parameters": {},
        "seeds": [0, 1], "items": {0: 4, 1: 4}, **figures_of(*(seeds or TWO)),
        "training": {
            "vismem": {
                "train_seconds": 40.0, "train_samples": 1200.0, "train_rollouts": 0.0, "trainable_parameters": None,
                "validation": {},
            }
        },
        "long": long_figures({0: answers(long)}, took, RESAMPLES), "transfer": moved, "stages": None,
        "checks": {}, "base": {},
    }  # fmt: skip
    return {**found, "plan": verdicts(PLAN, found)}


def row(page: str, first: str) -> list[str]:
    """The cells of the first table row that starts with `first`."""
    (found, *_) = [line for line in page.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_the_page_shows_the_figures_where_they_belong() -> None:
    page = render(figures(), "study")
    assert "VisMem answers 75.0 % of 8 test questions (2 seeds) correctly, vanilla 37.5 %: +37.5 points" in page
    assert "in 1:02:05 (h:mm:ss); commit abc" in page
    assert "](study.png)" in page
    assert row(page, "vanilla") == ["vanilla", "37.5 ± 17.7", "25.0", "50.0", ""]
    assert row(page, "VisMem")[:4] == ["VisMem", "75.0 ± 0.0", "75.0", "75.0"]
    assert row(page, "VisMem")[4].startswith("+37.5 (")
    costs = page[page.index("## What it costs") :]
    assert row(costs, "VisMem") == ["VisMem", "", "1,200", "0", "40", "0.0", "30.0", "+100%"]
    long = page[page.index("## At equal seconds") :]
    assert "1 seed. Training seconds: VisMem 40, SFT-LoRA, longer 40, GRPO-LoRA, longer 40." in long
    assert row(long, "SFT-LoRA, longer")[:3] == ["SFT-LoRA, longer", "50.0", "50.0"]
    moved = page[page.index("## Transfer") :]
    assert row(moved, "VisMem") == ["VisMem", "100.0", "100.0", "+50.0 (-32.6 to +100.0)"]
    assert row(page, "base") == ["base", "2", "15"]
    assert "All parameters are the defaults." in page


def test_the_page_says_what_became_of_every_claim_near_its_top() -> None:
    page = render(figures(), "study")
    claims = page[page.index("## The plan's claims") : page.index("## Arms")]
    assert [line.split(" | ")[0].strip("| ") for line in claims.splitlines() if "**" in line] == list(PLAN)
    assert row(claims, "M7")[:3] == ["M7", *PLAN["M7"].values()]
    assert row(claims, "M7")[3].startswith("VisMem - vanilla: +37.5 (")
    assert row(claims, "M7")[4] == "**not shown**", "one seed's interval is not above 0"
    assert row(claims, "G2") == ["G2", *PLAN["G2"].values(), "", "**not run**"]
    assert row(claims, "VisMem - vanilla")[:3] == ["VisMem - vanilla", "M7", "not shown"]
    assert f"The {len(PLAN)} claims: " in claims
    assert "at least 15 points above vanilla (M7): not shown; above SFT-LoRA (F1): not run." in page


def test_the_page_shows_needs_numbers_of_memories_and_the_oracle_only_where_they_were_run() -> None:
    arms = ("vanilla", "vismem", "no_memory", "as_short", "as_long", "vismem@1", "short_only", "long_only")
    need = [next(task for task in NEEDS if NEEDS[task] == kind) for kind in ("coarse", "detail", "compute", "compute")]
    rows = answers(dict(zip(arms, ("0000", "1110", "1000", "1100", "0010", "1100", "1110", "1010"), strict=True)))
    rows = {arm: [replace(a, task=task) for a, task in zip(said, need, strict=True)] for arm, said in rows.items()}
    page = render(figures(rows, rows), "study")
    assert "| arm | coarse (n = 2) | gain | detail (n = 2) | gain | compute (n = 4) | gain |" in page
    assert row(page, "VisMem, at most 1")
    assert "](study-memories.png)" in page
    assert row(page, "VisMem | memory off")[:3] == ["VisMem", "memory off", "0.00"]
    assert row(page, "VisMem | memory off")[3].startswith("25.0 (")
    assert "the best of the three: 75.0 %. It is an upper bound, chosen with the answer known" in page
    assert "The learned choice has 75.0 %. That is 100 % (100 to 100) of the way" in page
    assert "Against the best single choice (all as short) it has +25.0 (" in page
    plain = render(figures(), "study")
    for heading in ("## By what a question needs", "## Accuracy against number", "## The learned choice"):
        assert heading in page
        assert heading not in plain


def test_a_cell_cannot_break_its_table() -> None:
    assert table(["a"], [["x|y"]]).splitlines()[-1] == r"| x\|y |"


def test_what_stages_leave_of_the_first_ones_tasks() -> None:
    first = answers({"vanilla": "1000", "vismem": "1110", "sft_lora": "1111"})
    later = answers({"vanilla": "1000", "vismem": "1101", "sft_lora": "1000"})
    found = stage_figures({0: [first, first, later], 1: [first, first, first]}, RESAMPLES)
    assert found["n"] == 8
    assert found["arms"]["vismem"]["scores"] == [75.0, 75.0, 75.0]
    assert found["arms"]["sft_lora"]["scores"] == [100.0, 100.0, 62.5]
    assert found["arms"]["sft_lora"]["lost"]["pooled"]["delta"] == 37.5
    assert found["less"]["sft_lora"]["seeds"][0]["delta"] == 75.0
    assert (found["less"].keys(), found["changed"]) == ({"sft_lora"}, 0)
    assert "| SFT-LoRA | 100.0 | 100.0 | 62.5 | +37.5 (" in stage_table(found)
    other = answers({"vanilla": "0000", "vismem": "1101", "sft_lora": "1000"})
    assert stage_figures({0: [first, other]}, RESAMPLES)["changed"] == 1

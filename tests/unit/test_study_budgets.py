"""What the study's claims rest on: budgets of memories, needs and the oracle, each worked out by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from handmade import prediction

from recipes.study import budgets
from recipes.study.claims import Answers
from recipes.study.figures import score_table, study_figures
from recipes.study.page import memoryless, need_table, pictures
from vismem.data.tasks import NEEDS
from vismem.evaluation.predictions import InvocationRecord

RESAMPLES = 200
ONE = InvocationRecord(0, "short", True, 0.0)
TASK = {need: next(task for task in NEEDS if NEEDS[task] == need) for need in budgets.KINDS_OF_NEED}


def answers(rights: dict[str, str], memories: dict[str, str] | None = None, tasks: list[str] | None = None) -> Answers:
    """One seed's; "1101" is an arm's score on each item, `memories` its number of them on each."""
    used, asked = memories or {}, tasks or ["hand"] * len(rights["vanilla"])
    return {
        arm: [
            replace(prediction(0, int(right), (ONE,) * int(many)), id=f"q{place}", task=asked[place])
            for place, (right, many) in enumerate(zip(row, used.get(arm, "0" * len(row)), strict=True))
        ]
        for arm, row in rights.items()
    }


def table(rights: dict[str, str], tasks: list[str] | None = None) -> pd.DataFrame:
    return score_table({0: answers(rights, tasks=tasks)})


def test_questions_about_one_image_make_shares_and_scores_less_certain() -> None:
    rows = {arm: row * 3 for arm, row in {**KINDS, "vismem": "1101"}.items()}
    alone, found = answers(rows), []
    together = {arm: [replace(a, cluster=str(place % 4)) for place, a in enumerate(row)] for arm, row in alone.items()}
    for asked in (alone, together):
        scores = score_table({0: asked})
        oracle = budgets.oracle(scores, RESAMPLES)
        assert oracle is not None
        line = budgets.lines(scores, dict.fromkeys(rows, 1.0) | {"no_memory": 0.0})["vismem"]
        found.append((np.ptp(oracle["share_ci95"]), np.ptp(line[-1]["ci95"])))
    assert (np.divide(found[1], found[0]) > 1.3).all(), "four images, three times the same"


# --- the oracle ---

KINDS = {"vanilla": "0000", "no_memory": "1000", "as_short": "1100", "as_long": "0010", "vismem": "1110"}


def test_the_oracle_is_the_best_of_the_three_question_by_question() -> None:
    found = budgets.oracle(table(KINDS), RESAMPLES)
    assert found is not None
    assert found["arms"] == {"no_memory": 25.0, "as_short": 50.0, "as_long": 25.0}
    assert (found["best"], found["learned"], found["oracle"]) == ("as_short", 75.0, 75.0)
    assert found["mean"] == pytest.approx(100 / 3)
    assert found["share"] == pytest.approx(100.0)
    assert found["share_ci95"] == pytest.approx((100.0, 100.0))
    assert found["over_best"]["pooled"]["delta"] == 25.0


@pytest.mark.parametrize(
    ("learned", "share"),
    [("1100", 100 * (50 - 100 / 3) / (75 - 100 / 3)), ("1000", -20.0), ("1111", 160.0), ("0000", -80.0)],
)
def test_the_learned_share_of_the_way_from_the_mean_to_the_oracle(learned: str, share: float) -> None:
    found = budgets.oracle(table({**KINDS, "vismem": learned}), RESAMPLES)
    assert found is not None
    assert found["share"] == pytest.approx(share)
    assert found["share_ci95"][0] <= found["share"] <= found["share_ci95"][1]
    assert found["seeds"][0]["share"] == found["share"]


def test_without_one_of_the_three_there_is_no_oracle_and_where_none_differs_no_share() -> None:
    for arm in ("no_memory", "as_short", "as_long", "vismem"):
        assert budgets.oracle(table({a: row for a, row in KINDS.items() if a != arm}), RESAMPLES) is None
    found = budgets.oracle(table({**dict.fromkeys(KINDS, "0101"), "vismem": "1101"}), RESAMPLES)
    assert found is not None
    assert (found["share"], found["oracle"], found["mean"]) == (None, 50.0, 50.0)


# --- numbers of memories ---

LIMITED = {
    "vanilla": "0000", "no_memory": "1000", "vismem@2": "1100", "vismem": "1111", "random_50": "1010",
    "forced_short": "0110", "random_25": "1110", "random_100": "0000",
}  # fmt: skip
USED = {"vismem": "3214", "vismem@2": "2212", "random_50": "2222", "random_25": "1111", "random_100": "4444"}


def test_a_placement_has_a_point_for_every_arm_that_was_run() -> None:
    by_seed = {0: answers(LIMITED, USED)}
    memories = budgets.mean_memories(by_seed)
    assert (memories["vismem"], memories["vismem@2"], memories["no_memory"]) == (2.5, 1.75, 0.0)
    found = budgets.lines(score_table(by_seed), memories)
    points = {name: [(p["arm"], p["memories"], p["score"]) for p in row] for name, row in found.items()}
    start = ("no_memory", 0.0, 25.0)
    assert points == {
        "vismem": [start, ("vismem@2", 1.75, 50.0), ("vismem", 2.5, 100.0)],
        "random": [start, ("random_25", 1.0, 75.0), ("random_50", 2.0, 50.0), ("random_100", 4.0, 0.0)],
        "forced_short": [start, ("forced_short", 0.0, 50.0)],
    }
    assert found["vismem"][-1]["ci95"] == pytest.approx((400 / (4 + 1.959964**2), 100.0))
    assert budgets.lines_plot(found).startswith(b"\x89PNG")


def test_without_memory_off_there_is_no_line_and_no_chart() -> None:
    rights = {"vanilla": "10", "vismem": "11", "vismem@1": "11"}
    figures = study_figures({0: answers(rights)}, {0: dict.fromkeys(rights, 1)}, {}, "random_50", 100)
    assert figures["budgets"] == {}
    assert list(pictures(figures, "study")) == ["study.png"]
    rights["no_memory"] = "00"
    limited = study_figures({0: answers(rights)}, {0: dict.fromkeys(rights, 1)}, {}, "random_50", 100)
    assert list(pictures(limited, "study")) == ["study.png", "study-memories.png"]


def test_random_invocation_is_the_rate_nearest_to_the_method_in_memories_on_validation() -> None:
    used = {"vismem": (2, 0.5), "random_25": (0.5, 0.5), "random_50": (1, 1), "random_100": (2, 2)}
    run = {arm: {"invocations_short": s, "invocations_long": n, "score": 0.0} for arm, (s, n) in used.items()}
    memories = budgets.checked_memories([run, {**run, "vismem": {**run["vismem"], "invocations_short": 3}}])
    assert memories == {"vismem": 3.0, "random_25": 1.0, "random_50": 2.0, "random_100": 4.0}
    for learned, nearest in ((1.4, "random_25"), (1.6, "random_50"), (2.9, "random_50"), (3.1, "random_100")):
        assert budgets.nearest_rate({**memories, "vismem": learned}) == nearest


# --- needs ---


def test_needs_are_apart_and_other_tasks_have_none() -> None:
    tasks = [*[TASK["detail"]] * 2, *[TASK["compute"]] * 4, "hand"]
    found = budgets.needs(table({"vanilla": "1000001", "short_only": "1110000"}, tasks), RESAMPLES)
    assert list(found) == ["detail", "compute"]
    assert (found["detail"]["n"], found["compute"]["n"]) == (2, 4)
    assert found["detail"]["arms"] == {"vanilla": 50.0, "short_only": 100.0}
    assert found["compute"]["arms"] == {"vanilla": 0.0, "short_only": 25.0}
    assert list(found["detail"]["gains"]) == ["short_only"]
    assert found["compute"]["gains"]["short_only"]["pooled"]["delta"] == 25.0
    lines = need_table(found).splitlines()
    assert lines[0] == "| arm | detail (n = 2) | gain | compute (n = 4) | gain |"
    assert lines[2] == "| vanilla | 50.0 |  | 0.0 |  |"
    assert lines[3].startswith("| short only | 100.0 | +50.0 (")
    assert budgets.needs(table({"vanilla": "10", "short_only": "11"}), RESAMPLES) == {}
    assert need_table({}) == ""


def test_arms_without_memory_are_known_by_their_policy() -> None:
    for arm in ("vanilla", "no_memory", "relook", "sft_lora"):
        assert memoryless(arm)
    for arm in ("vismem", "vismem@1", "random_50", "start_long", "of an older study"):
        assert not memoryless(arm)

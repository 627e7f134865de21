"""The verdict of every claim of the plan, from figures worked out by hand, each also with its sign turned."""

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from recipes.study.claims import EQUAL_SECONDS, TRANSFER, compare, judge, of_arms, overall, part, verdict, whole_order
from recipes.study.figures import check_figures
from recipes.study.page import aims, part_table, plan_table, tally
from recipes.study.plan import Settings
from recipes.study.verdicts import PLAN, all_parts, read_plan, verdicts
from vismem.data.tasks import NEEDS

RESAMPLES = 100
ROOT = Path(__file__).parents[2]
TASK = {need: next(task for task in NEEDS if NEEDS[task] == need) for need in ("coarse", "detail", "compute")}
NOTHING: dict[str, Any] = {
    "claims": [], "long": None, "base": {}, "arms": {}, "checks": {}, "oracle": None, "stages": None,
    "transfer": None,
}  # fmt: skip


def scores(*seeds: dict[str, str], tasks: list[str] | None = None) -> pd.DataFrame:
    """Scores in percent; "1101" is an arm's score on each item of a seed."""
    tables = {}
    for seed, rights in enumerate(seeds):
        items = pd.Index(tasks or ["hand"] * len(next(iter(rights.values()))), name="task")
        tables[seed] = pd.DataFrame({arm: [100.0 * int(r) for r in row] for arm, row in rights.items()}, index=items)
    return pd.concat(tables, names=["seed"])


def better(above: str, below: str) -> dict[str, str]:
    return {above: "1" * 20, below: "0" * 20}


def shares(**rights: int) -> dict[str, str]:
    """Each arm has so many of 20 questions right, the first ones."""
    return {arm: "1" * count + "0" * (20 - count) for arm, count in rights.items()}


def of(id_: str, **figures: Any) -> list[dict[str, Any]]:
    return [part for part in all_parts({**NOTHING, **figures}) if part["id"] == id_]


# --- the rules ---


@pytest.mark.parametrize(
    ("held", "against", "count", "margin", "delta", "said"),
    [
        (2, 0, 3, 0.0, 1.0, "holds"),
        (1, 0, 3, 0.0, 1.0, "not shown"),
        (1, 2, 3, 0.0, -1.0, "reversed"),
        (0, 1, 3, 0.0, -1.0, "not shown"),
        (3, 0, 3, 15.0, 15.0, "holds"),
        (3, 0, 3, 15.0, 14.9, "not shown"),
        (2, 0, 3, 15.0, 20.0, "not shown"),
        (0, 2, 3, 15.0, -20.0, "reversed"),
        (1, 0, 1, 0.0, 1.0, "holds"),
    ],
)
def test_a_comparison_holds_in_two_thirds_of_the_seeds_and_one_with_a_margin_in_all(
    held: int, against: int, count: int, margin: float, delta: float, said: str
) -> None:
    found = {"seeds": dict.fromkeys(range(count)), "holds": held, "reversed": against, "pooled": {"delta": delta}}
    assert verdict(found, margin) == said


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (["holds", "holds"], "holds"),
        (["holds", "not shown"], "not shown"),
        (["holds", "not run"], "not run"),
        (["not run", "not shown"], "not shown"),
        (["not shown", "reversed", "holds"], "reversed"),
        ([], "not run"),
    ],
)
def test_a_claim_holds_where_all_its_parts_do(parts: list[str], said: str) -> None:
    assert overall(parts) == said


# --- claims about two arms ---


def test_every_claim_about_two_arms_holds_one_way_and_is_reversed_the_other() -> None:
    tasks = [TASK["detail"]] * 20 + [TASK["compute"]] * 20
    for claim in of_arms("random_50"):
        for above, below, said in ((claim.above, claim.below, "holds"), (claim.below, claim.above, "reversed")):
            found = judge([claim], scores({above: "1" * 40, below: "0" * 40}, tasks=tasks), RESAMPLES)[0]
            assert found["verdict"] == said, claim
            assert found["found"]["pooled"]["delta"] == (100.0 if said == "holds" else -100.0)
        without = judge([claim], scores({claim.above: "1"}, tasks=tasks[:1]), RESAMPLES)[0]
        assert (without["verdict"], without["found"]) == ("not run", None)


@pytest.mark.parametrize(("id_", "need", "other"), [("G1", "detail", "compute"), ("M6", "compute", "detail")])
def test_a_claim_about_a_need_is_asked_of_its_questions_only(id_: str, need: str, other: str) -> None:
    (claim,) = [claim for claim in of_arms("random_50") if claim.id == id_]
    rights = {claim.above: "1" * 20 + "0" * 20, claim.below: "0" * 20 + "1" * 20}
    asked = scores(rights, tasks=[TASK[need]] * 20 + [TASK[other]] * 20)
    assert judge([claim], asked, RESAMPLES)[0]["verdict"] == "holds"
    turned = scores(rights, tasks=[TASK[other]] * 20 + [TASK[need]] * 20)
    assert judge([claim], turned, RESAMPLES)[0]["verdict"] == "reversed"
    assert judge([claim], scores(rights), RESAMPLES)[0]["verdict"] == "not run", "no question of a known need"


def test_the_gate_and_the_gain_want_fifteen_points() -> None:
    claims = {claim.id: claim for claim in of_arms("random_50") if claim.margin}
    assert set(claims) == {"G1", "M7"}
    for claim in claims.values():
        for gained, said in ((16, "holds"), (14, "not shown")):
            rights = {claim.above: "1" * gained + "0" * (100 - gained), claim.below: "0" * 100}
            (found,) = judge([claim], scores(rights, tasks=[TASK["detail"]] * 100), RESAMPLES)
            assert found["verdict"] == said


def test_the_order_holds_where_all_its_steps_do_in_one_seed() -> None:
    climbing = shares(vanilla=0, random_50=6, short_only=13, long_only=13, vismem=20)
    flat = {**climbing, "long_only": climbing["vismem"]}
    for seeds, count, said in (
        ((climbing, climbing, flat), 2, "holds"),
        ((climbing, flat, flat), 1, "not shown"),
    ):
        judged = judge(of_arms("random_50"), scores(*seeds), RESAMPLES)
        found = whole_order(judged)
        assert (found["id"], found["verdict"]) == ("M4", said)
        assert found["said"] == f"in {count} of 3 seeds"
    missing = {arm: row for arm, row in climbing.items() if arm != "long_only"}
    assert whole_order(judge(of_arms("random_50"), scores(missing), RESAMPLES))["verdict"] == "not run"


# --- claims of their own ---


@pytest.mark.parametrize(("compute", "said"), [(52.9, "holds"), (53.1, "reversed"), (40.0, "holds"), (None, "not run")])
def test_the_base_has_converged_where_more_steps_gain_at_most_three_points(compute: float | None, said: str) -> None:
    before, after = {"coarse": 90.0, "compute": 50.0}, {"coarse": 91.0}
    after |= {} if compute is None else {"compute": compute}
    parts = of("G2", base={"scores": {"longer": {"before": before, "after": after}}})
    assert [part["verdict"] for part in parts] == ["holds", said]
    assert parts[0]["said"] == "+1.0"
    assert {part["verdict"] for part in of("G2", base={"scores": {}})} == {"not run"}


def costs(tokens: list[float], milliseconds: list[float]) -> dict[str, Any]:
    return {"mean": 70.0, "tokens": dict(enumerate(tokens)), "milliseconds": dict(enumerate(milliseconds))}


@pytest.mark.parametrize(
    ("milliseconds", "said"), [([1, 1, 1], "holds"), ([1, 1, 3], "not shown"), ([1, 3, 3], "reversed")]
)
def test_memory_is_cheaper_where_tokens_and_seconds_are_fewer_in_every_seed(
    milliseconds: list[float], said: str
) -> None:
    arms = {"vismem": costs([20, 21, 22], milliseconds), "full_resolution": costs([36] * 3, [2] * 3)}
    tokens, seconds = of("M11", arms=arms)
    assert (tokens["verdict"], seconds["verdict"]) == ("holds", said)
    assert tokens["said"] == "21.0 against 36.0; score 70.0 against 70.0; fewer in 3 of 3 seeds"
    turned = {"vismem": arms["full_resolution"], "full_resolution": arms["vismem"]}
    assert of("M11", arms=turned)[0]["verdict"] == "reversed"
    assert {part["verdict"] for part in of("M11", arms={"vismem": arms["vismem"]})} == {"not run"}


def test_equal_seconds_are_judged_only_where_the_baseline_had_them() -> None:
    rights = shares(vismem=20, sft_lora_long=0, grpo_lora_long=0)
    turned = shares(vismem=0, sft_lora_long=20, grpo_lora_long=20)
    seconds = {"vismem": 100.0, "sft_lora_long": 90.0, "grpo_lora_long": 89.0}
    training = {arm: {"train_seconds": took} for arm, took in seconds.items()}
    for given, said in ((rights, "holds"), (turned, "reversed")):
        claims = judge(EQUAL_SECONDS, scores(given), RESAMPLES)
        long, grpo = of("F5", long={"claims": claims, "training": training})
        assert (long["verdict"], long["note"]) == (said, "trained 0.90 times as long as VisMem")
        assert (grpo["verdict"], grpo["note"]) == ("not run", "trained 0.89 times as long as VisMem: too short")
    unknown = of("F5", long={"claims": judge(EQUAL_SECONDS, scores(rights), RESAMPLES), "training": {}})
    assert {part["verdict"] for part in (*unknown, *of("F5"))} == {"not run"}


def checked(name: str, before: str, after: str) -> dict[str, Any]:
    """The arm of that name moves, the others stay."""
    others = {arm: [0.0] * 20 for arm in ("random_50", "vismem", "vismem_sampled")}
    given = {when: {**others, name: [float(x) for x in row]} for when, row in (("before", before), ("after", after))}
    return check_figures({0: given}, 640, RESAMPLES)


@pytest.mark.parametrize(("id_", "name"), [("R1", "random_50"), ("R2", "vismem_sampled")])
def test_grpo_improves_where_the_same_questions_score_more_after_it(id_: str, name: str) -> None:
    low, high = "0" * 20, "0" * 10 + "1" * 10
    for before, after, said, delta in (
        (low, high, "holds", 50.0), (high, low, "reversed", -50.0), (low, low, "not shown", 0.0),
    ):  # fmt: skip
        (row,) = of(id_, checks=checked(name, before, after))
        assert (row["verdict"], row["found"]["pooled"]["delta"]) == (said, delta)
        assert row["note"].startswith("640 rollouts, 20 validation questions")
    assert of(id_)[0]["verdict"] == "not run"


def test_greedy_answers_stand_beside_sampled_ones_and_decide_nothing() -> None:
    (row,) = of("R2", checks=checked("vismem", "0" * 20, "1" * 20))
    assert row["verdict"] == "not shown"
    assert row["note"].endswith("; greedy +100.0 (+83.9 to +100.0)")


@pytest.mark.parametrize(
    ("intervals", "said"),
    [
        ([(5, 40), (1, 30), (-3, 20)], "holds"),
        ([(5, 40), (-1, 30), (-3, 20)], "not shown"),
        ([(-40, -5), (-30, -1), (-3, 20)], "reversed"),
        ([None, (1, 30), (1, 30)], "holds"),
        ([None, None, (1, 30)], "not shown"),
    ],
)
def test_a_choice_is_learned_where_its_share_is_above_zero(intervals: list[Any], said: str) -> None:
    seeds = {seed: {"share_ci95": interval} for seed, interval in enumerate(intervals)}
    (row,) = of("R3", oracle={"seeds": seeds, "share": 20.0, "share_ci95": (4.0, 30.0)})
    assert row["verdict"] == said
    assert row["said"].startswith("20 % (4 to 30), above 0 in ")
    assert of("R3")[0]["verdict"] == "not run"


def stages(vismem: int, others: int, changed: int = 0) -> dict[str, Any]:
    """VisMem and the baselines lose so many of 20 questions."""
    lost = scores(shares(vismem=vismem, others=others, none=0))
    arms = {"vismem": {"lost": compare(lost, "vismem", "none", RESAMPLES)}}
    less = dict.fromkeys(("sft_lora", "grpo_lora"), compare(lost, "others", "vismem", RESAMPLES))
    return {"arms": arms, "less": less, "changed": changed}


def test_forgetting_has_a_limit_with_memory_on_none_with_memory_off_and_is_less_than_fine_tunings() -> None:
    for lost, said in ((1, "holds"), (2, "not shown"), (12, "reversed")):
        (row,) = of("C1", stages=stages(lost, 20))
        assert (row["verdict"], row["found"]["pooled"]["delta"]) == (said, 5.0 * lost)
    assert [of("C2", stages=stages(1, 20, changed))[0]["verdict"] for changed in (0, 1)] == ["holds", "reversed"]
    for own, others, said in ((1, 20, "holds"), (20, 1, "reversed"), (5, 5, "not shown")):
        assert [row["verdict"] for row in of("C3", stages=stages(own, others))] == [said, said]
    partly = {**stages(1, 20), "less": {}}
    assert {row["verdict"] for row in of("C3", stages=partly)} == {"not run"}


def test_transfer_is_judged_on_tasks_that_were_not_trained_on() -> None:
    rights = {"vismem": "1" * 20, "vanilla": "0" * 20, "sft_lora": "0" * 20}
    turned = {"vismem": "0" * 20, "vanilla": "1" * 20, "sft_lora": "1" * 20}
    for given, said in ((rights, "holds"), (turned, "reversed")):
        transfer = {"claims": judge(TRANSFER, scores(given), RESAMPLES)}
        for id_ in ("T1", "T2"):
            assert [row["verdict"] for row in of(id_, transfer=transfer)] == [said]


# --- the plan, and its table on the page ---


def test_every_claim_of_the_plan_has_parts_and_every_part_is_of_a_claim() -> None:
    plan = read_plan(ROOT / PLAN)
    claims = [*judge(of_arms("random_50"), None, RESAMPLES), whole_order([])]
    assert set(plan) == {part["id"] for part in all_parts({**NOTHING, "claims": claims})}
    ids = re.findall(r"^\| ([A-Z]\d+) ", (ROOT / PLAN).read_text(), re.MULTILINE)
    assert list(plan) == ids, "no row of the plan was left out for its form"
    assert all(row["claim"] and row["prediction"] for row in plan.values())


def test_the_study_runs_the_arms_of_every_claim() -> None:
    settings = Settings()
    for claim in of_arms("random_50"):
        assert {claim.above, claim.below} <= set(settings.arms)
    for claim in TRANSFER:
        assert {claim.above, claim.below} <= set(settings.transfer_arms)


def test_an_id_that_stands_twice_in_the_plan_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "plan.md"
    file.write_text("| M1 a claim | what | refutes | +3 |\n| M1 another | what | refutes | +3 |\n")
    with pytest.raises(ValueError, match="M1 is there twice"):
        read_plan(file)


def test_the_table_lists_every_claim_once_with_its_figures() -> None:
    plan = {"M1": {"claim": "both", "prediction": "+3"}, "M2": {"claim": "one", "prediction": "+2"}}
    found = compare(scores(better("vismem", "vanilla"), better("vanilla", "vismem")), "vismem", "vanilla", RESAMPLES)
    claims = [part("M1", "VisMem - vanilla", found), part("M1", "VisMem - other", None)]
    listed = verdicts(plan, {**NOTHING, "claims": claims})
    assert [(row["id"], row["verdict"]) for row in listed] == [("M1", "not shown"), ("M2", "not run")]
    lines = plan_table(listed).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| M1 | both | +3 | VisMem - vanilla: +0.0 (")
    assert lines[2].endswith("), above 0 in 1 of 2, below in 1; VisMem - other: not run | **not shown** |")
    assert lines[3] == "| M2 | one | +2 |  | **not run** |"
    assert part_table(listed, [0, 1]).splitlines()[2].startswith("| VisMem - vanilla | M1 | not shown | +0.0 (")
    assert "| +100.0 (+83.9 to +100.0) | -100.0 (-100.0 to -83.9) |" in part_table(listed, [0, 1])
    assert tally(listed) == "not shown 1, not run 1"


def test_the_aims_are_the_verdicts_of_their_claims() -> None:
    said = aims([{"id": "M4", "verdict": "holds"}, {"id": "F1", "verdict": "reversed"}])
    assert "above vanilla (M4): holds; at least 15 points above vanilla (M7): not run;" in said
    assert said.endswith("above SFT-LoRA (F1): reversed")

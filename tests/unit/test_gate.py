"""The release gate: each rule flips by itself, says its figures either way, and judges only what it can."""

import math
from itertools import product
from typing import Any

import pytest
from project import HASHES, PARITY, VALIDATION, scores

from vismem.config import GateConfig
from vismem.evaluation.summary import headline
from vismem.records import Metrics, Verdict
from vismem.registry.gate import Champion, judge

GATE = GateConfig(
    min_items=600, min_gain=1.0, min_gain_low=0.0, max_capability_drop=2.0, max_time_overhead=0.5, champion_margin=0.5
)
GAIN = {
    "overall": {"delta": 6.0, "ci95": [3.5, 8.5], "p": 0.001},
    "understanding": {"delta": 9.0, "ci95": [5.0, 13.0], "p": 0.001},
    "reasoning": {"delta": 7.0, "ci95": [3.0, 11.0], "p": 0.01},
    "generation": {"delta": -1.5, "ci95": [-4.0, 1.0], "p": 0.4},
}
METRICS = scores(66.0, gain=GAIN)
DATA = {name: HASHES[name] for name in ("test_sha256", "items_sha256")}
CHAMPION = Champion(version="3", overall=64.0, n=600, **DATA)


def verdict(
    metrics: Metrics = METRICS, champion: Champion | None = CHAMPION, gate: dict[str, Any] | None = None, **given: Any
) -> Verdict:
    validation, parity = given.get("validation", VALIDATION), given.get("parity", PARITY)
    return judge(metrics, validation, parity, champion, GATE.model_copy(update=gate or {}))


def changed(path: str, value: Any) -> Metrics:
    values = METRICS.model_dump()
    *sections, last = path.split(".")
    place: Any = values
    for section in sections:
        place = place[section]
    place[last] = value
    return Metrics.model_validate(values)


def broken(judged: Verdict) -> list[str]:
    assert judged.passed == all(rule.passed for rule in judged.rules)
    return [rule.name for rule in judged.rules if not rule.passed]


def reason(judged: Verdict, name: str) -> str:
    return next(rule.reason for rule in judged.rules if rule.name == name)


def test_a_good_challenger_passes_every_rule_in_order() -> None:
    judged = verdict()
    names = ["items", "clusters", "gain", "gain_interval", "capabilities", "time", "data", "parity", "champion"]
    assert [rule.name for rule in judged.rules] == names
    assert judged.passed
    assert len(judged.reasons()) == len(names)


def test_a_bundle_without_graphs_is_served_by_what_gave_the_scores() -> None:
    judged = verdict(parity=PARITY.model_copy(update={"graphs": False, "passed": False}))
    assert judged.passed
    (rule,) = (rule for rule in judged.rules if rule.name == "parity")
    assert rule.passed
    assert rule.reason == "the bundle has no ONNX graphs: torch serves it, which gave the scores"


@pytest.mark.parametrize(
    ("path", "good", "bad", "rule", "figure"),
    [
        ("clusters.overall", 40, 39, "clusters", "39 clusters"),
        ("gain.overall.delta", 1.0, 0.99, "gain", "+0.99"),
        ("gain.overall.ci95", [0.01, 5.0], [0.0, 5.0], "gain_interval", "+0.00"),
        ("gain.overall.p", 0.049, 0.05, "gain_interval", "p = 0.050"),
        ("gain.generation.delta", -2.0, -2.01, "capabilities", "-2.01"),
        ("arms.vismem.seconds_per_sample", 0.14, 0.16, "time", "+60.0%"),
        ("arms.vismem.overall", 64.6, 64.5, "champion", "64.50"),
    ],
)
def test_each_measured_rule_flips_alone_at_its_bound(path: str, good: Any, bad: Any, rule: str, figure: str) -> None:
    assert broken(verdict(changed(path, good))) == []
    refused = verdict(changed(path, bad))
    assert broken(refused) == [rule]
    assert figure in reason(refused, rule)
    assert refused.reasons() == (reason(refused, rule),)


@pytest.mark.parametrize("n", [0, 1, 599])
def test_scores_of_too_few_items_are_refused(n: int) -> None:
    judged = verdict(changed("n", n), champion=None)
    assert broken(judged) == ["items"]
    assert reason(judged, "items") == f"the scores are of {n} test items; min 600 are required"


def test_headline_and_verdict_agree_on_every_gain() -> None:
    ends, ps = (-1.0, -0.01, 0.0, 0.01, 1.0, math.nan), (0.001, 0.05, 0.5, math.nan)
    for low, high, p in product(ends, ends, ps):
        metrics = changed("gain.overall", {"delta": 5.0, "ci95": [low, high], "p": p})
        passed = "gain_interval" not in broken(verdict(metrics))
        assert passed == (headline(metrics).startswith("VisMem is better") and math.isfinite(high)), (low, high, p)
    nothing = changed("gain.overall", {"delta": 5.0, "ci95": [0.0, 9.0], "p": 0.001})
    assert headline(nothing).startswith("No difference can be shown.")
    assert "no difference can be shown" in reason(verdict(nothing), "gain_interval")


def test_a_negative_limit_asks_for_less_than_a_shown_gain() -> None:
    metrics = changed("gain.overall", {"delta": 1.5, "ci95": [-0.5, 3.5], "p": 0.2})
    assert broken(verdict(metrics)) == ["gain_interval"]
    assert broken(verdict(metrics, gate={"min_gain_low": -1.0})) == []
    assert broken(verdict(metrics, gate={"min_gain_low": -0.5})) == ["gain_interval"], "strictly above"


def test_a_data_report_that_is_not_green_breaks_only_the_data_rule_and_names_what_broke() -> None:
    found = {"severity": "error", "observed": "", "message": ""}
    rules = [
        found | {"name": "unique ids", "success": False},
        found | {"name": "label balance", "severity": "warning", "success": False},
        found | {"name": "schema", "success": True},
    ]
    for success in (False, True):
        validation = type(VALIDATION).model_validate({**VALIDATION.model_dump(), "success": success, "rules": rules})
        judged = verdict(validation=validation)
        assert broken(judged) == ["data"]
        assert reason(judged, "data") == "the data report is not green: unique ids"


@pytest.mark.parametrize(
    "found",
    [
        {"passed": False},
        {"greedy_equal": 3},
        {"items": 0, "greedy_equal": 0},
        {"max_memory_difference": math.inf},
        {"max_memory_difference": math.nan},
    ],
)
def test_onnx_that_is_not_shown_to_equal_torch_breaks_only_the_parity_rule(found: dict[str, Any]) -> None:
    judged = verdict(parity=PARITY.model_copy(update=found))
    assert broken(judged) == ["parity"]
    assert f"{found.get('greedy_equal', 4)} of {found.get('items', 4)}" in reason(judged, "parity")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("gain.overall.delta", "gain"),
        ("gain.overall.ci95", "gain_interval"),
        ("gain.overall.p", "gain_interval"),
        ("gain.reasoning.delta", "capabilities"),
        ("arms.vismem.seconds_per_sample", "time"),
        ("arms.vanilla.seconds_per_sample", "time"),
        ("arms.vismem.overall", "champion"),
    ],
)
@pytest.mark.parametrize("champion", [None, CHAMPION])
def test_a_figure_that_is_not_finite_is_refused_in_a_sentence(
    path: str, rule: str, value: float, champion: Champion | None
) -> None:
    judged = verdict(changed(path, [value, value] if path.endswith("ci95") else value), champion)
    assert broken(judged) == [rule]
    assert reason(judged, rule).endswith("cannot be judged") or reason(judged, "time").endswith("can be computed")


def test_without_a_champion_the_rule_passes_and_says_so() -> None:
    judged = verdict(champion=None)
    assert judged.passed
    assert "no champion to beat" in reason(judged, "champion")


def test_the_champion_registered_again_is_not_asked_to_beat_itself() -> None:
    itself = Champion(version="3", overall=66.0, n=600, is_candidate=True, **DATA)
    assert broken(verdict(champion=itself)) == []


@pytest.mark.parametrize("overall", [math.nan, math.inf])
def test_a_champion_without_a_usable_score_does_not_lock_the_registry(overall: float) -> None:
    unusable = Champion(version="3", overall=overall, n=0, test_sha256="", items_sha256="")
    judged = verdict(champion=unusable)
    assert broken(judged) == []
    assert "champion version 3 has no usable score" in reason(judged, "champion")
    assert broken(verdict(changed("gain.overall.delta", 0.0), unusable)) == ["gain"], "the other rules hold"


@pytest.mark.parametrize("other", [{"test_sha256": "bbb"}, {"items_sha256": "bbb"}, {"n": 599}])
def test_a_champion_scored_on_other_data_is_not_compared_and_refused_unless_asked(other: dict[str, Any]) -> None:
    champion = Champion(**({"version": "3", "overall": 1.0, "n": 600} | DATA | other))
    assert GateConfig().other_data == "refuse"
    for setting, expected in (("refuse", ["champion"]), ("pass", [])):
        judged = verdict(champion=champion, gate={"other_data": setting})
        assert broken(judged) == expected
        assert "was scored on other data" in reason(judged, "champion")
        assert f"gate.other_data says {setting}" in reason(judged, "champion")


def test_data_are_the_same_only_where_the_whole_hash_is() -> None:
    ours, theirs = (DATA | {"items_sha256": f"{'17e5' * 15}{end}"} for end in ("aaaa", "bbbb"))
    for champion, expected in ((ours, []), (theirs, ["champion"])):
        known = Champion(version="3", overall=1.0, n=600, **champion)
        assert broken(verdict(changed("items_sha256", ours["items_sha256"]), known)) == expected


def test_a_capability_without_items_is_named_and_none_at_all_is_a_refusal() -> None:
    without = scores(gain={name: values for name, values in GAIN.items() if name != "reasoning"})
    assert broken(verdict(without)) == []
    assert "no items of reasoning" in reason(verdict(without), "capabilities")
    assert broken(verdict(scores(gain={"overall": GAIN["overall"]}))) == ["capabilities"]


def test_a_verdict_reads_as_sentences() -> None:
    assert verdict().reasons() == (
        "the scores are of 600 test items; min 600 are required",
        "the items are of 600 clusters (questions that share an image or a group are one); min 40 are required",
        "the overall gain over vanilla is +6.00 points; min +1.00 is required",
        "the gain's 95 % interval is +3.50 to +8.50 points, p = 0.001: a gain is shown; "
        "it must be shown to exceed +0.00",
        "by capability the change is understanding +9.00, reasoning +7.00, generation -1.50 points; "
        "the lowest, generation, must not lose more than 2.00",
        "an answer takes 0.1200 s against vanilla's 0.1000 s, +20.0%; max +50.0% is allowed",
        "the data report has no broken rule of severity error",
        "the ONNX runtime gives the same answers as torch (4 of 4 greedy decodings equal; "
        "max difference of the memories 1.0e-06)",
        "this version scores 66.00, champion version 3 64.00: +2.00 points; more than +0.50 is required",
    )


@pytest.mark.parametrize(
    ("ends", "p", "shown"),
    [
        ([-5.0, -1.0], 0.001, ", p = 0.001: a loss is shown; "),
        ([-1.0, 5.0], 0.4, ", p = 0.400: no difference can be shown; "),
    ],
)
def test_the_interval_s_reason_says_what_is_shown(ends: list[float], p: float, shown: str) -> None:
    judged = verdict(changed("gain.overall", {"delta": 5.0, "ci95": ends, "p": p}))
    assert broken(judged) == ["gain_interval"]
    assert shown in reason(judged, "gain_interval")


@pytest.mark.parametrize("ends", [[-math.inf, 8.5], [3.5, math.inf]])
def test_an_interval_with_one_end_that_is_not_finite_cannot_be_judged(ends: list[float]) -> None:
    judged = verdict(changed("gain.overall.ci95", ends))
    assert broken(judged) == ["gain_interval"]
    assert reason(judged, "gain_interval").endswith("a figure that is not finite cannot be judged")


@pytest.mark.parametrize("lowest", ["understanding", "reasoning", "generation"])
def test_the_capability_that_loses_most_is_the_one_that_is_judged(lowest: str) -> None:
    judged = verdict(changed(f"gain.{lowest}.delta", -3.0))
    assert broken(judged) == ["capabilities"]
    assert f"the lowest, {lowest}, must not lose more than 2.00" in reason(judged, "capabilities")


def test_capabilities_without_items_are_listed_in_their_order() -> None:
    some = scores(gain={name: GAIN[name] for name in ("overall", "understanding")})
    assert "understanding +9.00 points (no items of reasoning, generation); " in reason(verdict(some), "capabilities")
    none = verdict(scores(gain={"overall": GAIN["overall"]}))
    expected = "no capability was scored apart, so that the total could hide a loss"
    assert reason(none, "capabilities") == expected


@pytest.mark.parametrize("arm", ["vanilla", "vismem"])
@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_seconds_that_are_not_positive_break_the_time_rule(arm: str, seconds: float) -> None:
    judged = verdict(changed(f"arms.{arm}.seconds_per_sample", seconds))
    assert broken(judged) == ["time"]
    assert reason(judged, "time").endswith("no overhead can be computed")


def test_an_overhead_at_its_limit_is_allowed() -> None:
    metrics = changed("arms.vismem.seconds_per_sample", 0.125)  # a quarter more than vanilla's 0.1
    assert broken(verdict(metrics, gate={"max_time_overhead": 0.25})) == []
    assert broken(verdict(metrics, gate={"max_time_overhead": 0.24})) == ["time"]


def test_every_broken_rule_of_the_data_is_named() -> None:
    found = {"severity": "error", "observed": "", "message": "", "success": False}
    for names, listed in ((["schema", "unique ids"], "schema, unique ids"), ([], "it names no rule")):
        report = {**VALIDATION.model_dump(), "success": False, "rules": [found | {"name": name} for name in names]}
        judged = verdict(validation=type(VALIDATION).model_validate(report))
        assert broken(judged) == ["data"]
        assert reason(judged, "data") == f"the data report is not green: {listed}"


def test_one_decoding_is_enough_for_parity_and_a_difference_is_said() -> None:
    assert broken(verdict(parity=PARITY.model_copy(update={"items": 1, "greedy_equal": 1}))) == []
    judged = verdict(parity=PARITY.model_copy(update={"greedy_equal": 3}))
    assert reason(judged, "parity").startswith("the ONNX runtime does not reproduce torch (3 of 4 greedy")


def test_the_data_of_both_versions_are_named_by_the_start_of_their_hashes() -> None:
    other = Champion(version="3", overall=64.0, n=500, test_sha256="0123456789", items_sha256="")
    judged = verdict(changed("items_sha256", "abcdefghijk").model_copy(update={"test_sha256": ""}), other)
    assert reason(judged, "champion").startswith(
        "champion version 3 was scored on other data (500 items unknown of test split 01234567) "
        "than this version (600 items abcdefgh of test split unknown)"
    )

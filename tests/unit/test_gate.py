"""The release gate: each rule flips by itself, and says its figures either way."""

import copy
import math
from typing import Any

import pytest

from vismem.config import GateConfig
from vismem.registry.gate import Champion, Verdict, judge

GATE = GateConfig(min_gain=1.0, min_gain_low=0.0, max_capability_drop=2.0, max_time_overhead=0.5, champion_margin=0.5)
METRICS: dict[str, Any] = {
    "n": 600,
    "arms": {
        "vanilla": {"overall": 60.0, "seconds_per_sample": 0.10},
        "vismem": {"overall": 66.0, "seconds_per_sample": 0.12},
    },
    "gain": {
        "overall": {"delta": 6.0, "ci95": [3.5, 8.5], "p": 0.001},
        "understanding": {"delta": 9.0, "ci95": [5.0, 13.0], "p": 0.001},
        "reasoning": {"delta": 7.0, "ci95": [3.0, 11.0], "p": 0.01},
        "generation": {"delta": -1.5, "ci95": [-4.0, 1.0], "p": 0.4},
    },
}
CHAMPION = Champion(version="3", overall=64.0, n=600, test_sha256="aaa")


def verdict(
    metrics: dict[str, Any] = METRICS, champion: Champion | None = CHAMPION, gate: GateConfig = GATE, **given: Any
) -> Verdict:
    validation = given.get("validation", {"success": True, "rules": []})
    parity = given.get("parity", {"passed": True, "items": 16, "greedy_equal": 16, "max_memory_difference": 2e-6})
    return judge(metrics, validation, parity, champion, gate, "aaa")


def changed(path: str, value: Any) -> dict[str, Any]:
    metrics = copy.deepcopy(METRICS)
    *sections, last = path.split(".")
    place: Any = metrics
    for section in sections:
        place = place[section]
    place[last] = value
    return metrics


def broken(judged: Verdict) -> list[str]:
    assert judged.passed == all(rule.passed for rule in judged.rules)
    return [rule.name for rule in judged.rules if not rule.passed]


def reason(judged: Verdict, name: str) -> str:
    return next(rule.reason for rule in judged.rules if rule.name == name)


def test_a_good_challenger_passes_every_rule_in_order() -> None:
    judged = verdict()
    assert [rule.name for rule in judged.rules] == [
        "gain",
        "gain_interval",
        "capabilities",
        "time",
        "data",
        "parity",
        "champion",
    ]
    assert judged.passed
    assert len(judged.reasons()) == 7


@pytest.mark.parametrize(
    ("path", "good", "bad", "rule", "figure"),
    [
        ("gain.overall.delta", 1.0, 0.99, "gain", "+0.99"),
        ("gain.overall.ci95", [0.0, 5.0], [-0.01, 5.0], "gain_interval", "-0.01"),
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
    assert refused.reasons() == [reason(refused, rule)]


def test_a_data_report_that_is_not_green_breaks_only_the_data_rule_and_names_what_broke() -> None:
    rules = [
        {"name": "unique ids", "severity": "error", "success": False},
        {"name": "label balance", "severity": "warning", "success": False},
        {"name": "schema", "severity": "error", "success": True},
    ]
    judged = verdict(validation={"success": False, "rules": rules})
    assert broken(judged) == ["data"]
    assert reason(judged, "data") == "the data report is not green: unique ids"


def test_onnx_that_differs_from_torch_breaks_only_the_parity_rule() -> None:
    judged = verdict(parity={"passed": False, "items": 16, "greedy_equal": 15, "max_memory_difference": 0.02})
    assert broken(judged) == ["parity"]
    assert "15 of 16" in reason(judged, "parity")
    assert "2.0e-02" in reason(judged, "parity")


@pytest.mark.parametrize(
    ("path", "rules"),
    [
        ("gain.overall.delta", ["gain"]),
        ("gain.overall.ci95", ["gain_interval"]),
        ("gain.reasoning.delta", ["capabilities"]),
        ("arms.vismem.seconds_per_sample", ["time"]),
        ("arms.vanilla.seconds_per_sample", ["time"]),
        ("arms.vismem.overall", ["champion"]),
    ],
)
def test_a_figure_that_is_not_a_number_never_passes(path: str, rules: list[str]) -> None:
    value = [math.nan, math.nan] if path.endswith("ci95") else math.nan
    assert broken(verdict(changed(path, value))) == rules


def test_without_a_champion_the_rule_passes_and_says_so() -> None:
    judged = verdict(champion=None)
    assert judged.passed
    assert "no present champion" in reason(judged, "champion")


def test_the_champion_registered_again_is_not_asked_to_beat_itself() -> None:
    itself = Champion(version="3", overall=66.0, n=600, test_sha256="aaa", is_candidate=True)
    assert broken(verdict(champion=itself)) == []


@pytest.mark.parametrize("other", [{"test_sha256": "bbb"}, {"n": 599}])
def test_a_champion_scored_on_other_data_is_said_so_and_the_parameter_decides(other: dict[str, Any]) -> None:
    champion = Champion(**({"version": "3", "overall": 99.0, "n": 600, "test_sha256": "aaa"} | other))
    lenient, strict = (verdict(champion=champion, gate=GATE.model_copy(update={"other_data": o})) for o in OTHER)
    assert (broken(lenient), broken(strict)) == ([], ["champion"])
    assert "other data" in reason(lenient, "champion")
    assert "other data" in reason(strict, "champion")


OTHER = ("pass", "refuse")


def test_a_capability_without_items_is_named_and_none_at_all_is_a_refusal() -> None:
    without = changed("gain.reasoning", None)
    assert broken(verdict(without)) == []
    assert "no items of reasoning" in reason(verdict(without), "capabilities")
    bare = copy.deepcopy(METRICS)
    bare["gain"] = {"overall": METRICS["gain"]["overall"]}
    assert broken(verdict(bare)) == ["capabilities"]

"""The release gate: pure rules from measured figures to a verdict with one sentence of reason a rule. No MLflow here.

Scores and gains are percentage points, as in `artifacts/evaluate/metrics.json`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vismem.config import GateConfig

CAPABILITIES = ("understanding", "reasoning", "generation")


@dataclass(frozen=True)
class Rule:
    """One rule's outcome. `reason` is a sentence with the figures, whichever way it went."""

    name: str
    passed: bool
    reason: str


@dataclass(frozen=True)
class Verdict:
    """All rules of the gate; passed when every one has."""

    passed: bool
    rules: tuple[Rule, ...]

    def reasons(self) -> list[str]:
        """Why it was refused: the broken rules' reasons; of a passed verdict, every rule's."""
        return [rule.reason for rule in self.rules if self.passed or not rule.passed]


@dataclass(frozen=True)
class Champion:
    """The present champion as the registry knows it: its version, its overall score and what it was scored on."""

    version: str
    overall: float
    n: int
    test_sha256: str
    is_candidate: bool = False  # the challenger is this very version, registered before


def judge(
    metrics: Mapping[str, Any],
    validation: Mapping[str, Any],
    parity: Mapping[str, Any],
    champion: Champion | None,
    gate: GateConfig,
    test_sha256: str = "",
) -> Verdict:
    """Judge a challenger: `metrics`, `validation` and `parity` are the JSON of evaluate, validate and export.

    `test_sha256` names the data behind `metrics`; a champion scored on other data is not compared by score.
    A missing figure raises KeyError (a fault, not a refusal); a figure that is not a number (NaN) breaks its rule.
    """
    rules = (
        _gain(metrics["gain"]["overall"], gate),
        _interval(metrics["gain"]["overall"], gate),
        _capabilities(metrics["gain"], gate),
        _time(metrics["arms"], gate),
        _data(validation),
        _parity(parity),
        _champion(metrics, champion, gate, test_sha256),
    )
    return Verdict(all(rule.passed for rule in rules), rules)


def _gain(overall: Mapping[str, Any], gate: GateConfig) -> Rule:
    delta = float(overall["delta"])
    passed = delta >= gate.min_gain
    return Rule(
        "gain", passed, f"the overall gain over vanilla is {delta:+.2f} points; at least {gate.min_gain:+.2f} is asked"
    )


def _interval(overall: Mapping[str, Any], gate: GateConfig) -> Rule:
    low, high = (float(end) for end in overall["ci95"])
    passed = low >= gate.min_gain_low
    return Rule(
        "gain_interval",
        passed,
        f"the gain's 95 % interval is {low:+.2f} to {high:+.2f} points; "
        f"its lower end must be at least {gate.min_gain_low:+.2f}",
    )


def _capabilities(gain: Mapping[str, Any], gate: GateConfig) -> Rule:
    deltas = {name: float(gain[name]["delta"]) for name in CAPABILITIES if gain.get(name) is not None}
    if not deltas:
        return Rule("capabilities", False, "no capability was scored apart, so that a loss could hide in the total")
    worst = min(deltas, key=lambda name: deltas[name])
    passed = all(delta >= -gate.max_capability_drop for delta in deltas.values())
    missing = [name for name in CAPABILITIES if name not in deltas]
    note = f" (no items of {', '.join(missing)})" if missing else ""
    listed = ", ".join(f"{name} {delta:+.2f}" for name, delta in deltas.items())
    return Rule(
        "capabilities",
        passed,
        f"by capability the change is {listed} points{note}; "
        f"the least, {worst}, must not lose more than {gate.max_capability_drop:.2f}",
    )


def _time(arms: Mapping[str, Any], gate: GateConfig) -> Rule:
    vanilla = float(arms["vanilla"]["seconds_per_sample"])
    vismem = float(arms["vismem"]["seconds_per_sample"])
    if not vanilla > 0:
        return Rule("time", False, f"vanilla's seconds a sample are {vanilla}, so that no overhead can be told")
    overhead = vismem / vanilla - 1
    return Rule(
        "time",
        overhead <= gate.max_time_overhead,
        f"an answer takes {vismem:.4f} s against vanilla's {vanilla:.4f} s, {overhead:+.1%}; "
        f"at most {gate.max_time_overhead:+.1%} is allowed",
    )


def _data(validation: Mapping[str, Any]) -> Rule:
    if validation["success"] is True:
        return Rule("data", True, "the data report has no broken rule of severity error")
    broken = [
        str(rule["name"])
        for rule in validation.get("rules", ())
        if not rule["success"] and rule.get("severity", "error") == "error"
    ]
    return Rule("data", False, f"the data report is not green: {', '.join(broken) or 'it names no rule'}")


def _parity(parity: Mapping[str, Any]) -> Rule:
    passed = parity["passed"] is True
    equal, items = parity.get("greedy_equal", "?"), parity.get("items", "?")
    difference = parity.get("max_memory_difference")
    largest = f"; the memories differ by {float(difference):.1e} at most" if difference is not None else ""
    word = "gives the same answers as torch" if passed else "does not reproduce torch"
    return Rule("parity", passed, f"the ONNX runtime {word} ({equal} of {items} greedy decodings equal{largest})")


def _champion(metrics: Mapping[str, Any], champion: Champion | None, gate: GateConfig, test_sha256: str) -> Rule:
    score, n = float(metrics["arms"]["vismem"]["overall"]), int(metrics["n"])
    if champion is None:
        return Rule("champion", True, f"there is no present champion to beat; this version scores {score:.2f}")
    if champion.is_candidate:
        return Rule("champion", True, f"this is the present champion itself, version {champion.version}")
    if (champion.test_sha256, champion.n) != (test_sha256, n):
        theirs, ours = champion.test_sha256[:12] or "unknown", test_sha256[:12] or "unknown"
        return Rule(
            "champion",
            gate.other_data == "pass",
            f"champion version {champion.version} was scored on other data ({champion.n} items, {theirs}) than this "
            f"version ({n} items, {ours}), so that its {champion.overall:.2f} and the {score:.2f} here do not compare; "
            f"gate.other_data says {gate.other_data}",
        )
    ahead = score - champion.overall
    return Rule(
        "champion",
        ahead > gate.champion_margin,
        f"this version scores {score:.2f}, champion version {champion.version} {champion.overall:.2f}: {ahead:+.2f} "
        f"points; more than {gate.champion_margin:+.2f} is asked",
    )

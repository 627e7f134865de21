"""The release gate: pure rules from measured figures to a verdict with one sentence of reason per rule. No MLflow.

Scores and gains are percentage points, as in `vismem.records.Metrics`. A rule judges only what it can: where a figure
that it reads is NaN or infinite, it is broken and says so.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vismem.config import GateConfig
from vismem.records import Difference, Metrics, ParityReport, Rule, Validation, Verdict, p_value

CAPABILITIES = ("understanding", "reasoning", "generation")
DIGITS = 4  # of a score, as the registry keeps a champion's


@dataclass(frozen=True)
class Champion:
    """The present champion as the registry knows it; `overall` is NaN where it has no usable score."""

    version: str
    overall: float
    n: int
    test_sha256: str
    items_sha256: str
    is_candidate: bool = False  # the challenger is this very version, registered before


def judge(
    metrics: Metrics, validation: Validation, parity: ParityReport, champion: Champion | None, gate: GateConfig
) -> Verdict:
    """Judge a challenger by what evaluate, validate and export measured, against the present champion."""
    n, gain = metrics.n, metrics.gain["overall"]
    rules = (
        _rule("items", n >= gate.min_items, f"the scores are of {n} test items; min {gate.min_items} are required"),
        _clusters(metrics, gate),
        _rule(
            "gain",
            gain.delta >= gate.min_gain,
            f"the overall gain over vanilla is {gain.delta:+.2f} points; min {gate.min_gain:+.2f} is required",
            gain.delta,
        ),
        _interval(gain, gate),
        _capabilities(metrics.gain, gate),
        _time(metrics.arms, gate),
        _data(validation),
        _parity(parity),
        _champion(metrics, champion, gate),
    )
    return Verdict(passed=all(rule.passed for rule in rules), rules=rules)


def _rule(name: str, passed: bool, reason: str, *figures: float) -> Rule:
    """The rule's outcome; broken whatever `passed` says where one of the figures that it read is not finite."""
    if not all(map(math.isfinite, figures)):
        return Rule(name=name, passed=False, reason=f"{reason}; a figure that is not finite cannot be judged")
    return Rule(name=name, passed=passed, reason=reason)


def _clusters(metrics: Metrics, gate: GateConfig) -> Rule:
    """Of too few, interval and test promise nothing, however many questions each has."""
    count = metrics.clusters["overall"]
    reason = f"the items are of {count} clusters (questions that share an image or a group are one)"
    return _rule("clusters", count >= gate.min_clusters, f"{reason}; min {gate.min_clusters} are required")


def _interval(gain: Difference, gate: GateConfig) -> Rule:
    """By the rule of the headline (`Difference.exceeds`): with a limit of 0 or more it must say "is better"."""
    low, high = gain.ci95
    shown = {"better": "a gain is shown", "worse": "a loss is shown", "not shown": "no difference can be shown"}
    reason = (
        f"the gain's 95 % interval is {low:+.2f} to {high:+.2f} points, {p_value(gain.p)}: {shown[gain.outcome]}; "
        f"it must be shown to exceed {gate.min_gain_low:+.2f}"
    )
    return _rule("gain_interval", gain.exceeds(gate.min_gain_low), reason, low, high, gain.p)


def _capabilities(gain: Mapping[str, Difference], gate: GateConfig) -> Rule:
    deltas = {name: gain[name].delta for name in CAPABILITIES if name in gain}
    if not deltas:
        return _rule("capabilities", False, "no capability was scored apart, so that the total could hide a loss")
    worst = min(deltas, key=lambda name: deltas[name])
    missing = [name for name in CAPABILITIES if name not in deltas]
    note = f" (no items of {', '.join(missing)})" if missing else ""
    listed = ", ".join(f"{name} {delta:+.2f}" for name, delta in deltas.items())
    reason = (
        f"by capability the change is {listed} points{note}; "
        f"the lowest, {worst}, must not lose more than {gate.max_capability_drop:.2f}"
    )
    return _rule("capabilities", deltas[worst] >= -gate.max_capability_drop, reason, *deltas.values())


def _time(arms: Mapping[str, Mapping[str, float]], gate: GateConfig) -> Rule:
    vanilla, vismem = (arms[arm]["seconds_per_sample"] for arm in ("vanilla", "vismem"))
    if vanilla <= 0 or vismem <= 0:
        reason = f"the seconds per sample are {vanilla} of vanilla and {vismem} of VisMem: no overhead can be computed"
        return _rule("time", False, reason)
    overhead = vismem / vanilla - 1
    reason = (
        f"an answer takes {vismem:.4f} s against vanilla's {vanilla:.4f} s, {overhead:+.1%}; "
        f"max {gate.max_time_overhead:+.1%} is allowed"
    )
    return _rule("time", overhead <= gate.max_time_overhead, reason, vanilla, vismem)


def _data(validation: Validation) -> Rule:
    broken = [rule.name for rule in validation.rules if not rule.success and rule.severity == "error"]
    if validation.success and not broken:
        return _rule("data", True, "the data report has no broken rule of severity error")
    return _rule("data", False, f"the data report is not green: {', '.join(broken) or 'it names no rule'}")


def _parity(parity: ParityReport) -> Rule:
    if not parity.graphs:
        return _rule("parity", True, "the bundle has no ONNX graphs: torch serves it, which gave the scores")
    passed = parity.passed and parity.greedy_equal == parity.items > 0
    word = "gives the same answers as torch" if passed else "does not reproduce torch"
    reason = (
        f"the ONNX runtime {word} ({parity.greedy_equal} of {parity.items} greedy decodings equal; "
        f"max difference of the memories {parity.max_memory_difference:.1e})"
    )
    return _rule("parity", passed, reason, parity.max_memory_difference)


def _champion(metrics: Metrics, champion: Champion | None, gate: GateConfig) -> Rule:
    score = round(metrics.arms["vismem"]["overall"], DIGITS)
    passed = True
    if champion is None:
        reason = f"there is no champion to beat; this version scores {score:.2f}"
    elif champion.is_candidate:
        reason = f"this is the present champion itself, version {champion.version}"
    elif not math.isfinite(champion.overall):
        reason = (
            f"champion version {champion.version} has no usable score in the registry, so that it cannot be compared "
            f"and is replaced by what passes the other rules; this version scores {score:.2f}"
        )
    elif any(getattr(metrics, key) != getattr(champion, key) for key in ("n", "test_sha256", "items_sha256")):
        passed = gate.other_data == "pass"
        reason = (
            f"champion version {champion.version} was scored on other data ({_data_name(champion)}) than this version "
            f"({_data_name(metrics)}), so that its {champion.overall:.2f} and the {score:.2f} here do not compare; "
            f"gate.other_data says {gate.other_data}"
        )
    else:
        ahead = score - champion.overall
        passed = ahead > gate.champion_margin
        reason = (
            f"this version scores {score:.2f}, champion version {champion.version} {champion.overall:.2f}: "
            f"{ahead:+.2f} points; more than {gate.champion_margin:+.2f} is required"
        )
    return _rule("champion", passed, reason, score)


def _data_name(of: Metrics | Champion) -> str:
    return f"{of.n} items {of.items_sha256[:8] or 'unknown'} of test split {of.test_sha256[:8] or 'unknown'}"

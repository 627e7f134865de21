"""The lists of `make mutants` fit the code, and its judgement counts what is not killed."""

import ast
from pathlib import Path

import pytest
from mutation import run
from mutation.run import Mutant, accepted, judge, modules

ROOT = Path(__file__).parents[2]
MODULE = "vismem/training/grpo.py"
KNOWN = ("training.grpo.kl_term", "- a\n+ b")


def test_modules_and_their_tests_exist() -> None:
    for module, (tests, _) in modules().items():
        assert tests, module
        assert [name for name in (module, *tests) if not (ROOT / name).is_file()] == []


def test_what_an_accepted_survivor_changes_stands_in_its_function() -> None:
    sources = {module: functions(module) for module in modules()}
    known = {
        f"{run.dotted(module)}.{name}": lines for module, found in sources.items() for name, lines in found.items()
    }
    for (function, change), reason in accepted().items():
        gone = {line[2:] for line in change.splitlines() if line.startswith("- ")}
        assert gone - known[function] == set(), "the code has changed: remove the entry from accepted.toml"
        assert gone, change
        assert reason


def functions(module: str) -> dict[str, set[str]]:
    """Function, or Class.method -> its lines, without indentation."""
    text = (ROOT / module).read_text()
    lines = [line.strip() for line in text.splitlines()]
    bodies = [("", ast.parse(text).body)]
    bodies += [(f"{node.name}.", node.body) for node in bodies[0][1] if isinstance(node, ast.ClassDef)]
    return {
        prefix + node.name: set(lines[node.lineno - 1 : node.end_lineno])
        for prefix, body in bodies
        for node in body
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize(
    ("count", "alive", "failed"),
    [
        (10, [KNOWN], False),
        (9, [KNOWN], True),  # fewer than 90 % killed
        (10, [], True),  # one that is listed is killed
        (20, [KNOWN, (KNOWN[0], "- a\n+ c")], True),
        (20, [KNOWN, ("training.grpo.other", KNOWN[1])], True),
    ],
)
def test_survivors_must_be_few_and_listed_and_what_is_listed_must_survive(
    count: int, alive: list[tuple[str, str]], failed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = {KNOWN: "reason", ("training.loop.other", "- c\n+ d"): "of another module"}
    monkeypatch.setattr("mutation.run.accepted", lambda: listed)
    assert judge(MODULE, count, [Mutant(*key, fate="survived") for key in alive]) is failed


def test_a_mutant_that_was_not_run_through_is_no_accepted_survivor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mutation.run.accepted", lambda: {KNOWN: "reason"})
    assert judge(MODULE, 10, [Mutant(*KNOWN, fate="neither killed nor survived")])


def test_a_mutant_is_named_by_its_function_and_the_lines_that_it_changes() -> None:
    assert run.function_of("vismem.training.grpo.x_kl_term__mutmut_12") == "training.grpo.kl_term"
    assert run.function_of("vismem.models.lora.xǁLoraǁ_add__mutmut_3") == "models.lora.Lora._add"
    diff = "--- vismem/a.py\n+++ vismem/a.py\n@@ -1,2 +1,2 @@\n def f():\n-    return 1\n+    return 2\n"
    assert run.change_of(diff) == "- return 1\n+ return 2"


def test_a_change_of_strict_or_of_a_device_alone_is_not_counted() -> None:
    change = "- for a, b in zip(f(x, y), b, strict=True):\n+ for a, b in zip({}):"
    for unseen in ("f(x, y), b, ", "f(x, y), b, strict=False", "f(x, y), b, strict=None"):
        assert run.no_test_can_see(change.format(unseen))
    for seen in ("f(x, y), strict=True", "None, b, strict=True", "f(x, ), b, strict=True"):
        assert not run.no_test_can_see(change.format(seen))
    change = "- key = torch.arange(keys.shape[1], device=keys.device)[None]\n+ key = torch.arange({})[None]"
    assert run.no_test_can_see(change.format("keys.shape[1], device=None"))
    assert run.no_test_can_see(change.format("keys.shape[1], "))
    assert not run.no_test_can_see(change.format("keys.shape[2], device=keys.device"))
    assert not run.no_test_can_see("- a(b, c)\n+ a(b, )")

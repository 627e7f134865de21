"""Defects that code like ours was published with, looked for in the source: each test names one."""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAMILIES = ("qwen2", "internvl", "llava")
COPIED = 60  # syntax nodes, some ten lines: what is smaller may be alike by chance


@lru_cache
def sources(folder: str = "vismem") -> dict[str, ast.Module]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    return {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text()) for file in files}


def nodes(tree: ast.AST, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
    return (node for node in ast.walk(tree) if isinstance(node, kinds))


def test_no_parameter_has_a_default_where_it_is_read() -> None:
    """Under a wrong key it would fall back silently: `config.get("lora_r", 8)`, `getattr(config, "lora_r", 8)`."""
    found = []
    for name, tree in sources().items():
        for call in nodes(tree, ast.Call):
            assert isinstance(call, ast.Call)
            holder: ast.expr | None = None
            if isinstance(call.func, ast.Name) and call.func.id == "getattr" and len(call.args) == 3:
                holder = call.args[0]
            elif isinstance(call.func, ast.Attribute) and call.func.attr == "get" and len(call.args) == 2:
                holder = call.func.value
            if holder is not None and ast.unparse(holder).startswith(("config", "self.config", "params")):
                found.append(f"{name}:{call.lineno}: {ast.unparse(call)}")
    assert found == []


def test_no_failure_is_swallowed() -> None:
    """No bare `except`, no broad one that does not raise again, none that passes over what it caught."""
    assert found_by_ruff("E722,BLE001,S110,S112") == ""


def test_no_code_is_commented_out() -> None:
    assert found_by_ruff("ERA001") == ""


def found_by_ruff(rules: str) -> str:
    command = [sys.executable, "-m", "ruff", "check", "--quiet", "--output-format", "concise", "--select", rules]
    done = subprocess.run([*command, "vismem", "tests", "benchmarks"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_no_function_is_pasted_twice() -> None:
    """The same statements, whatever the names of function, arguments and variables."""
    seen = defaultdict(list)
    for name, tree in sources().items():
        for function in nodes(tree, ast.FunctionDef):
            assert isinstance(function, ast.FunctionDef)
            body = [s for s in function.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
            if sum(1 for statement in body for _ in ast.walk(statement)) >= COPIED:
                seen[_shape(body)].append(f"{name}:{function.lineno} {function.name}")
    assert [places for places in seen.values() if len(places) > 1] == []


def _shape(body: list[ast.stmt]) -> str:
    class Anonymous(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.Name:
            return ast.Name(id="_", ctx=node.ctx)

    copy = ast.parse("\n".join(ast.unparse(statement) for statement in body))
    return ast.dump(Anonymous().visit(copy))


def test_no_type_is_copied_into_a_second_file() -> None:
    """Two classes of one name that share half of their fields; a rule of data and a rule of the gate do not."""
    seen: dict[str, dict[str, set[str]]] = defaultdict(dict)
    for name, tree in sources().items():
        for kind in nodes(tree, ast.ClassDef):
            assert isinstance(kind, ast.ClassDef)
            seen[kind.name][name] = {ast.unparse(s.target) for s in kind.body if isinstance(s, ast.AnnAssign)}
    for kind_name, places in seen.items():
        for (first, mine), (second, theirs) in combinations(places.items(), 2):
            assert 2 * len(mine & theirs) < max(len(mine | theirs), 1), f"{kind_name} in {first} and {second}"


def test_what_all_families_share_has_no_branch_for_one_of_them() -> None:
    """Engine, training and evaluation compare with no family's name."""
    shared = ("vismem/generation/", "vismem/evaluation/", "vismem/models/memory.py", "vismem/models/vismem.py")
    trainers = tuple(f"vismem/training/{name}.py" for name in ("grpo", "loop", "rollout", "run", "stage1", "stage2"))
    for name, tree in sources().items():
        if name.startswith(shared + trainers):
            texts = [n.value for n in nodes(tree, ast.Constant) if isinstance(n.value, str)]  # type: ignore[attr-defined]
            names = [n.id for n in nodes(tree, ast.Name)] + [n.attr for n in nodes(tree, ast.Attribute)]  # type: ignore[attr-defined]
            docs = {ast.get_docstring(n, clean=False) for n in _documented(tree)}
            found = [t for t in [*texts, *names] if t not in docs and any(f in t.lower() for f in FAMILIES)]
            assert found == [], name


def _documented(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef))


def test_no_test_is_switched_off_for_good() -> None:
    """Skipping on a condition is fine: the test runs where it can."""
    for name, tree in sources("tests").items():
        marks = [ast.unparse(n) for n in nodes(tree, ast.Attribute) if n.attr in ("skip", "xfail")]  # type: ignore[attr-defined]
        assert [mark for mark in marks if mark.startswith("pytest.mark")] == [], name


def test_every_test_is_in_a_file_that_pytest_collects() -> None:
    for name, tree in sources("tests").items():
        tests = [n.name for n in nodes(tree, ast.FunctionDef) if n.name.startswith("test_")]  # type: ignore[attr-defined]
        assert not tests or Path(name).name.startswith("test_"), name
        assert len(tests) == len(set(tests)), f"{name}: a second test of the same name hides the first"

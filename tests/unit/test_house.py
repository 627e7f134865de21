"""The house stays readable: no cycles of imports, no long files, no long functions, no parameter without a reader."""

import ast
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from vismem.config import Section

ROOT = Path(__file__).parents[2]
LONGEST_FILE = 300  # lines
LONGEST_FUNCTION = 80
MYPY = """[mypy]
follow_imports = skip
ignore_missing_imports = true
check_untyped_defs = true
[mypy-pydantic.*,pydantic_core.*]
follow_imports = silent
"""
READ_BY_NAME = {  # getattr(source, split); pydantic reads `kind` to tell sources apart
    *((f"{kind}Source", split) for kind in ("Scenes", "EasyVqa") for split in ("train", "validation", "test")),
    *((f"{kind}Source", "kind") for kind in ("Scenes", "EasyVqa", "Jsonl", "Nlvr", "LmuData")),
}


def tracked() -> list[Path]:
    """Every Python file of the repository, tests too."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.splitlines() if (ROOT / name).is_file()]
    assert len(files) > 100
    return files


@lru_cache
def imports() -> dict[str, set[str]]:
    """Of every module the modules of this repository that it imports, those for type checkers and late ones too."""
    modules = {_name(file): file for top in ("vismem", "recipes") for file in (ROOT / top).rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, file in modules.items():
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        names = set(_imported(ast.parse(file.read_text()), package))
        found[name] = {n if n in modules else n.rpartition(".")[0] for n in names} & modules.keys() - {name}
    return found


def _name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _imported(tree: ast.Module, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            place = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{place}.{alias.name}" for alias in node.names)


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """One cycle of the graph, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_file_imports_itself_over_others() -> None:
    assert sum(map(len, imports().values())) > 300
    assert cycle(imports()) == []


def test_no_package_imports_itself_over_others() -> None:
    """A package is a folder of `vismem/` or `recipes/`, or a file beside them."""
    packages: dict[str, set[str]] = {}
    for name, others in imports().items():
        mine = _package(name)
        packages.setdefault(mine, set()).update({_package(other) for other in others} - {mine})
    assert cycle(packages) == []


def _package(name: str) -> str:
    return ".".join(name.split(".")[:2])


def test_no_two_files_of_tests_have_one_name() -> None:
    """pytest collects only one of them."""
    names = Counter(file.name for file in tracked() if ROOT / "tests" in file.parents)
    assert {name for name, count in names.items() if count > 1} == {"conftest.py"}


def test_files_can_be_read_to_their_end() -> None:
    lengths = {file.relative_to(ROOT).as_posix(): len(file.read_text().splitlines()) for file in tracked()}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_functions_fit_on_a_screen_or_two() -> None:
    found = []
    for file in tracked():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                found += [f"{file}:{node.lineno} {node.name}: {length}"] if length > LONGEST_FUNCTION else []
    assert found == []


def test_no_parameter_is_read_by_nothing_and_one_that_is_would_be_found(tmp_path: Path) -> None:
    """Three are planted: a new name, one that other code has as an attribute, one that another section has."""
    planted = {("Stage1Config", name) for name in ("planted", "text", "path")}
    assert unread(tmp_path, planted) == planted


def unread(folder: Path, planted: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Section and name of every parameter without a reader: mypy does not miss it in a copy where no section has any.

    `planted` are parameters that the library does not have.
    """
    shutil.copytree(ROOT / "vismem", folder / "vismem", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "mypy.ini").write_text(MYPY)
    sections = {section.__name__: section for section in _subclasses(Section)}
    removed = set(planted)
    for file in (folder / "vismem" / "config").glob("*.py"):
        removed |= _remove_parameters(file, set(sections))
    command = [sys.executable, "-m", "mypy", "vismem"]
    missed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout
    read = set(re.findall(r'error: (?:Item )?"(\w+)"(?: of "[^"]+")? has no attribute "(\w+)"', missed))
    assert len(read) > 50, missed[-2000:]
    holders = {(base.__name__, name) for kind, name in read if kind in sections for base in sections[kind].__mro__}
    inherited = {
        (kind, name)
        for kind, name in removed
        for base in sections[kind].__mro__[1:]
        if (base.__name__, name) in removed
    }
    return removed - holders - inherited - READ_BY_NAME


def _subclasses(kind: type[Section]) -> set[type[Section]]:
    return {kind}.union(*map(_subclasses, kind.__subclasses__()))


def _remove_parameters(file: Path, sections: set[str]) -> set[tuple[str, str]]:
    """Remove every parameter that is no section itself from the sections in this file; section and name of each."""
    lines, removed = file.read_text().splitlines(), set()
    for kind in ast.walk(ast.parse(file.read_text())):
        if isinstance(kind, ast.ClassDef) and kind.name in sections:
            for field in (node for node in kind.body if isinstance(node, ast.AnnAssign)):
                if not {"Source", *sections} & {n.id for n in ast.walk(field.annotation) if isinstance(n, ast.Name)}:
                    removed.add((kind.name, ast.unparse(field.target)))
                    lines[field.lineno - 1 : field.end_lineno] = [""] * ((field.end_lineno or 0) - field.lineno + 1)
    file.write_text("\n".join(lines))
    return removed

"""`make mutants`: breaks each module of modules.toml in many small ways and counts the breaks that no test notices.

mutmut makes the mutants and runs, for each, the tests that reach the mutated function. A mutant survives if they all
pass. The exit status is 1 if less than SHARE of a module's mutants are killed, if one survives that accepted.toml does
not list, or if one that it lists is killed.

mutmut mutates the bodies of functions and methods, but not those under a decorator, and nothing outside a function. Of
the modules that modules.toml has under "sampled" every fifth mutant of a function is made, its first among them.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
WORK = ROOT / "runs" / "mutants"  # one copy of the checkout per module, made anew by every run
SHARE = 0.9
EVERY, SAMPLED = "*", "*__mutmut_*[16]"  # names of mutants
FUNCTIONS = "*[!0-9]"  # of functions: whose tests must pass without a mutant
KILLED = (1, 3, 24, -24, 36, 152)  # exit status of pytest with a failed test, or of a mutant that ran too long
SURVIVED = 0
UNSEEN = re.compile(r",\s*((strict|device)=[\w.]+)?\)")

# One process that has torch imported and never ran it forks a process per mutant: autograd cannot be forked after use.
# A mutant that runs too long counts as killed, so the time is long: on a busy machine tests that pass take long too.
SETTINGS = """
[tool.mutmut]
source_paths = ["vismem"]
also_copy = ["assets", "deploy", "dvc.yaml", "examples", "params.yaml", "recipes"]
only_mutate = {module}
pytest_add_cli_args_test_selection = {tests}
process_isolation = "forkserver"
timeout_constant = 30.0
timeout_multiplier = 4.0
"""


@dataclass(frozen=True)
class Mutant:
    """A mutant that no test killed: its function, its lines before and behind the change, and what came of it."""

    function: str  # "module.function" or "module.Class.method", without the package
    change: str  # lines without indentation, "- " before those that went and "+ " before those that came
    fate: str


def main() -> int:
    """Run the modules named on the command line, or all; the exit status."""
    tests = modules()
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument("module", nargs="*", metavar="MODULE", help=f"one of {', '.join(tests)}; all if left out")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time; all cores if left out")
    arguments = parser.parse_args()
    chosen = arguments.module or list(tests)
    if unknown := [module for module in chosen if module not in tests]:
        parser.error(f"modules.toml names no tests for {', '.join(unknown)}; it has {', '.join(tests)}")
    return int(any([judge(module, *mutate(module, *tests[module], arguments.jobs)) for module in chosen]))


def modules() -> dict[str, tuple[list[str], str]]:
    """Module -> the test files that hold it, and the names of the mutants that are made."""
    lists = tomllib.loads((HERE / "modules.toml").read_text())
    return {
        module: (tests, names)
        for key, names in (("every", EVERY), ("sampled", SAMPLED))
        for module, tests in lists[key].items()
    }


def accepted() -> dict[tuple[str, str], str]:
    """(function, change) of each survivor that no test can or need kill -> the reason."""
    entries = tomllib.loads((HERE / "accepted.toml").read_text())["survivors"]
    return {(entry["function"], change.strip()): entry["reason"] for entry in entries for change in entry["changes"]}


def mutate(module: str, tests: list[str], names: str, jobs: int) -> tuple[int, list[Mutant]]:
    """Run a module's mutants of these names in a copy of the checkout, `jobs` at a time; how many, and those alive.

    Those that `no_test_can_see` are not counted, unless one does: a looser `zip` is the same for sequences of equal
    length, and another device is, where there is one.
    """
    folder = WORK / module.removesuffix(".py").replace("/", ".")
    shutil.rmtree(folder, ignore_errors=True)
    for name in _files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    with (folder / "pyproject.toml").open("a") as file:
        file.write(SETTINGS.format(module=json.dumps([module]), tests=json.dumps(tests)))
    print(f"{module}: the mutants run in {folder.relative_to(ROOT)}", flush=True)
    _mutmut(folder, "run", "--max-children", str(jobs), names, FUNCTIONS)
    every = json.loads((folder / "mutants" / f"{module}.meta").read_text())["exit_code_by_key"]
    codes = {name: code for name, code in every.items() if fnmatch(name, names)}
    alive = [_described(folder, name, code) for name, code in codes.items() if code not in KILLED]
    counted = [mutant for mutant in alive if not no_test_can_see(mutant.change)]
    return len(codes) - len(alive) + len(counted), counted


def judge(module: str, count: int, alive: list[Mutant]) -> bool:
    """Print what came of a module's mutants; whether that is a failure."""
    known = {key for key in accepted() if key[0].startswith(f"{dotted(module)}.")}
    found = {(mutant.function, mutant.change) for mutant in alive if mutant.fate == "survived"}
    new = [mutant for mutant in alive if mutant.fate != "survived" or (mutant.function, mutant.change) not in known]
    killed = known - found if modules()[module][1] == EVERY else set()  # of a sample, one may not have been made
    share = 1 - len(alive) / count
    for mutant in new:
        print(f"\n{mutant.fate}: {mutant.function}\n{mutant.change}")
    for function, change in sorted(killed):
        print(f"\nin accepted.toml, but killed: {function}\n{change}")
    print(
        f"\n{module}: {count} mutants, {share:.1%} killed (min {SHARE:.0%}); "
        f"{len(alive) - len(new)} survivors are accepted, {len(new)} are not\n",
        flush=True,
    )
    return bool(new or killed or share < SHARE)


def _files() -> Iterable[str]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in names if name and (ROOT / name).is_file()]


def _mutmut(folder: Path, *arguments: str, output: int | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, stdout=output, text=True, check=True).stdout


def _described(folder: Path, name: str, code: int | None) -> Mutant:
    diff = _mutmut(folder, "show", name, output=subprocess.PIPE)
    fate = "survived" if code == SURVIVED else f"neither killed nor survived (exit code {code})"
    return Mutant(function_of(name), change_of(diff), fate)


def change_of(diff: str) -> str:
    """The changed lines of a unified diff, as `Mutant.change` has them."""
    changed = [line for line in diff.splitlines() if line.startswith(("-", "+")) and line[:4] not in ("--- ", "+++ ")]
    return "\n".join(f"{line[0]} {line[1:].strip()}" for line in changed)


def no_test_can_see(change: str) -> bool:
    """Whether a change is that of a `strict=` or a `device=` at a call's end, and that alone."""
    gone, _, come = change.partition("\n+ ")
    return UNSEEN.search(gone) is not None and UNSEEN.sub(")", gone[2:]) == UNSEEN.sub(")", come)


def function_of(mutant: str) -> str:
    """The function in mutmut's name of a mutant: module.x_function__mutmut_1 or module.xǁClassǁmethod__mutmut_1."""
    module, _, name = mutant.partition("__mutmut_")[0].removeprefix("vismem.").rpartition(".")
    return f"{module}.{name.removeprefix('x_').removeprefix('xǁ').replace('ǁ', '.')}"


def dotted(module: str) -> str:
    """A module's name within the package, from its path."""
    return module.removesuffix(".py").replace("/", ".").removeprefix("vismem.")


if __name__ == "__main__":
    sys.exit(main())

"""Running a step: what appears, what stays, what a kill leaves; and the pipeline file against the list of steps."""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from vismem import launch, steps
from vismem.config import Config
from vismem.config.section import is_rare
from vismem.errors import UserError
from vismem.locks import lock_file
from vismem.steps import STEPS, Step, run_step

ROOT = Path(__file__).parents[2]
# no change in what a step computes
SHARED = ("disk", "errors", "files", "locks", "progress", "provenance", "ranks", "records", "shipped", "steps")
CONTRACT = ("vismem/__init__.py", "vismem/config/*.py", *(f"vismem/{name}.py" for name in SHARED))

# --- steps for these tests, loaded by name as the real ones are -------------------------------------------------------


def first(config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    (out / "file.txt").write_text(str(config.seed))
    return "made a file"


def failing(config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    (out / "half.txt").write_text("half")
    raise UserError("no luck")


def killed(config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    (out / "checkpoint").write_text((inputs["first"] / "file.txt").read_text())
    os.kill(os.getpid(), signal.SIGKILL)
    return "never"


def resuming(config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    return f"resumed from {(out / 'checkpoint').read_text()}"


@pytest.fixture
def tiny_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("failing", "killed", "resuming")
    made = [Step("first", f"{__name__}:first", (), ())]
    made += [Step(name, f"{__name__}:{name}", ("first",), ("seed",)) for name in names]
    monkeypatch.setattr(steps, "BY_NAME", {step.name: step for step in made})


def replace(name: str, function: str) -> None:
    steps.BY_NAME[name] = Step(name, f"{__name__}:{function}", ("first",), ())


def tree(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny_steps")
def test_a_step_s_output_appears_whole_and_replaces_the_old_one_whole(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "stale.txt").write_text("old")
    assert run_step("first", Config(seed=5), tmp_path) == "made a file"
    assert tree(tmp_path) == {"first/file.txt": "5"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first"]


@pytest.mark.usefixtures("tiny_steps")
def test_a_failing_step_keeps_its_old_output(tmp_path: Path) -> None:
    run_step("first", Config(), tmp_path)
    (tmp_path / "failing").mkdir()
    (tmp_path / "failing" / "good.txt").write_text("good")
    with pytest.raises(UserError, match="no luck"):
        run_step("failing", Config(), tmp_path)
    assert tree(tmp_path / "failing") == {"good.txt": "good"}


@pytest.mark.usefixtures("tiny_steps")
def test_an_output_that_cannot_take_its_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_step("first", Config(seed=4), tmp_path)
    rename = Path.rename

    def fails(path: Path, target: Path) -> Path:
        if path.name == "first.partial":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="Input/output"):
        run_step("first", Config(seed=5), tmp_path)
    assert tree(tmp_path / "first") == {"file.txt": "4"}


@pytest.mark.usefixtures("tiny_steps")
def test_an_old_output_whose_files_are_open_on_nfs_is_in_nobody_s_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # .nfs files stay
    for seed in range(4):
        run_step("first", Config(seed=seed), tmp_path)
        assert tree(tmp_path / "first") == {"file.txt": str(seed)}


@pytest.mark.usefixtures("tiny_steps")
def test_a_disk_without_room_for_the_note_leaves_a_checkpoint_and_its_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_step("first", Config(), tmp_path)
    with pytest.raises(UserError, match="no luck"):
        run_step("failing", Config(), tmp_path)
    before = tree(tmp_path / "failing.partial"), (tmp_path / "failing.partial.id").read_text()
    monkeypatch.setattr("vismem.steps.write_text", lambda *_: 1 / 0)
    with pytest.raises(UserError, match="no luck"):
        run_step("failing", Config(), tmp_path)
    assert (tree(tmp_path / "failing.partial"), (tmp_path / "failing.partial.id").read_text()) == before


@pytest.mark.usefixtures("tiny_steps")
def test_a_killed_step_leaves_no_output_and_the_next_run_finds_its_checkpoint(tmp_path: Path) -> None:
    run_step("first", Config(seed=9), tmp_path)
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_steps as t; from pathlib import Path\n"
        "t.steps.BY_NAME = {'killed': t.Step('killed', 'test_steps:killed', ('first',), ())}\n"
        "t.run_step('killed', t.Config(), Path(sys.argv[2]))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    assert tree(tmp_path / "killed.partial") == {"checkpoint": "9"}
    replace("killed", "resuming")
    assert run_step("killed", Config(), tmp_path) == "resumed from 9"
    assert tree(tmp_path) == {"first/file.txt": "9", "killed/checkpoint": "9"}


@pytest.mark.usefixtures("tiny_steps")
def test_a_checkpoint_made_from_other_inputs_or_with_other_parameters_is_thrown_away(tmp_path: Path) -> None:
    checkpoint = tmp_path / "failing.partial" / "checkpoint"
    for of_first, own, kept in ((9, 2, False), (9, 2, True), (1, 2, False), (1, 3, False)):
        run_step("first", Config(seed=of_first), tmp_path)
        with pytest.raises(UserError, match="no luck"):
            run_step("failing", Config(seed=own), tmp_path)
        assert checkpoint.exists() == kept, (of_first, own)
        checkpoint.touch()


@pytest.mark.usefixtures("tiny_steps")
def test_an_output_that_another_process_makes_is_left_to_it(tmp_path: Path) -> None:
    said = rf"first\.partial is in use by process {os.getpid()} since"
    with lock_file(tmp_path / "first.lock", "first"), pytest.raises(UserError, match=said):
        run_step("first", Config(), tmp_path)
    assert run_step("first", Config(), tmp_path) == "made a file"
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


@pytest.mark.usefixtures("tiny_steps")
def test_a_step_whose_input_is_missing_names_the_step_to_run_and_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs the output of 'first'.*run `vismem first`"):
        run_step("failing", Config(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("tiny_steps")
def test_inputs_may_lie_elsewhere(tmp_path: Path) -> None:
    run_step("first", Config(seed=4), tmp_path / "there")
    replace("failing", "copying")
    inputs = {"first": tmp_path / "there" / "first"}
    assert run_step("failing", Config(), tmp_path / "here", inputs) == "copied 4"


def copying(config: Config, inputs: Mapping[str, Path], out: Path) -> str:
    return f"copied {(inputs['first'] / 'file.txt').read_text()}"


# --- the list of steps and dvc.yaml -----------------------------------------------------------------------------------


def pipeline() -> dict[str, Any]:
    stages: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    return stages


def test_every_step_reads_only_steps_before_it_and_sections_that_exist() -> None:
    sections = set(Config().model_dump(by_alias=True))
    for index, step in enumerate(STEPS):
        assert set(step.inputs) <= {earlier.name for earlier in STEPS[:index]}
        assert set(step.sections) <= sections


def test_dvc_yaml_has_one_stage_a_step_in_order_with_its_inputs_and_sections() -> None:
    stages = pipeline()
    assert list(stages) == [step.name for step in STEPS]
    for step in STEPS:
        stage = stages[step.name]
        assert stage["cmd"] == f"${{vismem}} {step.name}"
        assert [dep for dep in stage["deps"] if dep.startswith("artifacts/")] == [f"artifacts/{n}" for n in step.inputs]
        assert stage["params"] == list(step.sections)
        uncached = {"cache": False} if step.name == "base" else {}  # links to weights that are elsewhere
        assert stage["outs"] == [{f"artifacts/{step.name}": {"persist": True, **uncached}}]


def test_a_stage_depends_on_the_defaults_that_params_yaml_leaves_out() -> None:
    for step in STEPS:
        for section in step.sections:
            config = getattr(Config(), section if section in Config.model_fields else f"{section}_")
            if section != "seed" and any(is_rare(field) for field in type(config).model_fields.values()):
                assert type(config).__module__.replace(".", "/") + ".py" in pipeline()[step.name]["deps"], section


def test_dvc_yaml_names_code_that_exists() -> None:
    named = {dep for stage in pipeline().values() for dep in stage["deps"] if not dep.startswith("artifacts/")}
    assert [dep for dep in sorted(named) if not (ROOT / dep).exists()] == []


def test_the_page_of_dvc_plots_shows_pictures_and_loads_nothing(tmp_path: Path) -> None:
    from dvc.config import Config as DvcConfig
    from dvc_render import ImageRenderer, render_html

    plots = yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"]
    assert {Path(plot).suffix for plot in plots} == {".png"}, "DVC draws a table with scripts from the network"
    folder = ROOT / ".dvc"
    template = folder / DvcConfig(str(folder), validate=False).load_one("repo")["plots"]["html_template"]
    images = [ImageRenderer([{"rev": "workspace", "src": f"static/{Path(plot).name}"}], plot) for plot in plots]
    page = Path(render_html(images, tmp_path / "index.html", html_template=template)).read_text()
    assert sorted(re.findall(r'src="([^"]+)"', page)) == sorted(f"static/{Path(plot).name}" for plot in plots)
    assert "http" not in page
    assert "{" not in re.sub(r"<style>.*</style>", "", page, flags=re.DOTALL), "every placeholder is filled"


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_a_stage_depends_on_all_the_code_that_its_step_imports(step: Step) -> None:
    module = step.target.split(":")[0].replace(".", "/") + ".py"
    named = [dep for dep in pipeline()[step.name]["deps"] if dep.startswith("vismem")]
    patterns = [dep if dep.endswith(".py") else f"{dep}/*" for dep in named]
    used = imported(module) - set(CONTRACT)
    missing = sorted(path for path in used if not any(fnmatch(path, pattern) for pattern in patterns))
    assert missing == [], f"{step.name} imports these, and dvc.yaml's deps do not cover them"


def imported(path: str) -> set[str]:
    """The module and all modules of vismem that it imports, at the top or in functions, and theirs in turn.

    Not what is imported for type checkers alone.
    """
    seen: set[str] = set()
    waiting = [path]
    while waiting:
        here = waiting.pop()
        if here in seen or any(fnmatch(here, pattern) for pattern in CONTRACT):
            continue
        seen.add(here)
        tree = ast.parse((ROOT / here).read_text())
        tree.body = [node for node in tree.body if not isinstance(node, ast.If)]
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vismem"):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.startswith("vismem")]
            for name in names:
                file = ROOT / (name.replace(".", "/") + ".py")
                package = ROOT / name.replace(".", "/") / "__init__.py"
                waiting += [found.relative_to(ROOT).as_posix() for found in (file, package) if found.is_file()]
    return seen


def test_what_a_killed_run_left_is_no_part_of_an_output_that_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, config: Config, place: Path, *_: object) -> str:
        (place / name).mkdir()
        (place / name / "made").touch()
        return "line"

    monkeypatch.setattr(launch, "_run", run)
    inputs = {name: tmp_path / name for name in ("base", "validate")}
    for folder in (*inputs.values(), tmp_path / "stage1.partial"):
        folder.mkdir()
        (folder / "left").touch()
    assert launch.launch_step("stage1", Config(), tmp_path, inputs, work=tmp_path / "work") == "line"
    assert [file.name for file in (tmp_path / "stage1").iterdir()] == ["made"]

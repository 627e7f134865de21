"""The compiled pipeline: as committed, cached only where inputs decide the output, secrets only where used."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import components

sys.path.insert(0, str(Path(__file__).parents[2]))  # for `components` and `pipelines`

from pipelines import run_local
from vismem.config import Config
from vismem.steps import STEPS

ROOT = Path(__file__).parents[2]
COMPILED, COMPILED_SHARED = ROOT / "pipelines" / "vismem.yaml", ROOT / "pipelines" / "vismem-shared.yaml"
SPEC, PLATFORM = yaml.safe_load_all(COMPILED.read_text())
INPUTS = SPEC["root"]["inputDefinitions"]["parameters"]
NEVER_CACHED = {"configure", "preflight", "register", "promote", "deploy", "keep", "summary"}


def tasks() -> dict[str, dict[str, Any]]:
    """All tasks that run something, by name, whatever group they are in."""
    groups = [SPEC["root"], *SPEC["components"].values()]
    found = {name: task for group in groups for name, task in group.get("dag", {}).get("tasks", {}).items()}
    return {n: t for n, t in found.items() if "executorLabel" in SPEC["components"][t["componentRef"]["name"]]}


def kubernetes(name: str) -> dict[str, Any]:
    return PLATFORM["platforms"]["kubernetes"]["deploymentSpec"]["executors"].get(f"exec-{name}", {})


@pytest.mark.parametrize(("source", "file"), [("pipeline.py", COMPILED), ("pipeline_shared.py", COMPILED_SHARED)])
@pytest.mark.parametrize("folder", [ROOT, ROOT / "pipelines"], ids=["from the root", "from its folder"])
def test_a_committed_file_is_what_kfp_compiles_from_its_source(
    source: str, file: Path, folder: Path, tmp_path: Path
) -> None:
    kfp, py = Path(sys.executable).with_name("kfp"), (ROOT / "pipelines" / source).relative_to(folder)
    command = [kfp, "dsl", "compile", "--py", py, "--output", tmp_path / "pipeline.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pipeline.yaml").read_bytes() == file.read_bytes(), f"compile it as {source} says"


@pytest.mark.parametrize("file", [COMPILED, COMPILED_SHARED], ids=lambda file: file.name)
def test_kfp_loads_a_committed_file(file: Path) -> None:
    loaded = components.load_component_from_file(str(file))
    assert loaded.pipeline_spec.pipeline_info.name == "vismem"
    assert set(loaded.component_spec.inputs) == set(INPUTS)


def test_the_run_s_parameters_are_a_profile_and_overrides_and_no_section() -> None:
    sections = {field.alias or name for name, field in Config.model_fields.items()}
    assert set(INPUTS) & sections == set()
    assert (INPUTS["profile"]["defaultValue"], INPUTS["overrides"]["defaultValue"]) == ("", {})


def test_every_parameter_is_described_and_says_its_group() -> None:
    for name, port in INPUTS.items():
        assert port.get("description", "").startswith(("Run: ", "Cluster: ")), name


def test_every_step_is_a_task() -> None:
    others = {"configure", "preflight", "keep", "summary"}
    assert set(tasks()) == {step.name for step in STEPS} | others


def test_only_what_the_same_inputs_make_again_is_cached() -> None:
    cached = {name for name, task in tasks().items() if task["cachingOptions"].get("enableCache", False)}
    assert cached == set(tasks()) - NEVER_CACHED


def test_a_cached_task_depends_on_no_run() -> None:
    """Nothing that names a run may reach a cached task, or it would never be found again."""
    cached = [task for task in tasks().values() if task["cachingOptions"].get("enableCache", False)]
    assert "pipeline_job" not in json.dumps(cached)
    assert "pipeline_job" in json.dumps(tasks()["register"])


def test_every_parameter_that_a_task_asks_its_group_for_is_one_that_the_group_has() -> None:
    """A cluster resolves them one group at a time; what a group was not handed fails the run there."""
    groups = {"root": SPEC["root"], **SPEC["components"]}
    for where, group in groups.items():
        has = set(group.get("inputDefinitions", {}).get("parameters", {}))
        for name, task in group.get("dag", {}).get("tasks", {}).items():
            inputs = task.get("inputs", {}).get("parameters", {}).values()
            asked = {port["componentInputParameter"] for port in inputs if "componentInputParameter" in port}
            if name in tasks():
                asked |= set(re.findall(r'"componentInputParameter": "([^"]+)"', json.dumps(kubernetes(name))))
            assert asked <= has, f"{name} in {where}"


def test_the_summary_runs_whatever_happened_and_only_what_is_promoted_is_deployed() -> None:
    end = SPEC["root"]["dag"]["tasks"]["summary"]
    assert end["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}
    conditions = [
        task["triggerPolicy"]["condition"]
        for component in SPEC["components"].values()
        for task in component.get("dag", {}).get("tasks", {}).values()
        if "condition" in task.get("triggerPolicy", {})
    ]
    promoted = "inputs.parameter_values['pipelinechannel--promote-Output'] == 'promoted'"
    assert sorted(conditions) == [f"!({promoted})", promoted]


def test_containers_without_an_engine_are_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nobody")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///unused")
    assert run_local.main(["--image", "vismem-train:latest", "--folder", str(tmp_path / "runs")]) == 1
    assert "no container of vismem-train:latest" in capsys.readouterr().err
    assert list((tmp_path / "runs").iterdir()) == []

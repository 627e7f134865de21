"""The components: one per step, thin, light to import, each with its README."""

import ast
import sys
from pathlib import Path

import pytest
from kfp import dsl
from kfp.dsl.executor import Executor

sys.path.insert(0, str(Path(__file__).parents[2]))  # for `components` and `pipelines`

from components.readme import NAMES, render
from pipelines.pipeline import load_components
from vismem.config import Config
from vismem.kubeflow.parameters import TASKS
from vismem.steps import STEPS

ROOT = Path(__file__).parents[2]
COMPONENTS = vars(load_components())
LONGEST = 6  # lines of a body without imports


def function(name: str) -> ast.FunctionDef:
    tree = ast.parse((ROOT / "components" / name / "component.py").read_text())
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef))


def test_every_step_has_a_component_and_the_others_surround_them() -> None:
    assert set(COMPONENTS) == {step.name for step in STEPS} | {"configure", "preflight", "keep", "summary"}


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_a_component_takes_the_outputs_of_the_steps_that_its_step_reads_and_makes_one_of_its_name(step) -> None:
    spec = COMPONENTS[step.name].component_spec
    artifacts = [name for name, port in spec.inputs.items() if str(port.type).startswith("system.")]
    assert sorted(artifacts) == sorted(step.inputs)
    assert step.name in spec.outputs
    assert "parameters" in spec.inputs


def test_configure_returns_what_the_library_does_in_the_same_order() -> None:
    returned = ast.literal_eval(function("configure").returns.args[1].generators[0].iter)
    assert returned == TASKS
    assert set(COMPONENTS["configure"].component_spec.outputs) == {*returned, "resolved"}


def test_no_section_of_the_parameters_is_named_in_components_or_pipelines() -> None:
    """So that a new section costs no edit there. Sections that are called like a task stand for the task."""
    sections = {field.alias or name for name, field in Config.model_fields.items()} - set(TASKS)
    assert {"seed", "memory", "gate"} <= sections
    for file in (*(ROOT / "components").rglob("*.py"), *(ROOT / "pipelines").glob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        named = {node.arg for node in nodes if isinstance(node, ast.keyword)}  # an argument of a task
        named |= {node.value for node in nodes if isinstance(node, ast.Constant)}  # a key, an output
        assert not named & sections, file
    for component in COMPONENTS.values():
        assert not set(component.component_spec.inputs or {}) & sections


@pytest.mark.parametrize("name", NAMES)
def test_a_component_s_readme_is_current(name: str) -> None:
    readme = (ROOT / "components" / name / "README.md").read_text()
    assert readme == render(name), "run `python -m components.readme`"


@pytest.mark.parametrize("name", NAMES)
def test_a_component_only_translates_and_imports_nothing_but_kfp_at_the_top(name: str) -> None:
    module = ast.parse((ROOT / "components" / name / "component.py").read_text())
    imports = [node for node in module.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {node.module for node in imports if isinstance(node, ast.ImportFrom)} <= {"kfp", "typing"}
    statements = [node for node in function(name).body[1:] if not isinstance(node, ast.Import | ast.ImportFrom)]
    lines = sum((node.end_lineno or 0) - node.lineno + 1 for node in statements)
    assert lines <= LONGEST


@pytest.mark.parametrize("name", NAMES)
def test_a_component_runs_on_the_library_s_image_and_installs_nothing(name: str) -> None:
    container = COMPONENTS[name].component_spec.implementation.container
    assert container.image == "vismem-train"
    assert "pip install" not in " ".join(container.command)


def test_reports_are_of_the_kinds_that_the_page_of_a_run_shows() -> None:
    shown = {
        ("validate", "report"): dsl.HTML,
        ("evaluate", "report"): dsl.HTML,
        ("evaluate", "metrics"): dsl.Metrics,
        ("evaluate", "yes_no"): dsl.ClassificationMetrics,
        ("export", "card"): dsl.Markdown,
        ("register", "verdict"): dsl.Markdown,
        ("promote", "note"): dsl.Markdown,
        ("summary", "summary"): dsl.Markdown,
        ("preflight", "report"): dsl.Markdown,
    }
    for (name, port), kind in shown.items():
        assert COMPONENTS[name].component_spec.outputs[port].type == f"{kind.schema_title}@{kind.schema_version}"


@pytest.mark.parametrize(
    ("state", "names", "head"),
    [
        ("COMPLETE", ("pipelineJobResourceName", "pipelineTaskName"), "# The run succeeded"),
        ("FAILED", ("pipelineJobResourceName", "pipelineTaskName"), "# The run failed"),
        ("SUCCEEDED", ("pipeline_job_resource_name", "pipeline_task_name"), "# The run succeeded"),
    ],
    ids=["driver, complete", "driver, failed", "local runner"],
)
def test_the_exit_task_reads_the_status_as_kubeflow_s_driver_and_the_local_runner_write_it(
    tmp_path: Path, state: str, names: tuple[str, str], head: str
) -> None:
    status = {"state": state, **dict.fromkeys(names, "exit-handler-1"), "error": {}}  # the driver fills in no error
    page = {"name": "summary", "type": {"schemaTitle": "system.Markdown"}, "uri": str(tmp_path / "page")}
    task = {
        "inputs": {"parameterValues": {"status": status}},
        "outputs": {"artifacts": {"summary": {"artifacts": [page]}}, "outputFile": str(tmp_path / "output.json")},
    }
    Executor(executor_input=task, function_to_execute=COMPONENTS["summary"].python_func).execute()
    assert (tmp_path / "page").read_text().splitlines()[0] == head

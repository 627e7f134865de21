"""DVC's own commands for experiments on this project's dvc.yaml and params.yaml, with steps that take no time."""

import csv
import io
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from dvc_project import DvcProject

from vismem.config import load_config

ROOT = Path(__file__).parents[2]
STEP = """
import json, sys
from pathlib import Path
import yaml
from PIL import Image
out, params = Path("artifacts") / sys.argv[1], yaml.safe_load(Path("params.yaml").read_text())
(out / "plots").mkdir(parents=True, exist_ok=True)
steps, train = params["stage1"]["steps"], params["prepare"]["sources"][0]["train"]
(out / "made").write_text(str({"prepare": train, "validate": train}.get(sys.argv[1], steps)))
if sys.argv[1] == "evaluate":
    (out / "scores.json").write_text(json.dumps({"vismem": 60 + steps}))
    for name in ("scores", "tasks", "invocation", "training"):
        Image.new("RGB", (8, 8), (steps, 0, 0)).save(out / "plots" / f"{name}.png")
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> DvcProject:
    """A repository with the pipeline as it is, but for what its stages run, after a first run."""
    folder = tmp_path_factory.mktemp("experiments")
    root = folder / "project"
    text = (ROOT / "dvc.yaml").read_text()
    (command,) = (known["vismem"] for known in yaml.safe_load(text)["vars"])
    deps = {dep for stage in yaml.safe_load(text)["stages"].values() for dep in stage["deps"]}
    names = (*sorted(dep for dep in deps if not dep.startswith("artifacts/") and dep != "data"), ".dvc/config")
    for name in (*names, ".dvcignore", ".gitignore", "params.yaml", "data/README.md", "vismem/pages"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if not (root / name).exists():
            copy(ROOT / name, root / name)
    (root / "dvc.yaml").write_text(text.replace(command, f"{sys.executable} step.py"))
    (root / "step.py").write_text(STEP)
    project = DvcProject(root, environment={"DVC_SITE_CACHE_DIR": str(folder / "site"), "DVC_NO_ANALYTICS": "1"})
    project.run("git", "init", "--quiet", "--initial-branch=main")
    project.run("dvc", "repro", "--quiet")
    project.run("git", "add", "--all")
    project.run("git", "commit", "--quiet", "--message=A run")
    return project


def test_an_experiment_changes_its_parameter_and_is_compared_with_the_run_before(project: DvcProject) -> None:
    before = load_config(project.root / "params.yaml")
    said = project.run("dvc", "exp", "run", "evaluate", "--name=longer", "-S", "stage1.steps=30")
    ran = [line.split("'")[1] for line in said.splitlines() if line.startswith("Running stage")]
    assert ran == ["stage1", "stage2", "evaluate"], "what depends on the parameter, and no release"
    changed = before.stage1.model_copy(update={"steps": 30})
    assert load_config(project.root / "params.yaml") == before.model_copy(update={"stage1": changed})

    (row,) = table(project.run("dvc", "params", "diff", "--md"))
    assert (row["Param"], row["HEAD"], row["workspace"]) == ("stage1.steps", str(before.stage1.steps), "30")
    (row,) = table(project.run("dvc", "metrics", "diff", "--md"))
    assert (row["Metric"], row["workspace"]) == ("vismem", "90")
    shown = list(csv.DictReader(io.StringIO(project.run("dvc", "exp", "show", "--csv", "--only-changed"))))
    assert [(row["Experiment"], row["vismem"], row["stage1.steps"]) for row in shown] == [
        ("", "90", "30"),
        ("", str(60 + before.stage1.steps), str(before.stage1.steps)),
        ("longer", "90", "30"),
    ]
    project.run("dvc", "plots", "diff", "HEAD")
    pictures = {path.name for path in (project.root / "dvc_plots" / "static").iterdir()}
    names = ("scores", "tasks", "invocation", "training")
    assert pictures == {f"{rev}_artifacts_evaluate_plots_{n}.png" for rev in ("HEAD", "workspace") for n in names}
    assert "longer" in project.run("dvc", "exp", "list")

    project.run("git", "checkout", "--quiet", "--", "params.yaml", "dvc.lock")
    project.run("dvc", "checkout", "--quiet")
    assert load_config(project.root / "params.yaml") == before
    said = project.run("dvc", "exp", "run", "evaluate", "-S", "prepare.sources.0.train=7")
    assert "Running stage 'prepare'" in said
    assert load_config(project.root / "params.yaml").prepare.sources[0].train == 7  # type: ignore[union-attr]


def table(markdown: str) -> list[dict[str, str]]:
    """The rows of a Markdown table."""
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.strip().splitlines()]
    return [dict(zip(head, line, strict=True)) for line in lines]

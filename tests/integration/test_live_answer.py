"""The child that keeps the live run answers with the run's id alone, whatever MLflow prints."""

import json
import subprocess
import sys
from pathlib import Path

from project import Project

LOUD = """
import runpy, sys
from mlflow import MlflowClient
original = MlflowClient.set_terminated
def loud(*given, **named):
    print("View run prepare at: http://127.0.0.1:5000", flush=True)
    return original(*given, **named)
MlflowClient.set_terminated = loud
sys.argv = sys.argv[1:]
runpy.run_module("vismem.registry.live_child", run_name="__main__")
"""


def test_what_mlflow_prints_is_no_answer(project: Project, tmp_path: Path) -> None:
    config = json.dumps(project.config.model_dump(mode="json", by_alias=True))
    (project.artifacts / "stage1.partial").mkdir(parents=True)
    (project.artifacts / "stage1.partial" / "stage1.csv").write_text("step,reward,kl\n0,0.25,\n1,0.5,0.01\n")
    lines = [config, "begin stage1 0", "done stage1", "begin register 0", "end FINISHED"]
    command = [sys.executable, "-c", LOUD, "live_child", str(project.artifacts)]
    done = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True, timeout=120)
    assert "View run prepare" in done.stderr
    (answer,) = done.stdout.splitlines()
    assert len(answer) == 32
    assert int(answer, 16)

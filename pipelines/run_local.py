"""The pipeline on this machine: the same tasks and parameters as on a cluster, one process after the other.

`python pipelines/run_local.py --profile smoke`. Outputs lie in runs/pipeline/; tasks whose parameters, inputs and code
are those of an earlier run are kept. The exit status is 1 where a task failed; its log ends with the reason.
"""

import argparse
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from kfp import local

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # pipelines/ lies there

from pipelines.containers import container_runner
from pipelines.pipeline import ROOT, make_pipeline
from vismem.cli.options import setting
from vismem.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pipeline as the command line says; return the exit status."""
    parser = argparse.ArgumentParser(description="Run the VisMem pipeline on this machine.")
    parser.add_argument("--profile", default="", help="a profile of deploy/profiles/; default: none")
    many: dict[str, Any] = {"type": setting, "action": "append", "default": []}
    parser.add_argument("--set", **many, metavar="KEY=VALUE", help="one parameter, such as stage1.steps=30")
    parser.add_argument("--argument", **many, metavar="NAME=VALUE", help="another parameter of the pipeline")
    folder = ROOT / "runs" / "pipeline"
    parser.add_argument("--folder", type=Path, default=folder, help="where everything goes (default: runs/pipeline)")
    parser.add_argument("--no-cache", action="store_true", help="run every task, whatever earlier runs made")
    parser.add_argument("--image", help="run each task in a container of it (vismem-train:latest), by docker or podman")
    given = parser.parse_args(argv)
    arguments = {"profile": given.profile, "overrides": dict(given.set), **dict(given.argument)}
    if unknown := set(arguments) - set(make_pipeline("here").component_spec.inputs):
        parser.error(f"the pipeline has no parameter {', '.join(sorted(unknown))}; --set is for those of params.yaml")
    try:
        return run(arguments, given.folder.absolute(), cache=not given.no_cache, image=given.image)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1


def run(arguments: dict[str, Any], folder: Path, *, cache: bool = True, image: str | None = None) -> int:
    """Run the pipeline with these parameters; returns 0, or 1 where a task failed. Prints the summary and the folder.

    Without MLFLOW_TRACKING_URI in the environment, registered models go to a store in `folder`. With an `image` each
    task runs in a container of it, as the owner of `folder`, the only one that it sees. UserError where that cannot be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="kfp")  # of an image's name
    warnings.filterwarnings("ignore", message=".*have no effect in the current local runner")
    local.init(
        container_runner(image, folder) if image else local.SubprocessRunner(use_venv=False),
        pipeline_root=str(folder),
        workspace_root=str(folder / "workspace"),
        enable_caching=cache,
    )
    earlier, status = set(folder.glob("vismem-*")), 0
    try:
        make_pipeline(fixed_image=image or "here", work=str(folder / "work"))(**arguments)
    except RuntimeError as error:  # a task failed; its log stands above
        logging.error(error)
        status = 1
    except KeyboardInterrupt:
        print("stopped; run it again to resume", file=sys.stderr)
        return 130
    made = sorted(set(folder.glob("vismem-*")) - earlier)
    if not made:
        print("no task was run", file=sys.stderr)
        return 1
    summary = made[-1] / "summary" / "summary"
    print(summary.read_text() if summary.is_file() else "The run left no summary.")
    print(f"Everything that was made lies in {made[-1]}")
    return status


def _end_task_and_stop(*_: object) -> None:
    """On SIGTERM: end the task's process too."""
    for process in psutil.Process().children(recursive=True):
        process.terminate()
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end_task_and_stop)
    sys.exit(main())

"""The commands that run the steps: all of them, one of them, and what comes before and after."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vismem.cli.options import enter, load
from vismem.cli.parser import Commands, sentence
from vismem.config import PARAMS_FILE
from vismem.errors import UserError, nearest
from vismem.launch import LaunchConfig, launch_step
from vismem.ranks import is_main_rank
from vismem.steps import BASELINES, BY_NAME, SHARED, STEPS, Step
from vismem.workspace import RUNS, workspace_name

EXAMPLES = """
examples:
  vismem repro                          what has changed since the last run, and what depends on it
  vismem repro --force                  all steps again
  vismem repro evaluate                 the steps up to this one
  vismem repro --profile smoke --set stage1.steps=4
  vismem repro --dry                    any other argument of `dvc repro`, see `dvc repro --help`
"""


def add_commands(commands: Commands) -> None:
    """The whole pipeline, and what people do before and after it."""
    command = commands.group("Run")
    about = "start with your own questions: check and split them, and write a profile for them"
    add = command("init", _run_init, about, options=False)
    add("name", metavar="NAME", help="of the new profile, and of its folder in data/")
    about = "JSON lines with image (a path beside the file), prompt, answer; may be repeated"
    add("--data", type=Path, action="append", required=True, metavar="FILE", help=about)
    add("--test", type=Path, metavar="FILE", help="more such lines, which are the test split as they are")
    add("--validation", type=Path, metavar="FILE", help="the same for the validation split")
    add("--images", type=Path, metavar="FOLDER", help="where images' paths start; default: each file's folder")
    add("--base", metavar="HUB_OR_PATH", help="the model that goes in; default: base.model of the parameters")
    add("--seed", type=int, metavar="N", help="of the split and of the run; default: that of the parameters")
    add("--force", action="store_true", help="replace what an earlier `vismem init` wrote under this name")
    add("--params", type=Path, default=PARAMS_FILE, metavar="FILE", help="parameter file (default: %(default)s)")

    about = "run the whole pipeline with DVC; more arguments go to `dvc repro`"
    add = command("repro", _run_repro, about, after=EXAMPLES)
    add("--artifacts", help=argparse.SUPPRESS)  # refused by name: DVC would get it
    command("summary", _run_summary, "scores, verdict and an example answer of the last run", outputs=True)
    about = "check that a run can complete: secrets, buckets, registry, GPUs"
    command("preflight", _run_preflight, about, outputs=True)
    add = command("plan", _run_plan, "say which steps fit which GPUs, from the base's configuration alone")
    add("step", nargs="*", metavar="STEP", help="default: stage1, stage2, evaluate and its arms' baselines")
    add(
        "--gpus",
        required=True,
        metavar="COUNTxCARD",
        help="such as 8xH100, or 8x80; each holds all of a step or, with base.tensor_parallel, its share",
    )
    add("--image", default="1024x768", metavar="WxH", help="pixels of the questions' images (default: %(default)s)")
    add("--images", type=int, default=1, metavar="N", help="images of a question (default: %(default)s)")
    about = "of the train split, which say how many steps there are (default: those of your JSON lines, else 1,000)"
    add("--questions", type=int, default=0, metavar="N", help=about)
    about = "start a run of the pipeline on a cluster: image, namespace, account and sizes from profile and overlay"
    add = command("submit", _run_submit, about)
    add("given", nargs="*", metavar="NAME=VALUE", help="parameters of the pipeline; for those of params.yaml: --set")
    add("--endpoint", default="", metavar="URL", help="of Kubeflow Pipelines (default: KF_PIPELINES_ENDPOINT)")
    add("--namespace", default="", help="with several users' Kubeflow, the run's (default: the overlay's)")
    overlay = Path("deploy/kubernetes/overlays/standalone")
    about = "what was installed (default: %(default)s)"
    add("--overlay", type=Path, default=overlay, metavar="FOLDER", help=about)
    add("--dry-run", action="store_true", help="print what would be run, and do not run it")


def add_steps(commands: Commands) -> None:
    """One command per step, and per baseline."""
    groups = {
        "Steps of the pipeline, in their order; `repro` runs them": STEPS,
        "Baselines, with which the method is compared": BASELINES,
    }
    for title, steps in groups.items():
        command = commands.group(title)
        for step in steps:
            add = command(step.name, _run_step, step.about, outputs=True, description=describe(step))
            about = "where another step's output is, if not in the artifacts' folder; may be repeated"
            add("--input", type=_named_folder, action="append", default=[], metavar="STEP=FOLDER", help=about)
            if step.name == "evaluate":
                _add_suite(add)
            if step.name in SHARED:
                about = "how many of this machine share the step, one per GPU (default: VISMEM_PROCESSES, else 1)"
                default = os.environ.get("VISMEM_PROCESSES", "1")
                add("--processes", type=int, metavar="N", default=default, help=about)


def _add_suite(add: Callable[..., Any]) -> None:
    """What `vismem evaluate` takes for a suite of benchmarks in the test split's place."""
    add("--suite", choices=("paper",), help="ask the paper's benchmarks, no splits needed; writes artifacts/suite")
    add("--data", type=Path, metavar="FOLDER", help="of the suite: VLMEvalKit's .tsv files (default: LMUData)")
    add("--limit", type=int, metavar="N", help="of the suite: questions of each benchmark, drawn at random")
    add("--model", help="of the suite: folder, hub id or models:/NAME@champion; default: artifacts/stage2")
    add("--base", metavar="MODEL", help="of --model: hub id or folder, where it is not as the model says")


def _run_suite(arguments: argparse.Namespace, inputs: dict[str, Path], launch: LaunchConfig) -> str:
    given = {"data": arguments.data and str(arguments.data.absolute()), "limit": arguments.limit}
    arguments.settings += [(f"suite.{name}", value) for name, value in given.items() if value is not None]
    if arguments.model:
        from vismem.hub import fetch
        from vismem.sources import find_added, find_base

        added = find_added(arguments.model)
        place = find_base(added, arguments.base)[1]
        inputs |= {"stage2": added.absolute(), "base": (place if isinstance(place, Path) else fetch(place)).absolute()}
    config, artifacts = enter(arguments)
    if not (trained := inputs.get("stage2", artifacts / "stage2")).is_dir():
        raise UserError(f"no trained model {trained}: name one with --model, or run `vismem repro`")
    return launch_step("suite", config, artifacts, inputs, launch)


def describe(step: Step) -> str:
    """What a step does, reads, writes and depends on, for its help."""
    reads = ", ".join(f"artifacts/{name}" for name in step.inputs) or "what the parameters name"
    also = f" (and {', '.join(step.optional)} where they are)" if step.optional else ""
    kind = "A step of the pipeline" if step in STEPS else "A baseline, no step of the pipeline"
    return (
        f"{sentence(step.about)} {kind}: it reads {reads}{also}, writes artifacts/{step.name}, and depends on these "
        f"sections of the parameters: {', '.join(step.sections)}."
    )


def _run_step(arguments: argparse.Namespace) -> int:
    suite, model = getattr(arguments, "suite", None), getattr(arguments, "model", None)
    if not suite and any(getattr(arguments, name, None) for name in ("data", "limit", "model", "base")):
        arguments.parser.error("--data, --limit, --model and --base go with --suite")
    if getattr(arguments, "base", None) and not model:
        arguments.parser.error("--base goes with --model: without, the base is that of the last run")
    if not model:
        _check_params(arguments.params)
    processes, inputs = getattr(arguments, "processes", 1), dict(arguments.input)
    known = BY_NAME["suite" if suite else arguments.command].reads
    for name in inputs:
        if name not in known:
            arguments.parser.error(f"--input {name}: it reads {', '.join(known) or 'no step'}{nearest(name, known)}")
    launch = LaunchConfig() if processes == 1 else LaunchConfig("torchrun", processes)
    if suite:
        line = _run_suite(arguments, inputs, launch)
    else:
        line = launch_step(arguments.command, *enter(arguments), inputs, launch)
    if is_main_rank():
        line = arguments.caller.shown(line)
        print(line if line.startswith(arguments.command) else f"{arguments.command}: {line}")
    return 0


def _named_folder(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not folder:
        raise argparse.ArgumentTypeError(f"'{text}' is not STEP=FOLDER")
    return name, Path(folder).absolute()


def _check_params(file: Path) -> None:
    """UserError where it is not there: in the wrong folder a command would work with the defaults."""
    if not file.is_file():
        raise UserError(f"no parameter file {file}: run in the project's root, or name one with --params")


def _run_init(arguments: argparse.Namespace) -> None:
    from vismem.init import Request, init

    _check_params(arguments.params)
    names = ("name", "base", "seed", "images", "test", "validation", "force")
    given = {name: getattr(arguments, name) for name in names}
    print(init(arguments.params, Request(data=tuple(arguments.data), **given), arguments.caller))


def _run_repro(arguments: argparse.Namespace) -> int:
    if arguments.artifacts is not None:
        raise UserError("--artifacts does not go with repro: dvc.yaml says where its outputs are")
    from vismem.repro import repro

    settings = dict(arguments.settings)
    with arguments.caller.known():  # the steps name paths as this caller sees them
        status = repro(arguments.params, arguments.profile, arguments.rest, settings)
    if settings:
        folder = arguments.params.resolve().parent / RUNS / workspace_name(arguments.profile, settings)
        place = shlex.quote(arguments.caller.path(folder))
        print(f"repro: with --set this run has a folder of its own; `cd {place}`, and `vismem summary` there")
    return status


def _run_summary(arguments: argparse.Namespace) -> None:
    from vismem.summary import print_summary

    config, artifacts = enter(arguments)
    print_summary(config, artifacts, arguments.caller)


def _run_preflight(arguments: argparse.Namespace) -> None:
    config, artifacts = enter(arguments)
    from vismem.preflight import preflight

    preflight(config, artifacts)


def _run_plan(arguments: argparse.Namespace) -> int:
    config = load(arguments)
    from vismem.kubeflow.cluster import load_cluster
    from vismem.plan import plan
    from vismem.plan.report import as_text, late, refusals

    found = plan(config, arguments.gpus, arguments.image, arguments.step, arguments.images, arguments.questions)
    print(as_text(found))
    notes = late(found, load_cluster(config.cluster).training_hours) if config.cluster else ()
    for refusal in (*refusals(found), *notes):
        print(f"vismem plan: {refusal}", file=sys.stderr)
    return 1 if found.remedies else 0


def _run_submit(arguments: argparse.Namespace) -> int:
    from vismem.submit import Request, submit

    pairs = [text.partition("=") for text in arguments.given]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise UserError(f"'{wrong[0]}' is not NAME=VALUE, such as gpu_count=8")
    if arguments.params != PARAMS_FILE:
        raise UserError("a cluster's run reads no parameter file: give a --profile, and --set for what differs")
    given, settings = {name: value for name, _, value in pairs}, dict(arguments.settings)
    names = ("overlay", "endpoint", "namespace")
    chosen = {name: getattr(arguments, name) for name in names}
    return submit(Request(arguments.profile or "", given=given, settings=settings, **chosen), arguments.dry_run)

"""The command line: `vismem STEP` for each step, and what people do around them. It only translates.

Heavy parts load late. What the person at the keyboard can mend ends as one line on stderr, with status 1
(VISMEM_DEBUG=1 shows where it came from).
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vismem.config import Config, load_config
from vismem.errors import UserError, mask_credentials
from vismem.launch import LaunchConfig, launch_step
from vismem.params_file import render_params
from vismem.ranks import is_main_rank
from vismem.steps import BASELINES, SHARED, STEPS
from vismem.workspace import make_workspace, repro

STACK_PORTS = {"mlflow": 5000, "s3": 8333, "postgres": 5432}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "repro":
        parser.error(f"unknown arguments: {' '.join(rest)}; `vismem {arguments.command} --help` shows the known ones")
    arguments.rest = rest
    try:
        status: int | None = arguments.run(arguments)
    except (UserError, OSError) as error:  # OSError: a missing file, no permission, a full disk
        if os.environ.get("VISMEM_DEBUG"):
            raise
        print(f"vismem {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"vismem {arguments.command}: stopped", file=sys.stderr)
        return 130
    return status or 0


def build_parser() -> argparse.ArgumentParser:
    """The parser; the steps' commands are made from `vismem.steps`."""
    parser = argparse.ArgumentParser(prog="vismem", description="Latent vision memory for vision-language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--params", type=Path, default=Path("params.yaml"), help="parameter file (default: %(default)s)")
    add("--profile", help="a profile of deploy/profiles/; it works in runs/PROFILE/")
    add("--artifacts", type=Path, help="folder of the steps' outputs (default: artifacts)")

    def command(name: str, run: Callable[..., int | None], about: str, options: bool = True) -> Callable[..., Any]:
        made = commands.add_parser(name, parents=[common] if options else [], help=about)
        made.set_defaults(run=run)
        return made.add_argument

    for step in STEPS + BASELINES:
        kind = "baseline, no step of the pipeline" if step in BASELINES else "step"
        reads = ", ".join(step.inputs) or "the sources that the parameters name"
        add = command(step.name, _run_step, f"{kind}: reads {reads}")
        about = "where another step's output is, if not in the artifacts' folder; may be repeated"
        add("--input", type=_named_folder, action="append", default=[], metavar="STEP=FOLDER", help=about)
        if step.name in SHARED:
            about = "how many of this machine share the step, one per GPU (default: VISMEM_PROCESSES, else 1)"
            add("--processes", type=int, metavar="N", default=os.environ.get("VISMEM_PROCESSES", "1"), help=about)
    command("repro", _run_repro, "run the whole pipeline with DVC; more arguments go to it")
    command("summary", _run_summary, "scores, verdict and an example answer of the last run")
    command("preflight", _run_preflight, "check that a run can complete: secrets, buckets, registry, GPUs")

    add = command("infer", _run_infer, "ask the served model about images")
    add("--image", type=Path, action="append", required=True, help="image file; may be repeated")
    add("--prompt", required=True, help="the question")
    add("--stream", action="store_true", help="print the answer while it is decoded")
    add("--no-memory", action="store_true", help="answer without latent memory")
    add("--max-new-tokens", type=int, default=48, help="longest answer in tokens")
    add("--url", help="gRPC host:port; default: this machine at deploy.grpc_port")
    add("--model", help="served model's name; default: the released one, else the challenger")

    add = command("serve", _run_serve, "serve the deployed model with Triton until Ctrl-C")
    add("--repository", type=Path, help="model repository; default: artifacts/deploy/model_repository")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", "--grpc-port", type=int, help="gRPC port; default: deploy.grpc_port, 0: any free one")
    add("--http-port", type=int, help="HTTP port; default: deploy.http_port")
    add("--metrics-port", type=int, help="Prometheus port; default: deploy.metrics_port")

    add = command("models", _run_models, "registered versions: list, show, rollback")
    add("action", choices=("list", "show", "rollback"), nargs="?", default="list")
    add("which", nargs="?", default="champion", help="show: a version's number or alias")

    add = command("ui", _run_ui, "open MLflow on the store and print the model's page")
    add("--port", type=int, help="default: registry.ui_port; 0: any free one")

    add = command("stack", _run_stack, "run PostgreSQL, an S3 server and MLflow on both until Ctrl-C", options=False)
    add("--data", type=Path, default=Path("runs/stack"), help="folder of all that they keep (default: %(default)s)")
    for name, port in STACK_PORTS.items():
        add(f"--{name}-port", type=int, default=port, help="0: any free one (default: %(default)s)")

    add = command("params", _run_params, "print the parameters in force, each explained")
    add("--defaults", action="store_true", help="the defaults, whatever --params and --profile say")
    add("--all", action="store_true", help="also the keys that are seldom changed")
    return parser


def _enter(arguments: argparse.Namespace) -> tuple[Config, Path]:
    """The parameters and the artifacts' folder; with a profile, also change to its workspace."""
    artifacts = arguments.artifacts.absolute() if arguments.artifacts else Path("artifacts")
    if arguments.profile is None:
        return load_config(arguments.params), artifacts
    os.chdir(make_workspace(arguments.params, arguments.profile))
    return load_config(Path("params.yaml")), artifacts


def _run_step(arguments: argparse.Namespace) -> int:
    config, artifacts = _enter(arguments)
    processes = getattr(arguments, "processes", 1)
    launch = LaunchConfig() if processes == 1 else LaunchConfig("torchrun", processes)
    line = launch_step(arguments.command, config, artifacts, dict(arguments.input), launch)
    if is_main_rank():
        print(line if line.startswith(arguments.command) else f"{arguments.command}: {line}")
    return 0


def _named_folder(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not folder:
        raise argparse.ArgumentTypeError(f"'{text}' is not STEP=FOLDER")
    return name, Path(folder).absolute()


def _run_repro(arguments: argparse.Namespace) -> int:
    if arguments.artifacts is not None:
        raise UserError("--artifacts does not go with repro: dvc.yaml says where its outputs are")
    return repro(arguments.params, arguments.profile, arguments.rest)


def _run_summary(arguments: argparse.Namespace) -> None:
    from vismem.summary import print_summary

    here = Path.cwd()
    config, artifacts = _enter(arguments)
    print_summary(config, Path(os.path.relpath(artifacts.absolute(), here)), here, arguments.profile)


def _run_preflight(arguments: argparse.Namespace) -> None:
    config, artifacts = _enter(arguments)
    from vismem.preflight import preflight

    preflight(config, artifacts)


def _run_infer(arguments: argparse.Namespace) -> None:
    images = [image.absolute() for image in arguments.image]
    config, _ = _enter(arguments)
    from vismem.serving.client import main_infer

    main_infer(
        config,
        images,
        arguments.prompt,
        stream=arguments.stream,
        memory=not arguments.no_memory,
        max_new_tokens=arguments.max_new_tokens,
        url=arguments.url,
        model=arguments.model,
    )


def _run_serve(arguments: argparse.Namespace) -> None:
    named = arguments.repository.absolute() if arguments.repository else None
    config, artifacts = _enter(arguments)
    from vismem.serving.server import serve

    serve(
        config,
        named or artifacts / "deploy" / "model_repository",
        host=arguments.host,
        grpc_port=arguments.port,
        http_port=arguments.http_port,
        metrics_port=arguments.metrics_port,
    )


def _run_models(arguments: argparse.Namespace) -> None:
    config, _ = _enter(arguments)
    from vismem.registry import listing
    from vismem.registry.versions import tracking_uri

    if arguments.action == "show":
        print(json.dumps(listing.show(config, arguments.which), indent=2, ensure_ascii=False))
    elif arguments.action == "rollback":
        from vismem.registry.release import rollback

        print(rollback(config))
    else:
        from vismem.summary import print_models

        where = mask_credentials(tracking_uri(config.registry))
        print_models(listing.models(config), config.registry.model_name, where)


def _run_ui(arguments: argparse.Namespace) -> None:
    config, _ = _enter(arguments)
    from vismem.registry.server import serve_ui

    serve_ui(config, config.registry.ui_port if arguments.port is None else arguments.port)


def _run_stack(arguments: argparse.Namespace) -> None:
    from vismem.stack import serve_stack

    serve_stack(arguments.data, {name: getattr(arguments, f"{name}_port") for name in STACK_PORTS})


def _run_params(arguments: argparse.Namespace) -> int:
    config = Config() if arguments.defaults else load_config(arguments.params, arguments.profile)
    print(render_params(config, arguments.all), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

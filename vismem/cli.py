"""The command line: `vismem STEP` for each step, and what people do around them. It only translates.

Heavy parts load late. What the person at the keyboard can mend ends as one line on stderr, with status 1
(VISMEM_DEBUG=1 shows where it came from).
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from vismem.config import Config, load_config, resolve
from vismem.errors import UserError, mask_credentials
from vismem.launch import LaunchConfig, launch_step
from vismem.messages import Caller
from vismem.params_file import render_params
from vismem.parser import Commands, Parser, Version, describe, setting
from vismem.ranks import is_main_rank
from vismem.steps import BASELINES, SHARED, STEPS
from vismem.workspace import RUNS, make_workspace, rebase, workspace_name

PARAMS = Path("params.yaml")
STACK_PORTS = {"mlflow": 5000, "s3": 8333, "postgres": 5432}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status (`vismem.parser.STATUSES`)."""
    parser = build_parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        return 2
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "repro":
        arguments.parser.refuse(rest)
    arguments.rest, arguments.caller = rest, Caller(Path.cwd(), getattr(arguments, "profile", None))
    try:
        status: int | None = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:  # OSError: a missing file, no permission, a full disk
        if os.environ.get("VISMEM_DEBUG"):
            raise
        print(f"vismem {arguments.command}: {arguments.caller.explain(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"vismem {arguments.command}: stopped", file=sys.stderr)
        return 130
    return status or 0


def build_parser() -> Parser:
    """The parser; the steps' commands are made from `vismem.steps`."""
    about = "Latent vision memory for vision-language models: train, evaluate, gate, release and serve it."
    parser = Parser(prog="vismem", description=about)
    parser.add_argument("--version", action=Version, nargs=0, help="print the version")
    common = Parser(add_help=False)
    add = common.add_argument
    add("--params", type=Path, default=PARAMS, metavar="FILE", help="parameter file (default: %(default)s)")
    add("--profile", metavar="NAME", help="a profile of deploy/profiles/; it works in runs/NAME/")
    about_set = "one parameter, as in stage1.steps=30 or prepare.sources.0.train=500; may be repeated"
    add("--set", type=setting, action="append", default=[], metavar="KEY=VALUE", dest="settings", help=about_set)
    add("--artifacts", type=Path, metavar="FOLDER", help="folder of the steps' outputs (default: artifacts)")
    commands = Commands(parser, common)
    _add_steps(commands)
    _add_others(commands)
    parser.overview = commands.overview(about)
    return parser


def _add_steps(commands: Commands) -> None:
    for step in STEPS + BASELINES:
        add = commands.add(step.name, _run_step, step.about, description=describe(step))
        about = "where another step's output is, if not in the artifacts' folder; may be repeated"
        add("--input", type=_named_folder, action="append", default=[], metavar="STEP=FOLDER", help=about)
        if step.name in SHARED:
            about = "how many of this machine share the step, one per GPU (default: VISMEM_PROCESSES, else 1)"
            add("--processes", type=int, metavar="N", default=os.environ.get("VISMEM_PROCESSES", "1"), help=about)


def _add_others(commands: Commands) -> None:
    command = commands.add
    command("repro", _run_repro, "run the whole pipeline with DVC; more arguments go to it")
    command("summary", _run_summary, "scores, verdict and an example answer of the last run")
    command("preflight", _run_preflight, "check that a run can complete: secrets, buckets, registry, GPUs")

    command("try", _run_try, "answer 20 example images with and without memory", options=False)
    add = command("ask", _run_ask, "ask a model about images, without a server", options=False)
    add("question", help="what to ask")
    add("--image", action="append", required=True, help="image file; may be repeated")
    add("--model", help="folder, hub id or models:/NAME@champion; default: the tiny VLM that comes with VisMem")
    add("--base", help="hub id or folder of the model's base, where it is not as the model says")
    add("--stream", action="store_true", help="print the answer while it is decoded")
    add("--no-memory", action="store_true", help="answer without latent memory")
    add("--max-new-tokens", type=int, default=56, help="longest answer in tokens (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="0: the most probable answer (default: %(default)s)")
    add("--seed", type=int, default=0, help="of sampling (default: %(default)s)")

    add = command("infer", _run_infer, "ask the served model about images")
    add("question", nargs="?", help="what to ask; or give it with --prompt")
    add("--prompt", metavar="QUESTION", help="what to ask")
    add("--image", action="append", required=True, metavar="FILE", help="image file; may be repeated")
    add("--stream", action="store_true", help="print the answer while it is decoded")
    add("--no-memory", action="store_true", help="answer without latent memory")
    add("--max-new-tokens", type=int, default=48, metavar="N", help="longest answer in tokens (default: %(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0: the most probable answer (default: 0)")
    add("--seed", type=int, default=0, metavar="N", help="of sampling (default: 0)")
    add("--timeout", type=float, default=60.0, metavar="S", help="longest wait for a piece of the answer (default: 60)")
    about = "gRPC address of any server, no parameters needed; default: this machine at deploy.grpc_port"
    add("--url", metavar="HOST:PORT", help=about)
    add("--model", metavar="NAME", help="the served model's name; default: the one that the server has")

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

    about = "print what makes a shell complete commands and options"
    add = command("completion", _run_completion, about, options=False)
    add("shell", choices=("bash", "zsh", "fish"), help='bash: eval "$(vismem completion bash)" in ~/.bashrc')


def _enter(arguments: argparse.Namespace) -> tuple[Config, Path]:
    """The parameters and the artifacts' folder; with a profile, also change to its workspace."""
    artifacts = arguments.artifacts or Path("artifacts")
    config = load_config(arguments.params, arguments.profile, dict(arguments.settings))
    if arguments.profile is None:
        return config, artifacts
    if arguments.artifacts:
        artifacts = artifacts.absolute()
    root, folder = arguments.params.resolve().parent, make_workspace(arguments.params, arguments.profile)
    os.chdir(folder)
    return rebase(config, root, folder), artifacts


def _run_step(arguments: argparse.Namespace) -> int:
    config, artifacts = _enter(arguments)
    processes = getattr(arguments, "processes", 1)
    launch = LaunchConfig() if processes == 1 else LaunchConfig("torchrun", processes)
    line = launch_step(arguments.command, config, artifacts, dict(arguments.input), launch)
    if is_main_rank():
        line = arguments.caller.shown(line)
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
    from vismem.repro import repro

    settings = dict(arguments.settings)
    if settings:
        folder = arguments.params.resolve().parent / RUNS / workspace_name(arguments.profile, settings)
        shown = arguments.caller.path(folder)
        print(f"repro: with --set this run is apart, in {shown}; `cd {shown}` for its summary", file=sys.stderr)
    return repro(arguments.params, arguments.profile, arguments.rest, settings)


def _run_summary(arguments: argparse.Namespace) -> None:
    from vismem.summary import print_summary

    config, artifacts = _enter(arguments)
    print_summary(config, artifacts, arguments.caller)


def _run_preflight(arguments: argparse.Namespace) -> None:
    config, artifacts = _enter(arguments)
    from vismem.preflight import preflight

    preflight(config, artifacts)


def _run_try(arguments: argparse.Namespace) -> None:
    from vismem.ask import try_examples
    from vismem.summary import make_console

    try_examples(make_console())


def _run_ask(arguments: argparse.Namespace) -> None:
    from vismem.ask import DEFAULT_MODEL, ask

    ask(
        arguments.image,
        arguments.question,
        model=arguments.model or DEFAULT_MODEL,
        base=arguments.base,
        stream=arguments.stream,
        memory=not arguments.no_memory,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )


def _run_infer(arguments: argparse.Namespace) -> None:
    if (arguments.question is None) == (arguments.prompt is None):
        arguments.parser.error("give one question, at the end or with --prompt")
    from vismem.serving.client import main_infer

    main_infer(
        arguments.image,
        arguments.question or arguments.prompt or "",
        url=arguments.url or f"127.0.0.1:{_client_config(arguments).deploy.grpc_port}",
        model=arguments.model,
        stream=arguments.stream,
        memory=not arguments.no_memory,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        timeout=arguments.timeout,
    )


def _client_config(arguments: argparse.Namespace) -> Config:
    """The parameters, or their defaults where nobody named any and the folder has none."""
    if arguments.profile is None and arguments.params == PARAMS and not PARAMS.is_file():
        return resolve(overrides=dict(arguments.settings))
    return load_config(arguments.params, arguments.profile, dict(arguments.settings))


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
        write=lambda line: print(arguments.caller.shown(line), flush=True),
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

        where = arguments.caller.shown(mask_credentials(tracking_uri(config.registry)))
        print_models(listing.models(config), config.registry.model_name, where)


def _run_ui(arguments: argparse.Namespace) -> None:
    config, _ = _enter(arguments)
    from vismem.registry.server import serve_ui

    port = config.registry.ui_port if arguments.port is None else arguments.port
    serve_ui(config, port, lambda line: print(arguments.caller.shown(line), flush=True))


def _run_stack(arguments: argparse.Namespace) -> None:
    from vismem.stack import serve_stack

    serve_stack(arguments.data, {name: getattr(arguments, f"{name}_port") for name in STACK_PORTS})


def _run_params(arguments: argparse.Namespace) -> int:
    overrides = dict(arguments.settings)
    if arguments.defaults:
        config = resolve(overrides=overrides)
    else:
        config = load_config(arguments.params, arguments.profile, overrides)
    print(render_params(config, arguments.all), end="")
    return 0


def _run_completion(arguments: argparse.Namespace) -> None:
    import shtab

    print(shtab.complete(build_parser(), arguments.shell))


if __name__ == "__main__":
    sys.exit(main())

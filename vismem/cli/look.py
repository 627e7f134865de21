"""The commands that show the registry and the parameters, and that set things up."""

import argparse
import json
from pathlib import Path

from vismem.cli.options import enter, load
from vismem.cli.parser import Commands
from vismem.config import EvaluateConfig, resolve
from vismem.errors import UserError, mask_credentials
from vismem.params_file import render_params

VERSIONS: dict[str, tuple[str, ...]] = {  # actions of `models`, and the versions that each is about by default
    "list": (),
    "show": ("champion",),
    "compare": ("champion", "challenger"),
    "promote": ("challenger",),
    "rollback": (),
    "verify": ("champion",),
    "delete": ("",),  # none: it has to be named
}
ACTIONS = """
actions:
  list                 all versions: aliases, verdict, scores; --data REV: those trained on it
  show [VERSION]       all that is known of the champion, or of VERSION, as JSON
  compare [A [B]]      the champion and the challenger, figure by figure, or other versions
  promote [VERSION]    judge the challenger by the gate; it becomes champion if it passes
  rollback             the champion before returns, or --to VERSION; the version that is left is blocked
  verify [VERSION]     fetch the champion and hash every file again
  delete VERSION       delete a version that never was champion
"""
ONLY = {"data": "list", "to": "rollback", "unblock": "promote"}  # options of `models`: the action of each
STACK_PORTS = {"mlflow": 5000, "s3": 8333, "postgres": 5432}


def add_commands(commands: Commands) -> None:
    """Registry, services, parameters, completion."""
    command = commands.group("Look and set up")
    about = "registered versions: list, show, compare, promote, rollback, verify, delete"
    add = command("models", _run_models, about, after=ACTIONS)
    add("action", choices=tuple(VERSIONS), nargs="?", default="list")
    add("which", nargs="*", metavar="VERSION", help="number or alias; what is the default is said below")
    add(
        "--to",
        metavar="VERSION",
        help="rollback: the earlier champion to return to; if it is champion, nothing is done",
    )
    add("--unblock", action="store_true", help="promote: also a version that was rolled back from")
    add("--data", default="", metavar="REV", help="list: only versions trained on this revision of data")

    about = "compare arms question by question, from answers of `vismem evaluate`, lmms-eval or VLMEvalKit"
    add = command("compare", _run_compare, about, options=False)
    files = "files, .parquet, *_samples_*.jsonl, .xlsx, .tsv, .json"
    about = f"an arm and its {files}; give it once for each arm, of which the first is the reference"
    add("--arm", nargs="+", action="append", required=True, metavar=("NAME", "FILE"), help=about)
    add("--metric", metavar="NAME", help="the harness's score to compare, where its files have several")
    add("--cluster", metavar="NAME", help="the key or column of what questions share, such as a picture's name")
    add("--out", type=Path, metavar="FILE", help="also write a page with all answers, such as compare.html")

    about = "compare the requests that a server logged with the data of its model; status 3 where they differ"
    add = command("drift", _run_drift, about, outputs=True)
    about = "what `vismem serve --request-log` wrote, or `vismem api`"
    add("--request-log", type=Path, required=True, metavar="FOLDER", dest="log", help=about)
    add("--days", type=float, default=7, metavar="N", help="only requests of the last N days (default: %(default)s)")
    add("--model", default="champion", metavar="VERSION", help="number or alias (default: %(default)s)")

    add = command("ui", _run_ui, "open MLflow on the store and print the model's page")
    add("--port", type=int, help="default: registry.ui_port; 0: any free one")

    add = command("stack", _run_stack, "run PostgreSQL, an S3 server and MLflow on both until Ctrl-C", options=False)
    add(
        "--data",
        type=Path,
        default=Path("runs/stack"),
        metavar="FOLDER",
        help="folder of all that they keep (default: %(default)s)",
    )
    for name, port in STACK_PORTS.items():
        add(f"--{name}-port", type=int, default=port, help="0: any free one (default: %(default)s)")

    about = "draw how the gain depends on the parameters that experiments of DVC varied (`dvc exp run --queue -S ...`)"
    add = command("sweep", _run_sweep, about, options=False)
    add("--out", type=Path, default=Path("sweep.html"), metavar="FILE", help="the page (default: %(default)s)")

    add = command("params", _run_params, "print the parameters in force, each explained")
    add("--defaults", action="store_true", help="the defaults, whatever --params and --profile say")
    add("--all", action="store_true", help="also the keys that are seldom changed")

    about = "print what makes a shell complete commands and options"
    add = command("completion", _run_completion, about, options=False)
    add("shell", choices=("bash", "zsh", "fish"), help='bash: eval "$(vismem completion bash)" in ~/.bashrc')


def _run_models(arguments: argparse.Namespace) -> None:
    config, _ = enter(arguments)
    usual = VERSIONS[arguments.action]
    if len(arguments.which) > len(usual):
        raise UserError(f"`vismem models {arguments.action}` takes {len(usual) or 'no'} VERSION")
    which = (*arguments.which, *usual[len(arguments.which) :])
    if "" in which:
        raise UserError(f"name the version to {arguments.action}: `vismem models {arguments.action} 8`")
    for option, action in ONLY.items():
        if getattr(arguments, option) and arguments.action != action:
            raise UserError(f"--{option} goes with `vismem models {action}` only")
    match arguments.action:
        case "list":
            from vismem.registry.listing import models
            from vismem.registry.versions import tracking_uri
            from vismem.summary import print_models

            where = arguments.caller.shown(mask_credentials(tracking_uri(config.registry)))
            name, found = config.registry.model_name, models(config, arguments.data)
            if arguments.data and not found:
                raise UserError(f"no version of '{name}' in {where} was trained on {arguments.data}")
            print_models(found, name, where)
        case "show":
            from vismem.registry.listing import show

            print(json.dumps(show(config, *which), indent=2, ensure_ascii=False))
        case "compare":
            from vismem.registry.inspect import compare
            from vismem.summary import print_table

            print_table(*compare(config, *which))
        case "promote":
            from vismem.registry.release import promote_version

            print(promote_version(config, which[0], arguments.unblock))
        case "rollback":
            from vismem.registry.release import rollback

            print(rollback(config, arguments.to))
        case "delete":
            from vismem.registry.release import delete

            print(delete(config, which[0]))
        case "verify":
            from vismem.registry.inspect import verify

            print(verify(config, *which))


def _run_drift(arguments: argparse.Namespace) -> int:
    log = arguments.log.absolute()
    config, artifacts = enter(arguments)
    from vismem.registry.inspect import trained
    from vismem.validation.drift import drift

    out = artifacts / "drift"
    line, differs = drift(config.drift, trained(config, arguments.model), log, arguments.days, out)
    print(arguments.caller.shown(f"{line}\nThe report is {out / 'report.html'}"))
    return 3 if differs else 0


def _run_compare(arguments: argparse.Namespace) -> None:
    files = {name: [*map(Path, paths)] for name, *paths in arguments.arm}
    if len(files) < len(arguments.arm) or not all(files.values()) or len(files) < 2:
        arguments.parser.error("give --arm NAME FILE... twice or more, each with a name of its own and a file")
    from vismem.evaluation.compare import compare, read_arms, render, table
    from vismem.files import write_text
    from vismem.summary import print_table

    arms = read_arms(files, arguments.metric, arguments.cluster)
    rows = compare(arms, seed=0, resamples=EvaluateConfig().bootstrap)
    print_table(table(rows), "Scores in percent, differences in points, with 95 % intervals; p by Holm")
    if rows[-1].clusters == rows[-1].n:
        print("Every question counts by itself: where some share a picture, name what tells with --cluster")
    if arguments.out:
        write_text(arguments.out, render(arms, rows, seed=0))
        print(f"compare: {arguments.out}")


def _run_ui(arguments: argparse.Namespace) -> None:
    config, _ = enter(arguments)
    from vismem.registry.server import serve_ui

    port = config.registry.ui_port if arguments.port is None else arguments.port
    serve_ui(config, port, lambda line: print(arguments.caller.shown(line), flush=True))


def _run_stack(arguments: argparse.Namespace) -> None:
    from vismem.stack import serve_stack

    serve_stack(arguments.data, {name: getattr(arguments, f"{name}_port") for name in STACK_PORTS})


def _run_sweep(arguments: argparse.Namespace) -> None:
    from vismem.evaluation.sweep import render, shown_by_dvc
    from vismem.files import write_text

    write_text(arguments.out, render(shown_by_dvc()))
    print(f"sweep: {arguments.out}")


def _run_params(arguments: argparse.Namespace) -> None:
    config = resolve(overrides=dict(arguments.settings)) if arguments.defaults else load(arguments)
    print(render_params(config, arguments.all), end="")


def _run_completion(arguments: argparse.Namespace) -> None:
    import shtab

    print(shtab.complete(arguments.root, arguments.shell))

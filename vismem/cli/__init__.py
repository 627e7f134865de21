"""The command line: `vismem STEP` for each step, and what people do around them. It only translates.

`run`, `ask` and `look` hold the commands, each with what it calls. Heavy parts load late. What the person at the
keyboard can mend ends as one line on stderr, with status 1 (VISMEM_DEBUG=1 shows where it came from).
"""

import os
import sys
from collections.abc import Sequence

from vismem.cli import ask, look, run
from vismem.cli.options import common_options, output_options
from vismem.cli.parser import Commands, Parser, Version
from vismem.errors import UserError
from vismem.messages import Caller
from vismem.runtime.access import pass_proxies

ABOUT = "Latent vision memory for vision-language models: train, evaluate, gate, release and serve it."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status (`vismem.cli.parser.STATUSES`)."""
    parser = build_parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        return 2
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "repro":
        arguments.parser.refuse(rest)
    arguments.rest, arguments.root = rest, parser
    arguments.caller = Caller.of(getattr(arguments, "profile", None))
    pass_proxies()
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
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing in ("vismem", "None") or os.environ.get("VISMEM_DEBUG"):
            raise
        extra = f"the Python package '{missing}' is not installed: VisMem's extras have it, see pyproject.toml"
        print(f"vismem {arguments.command}: {extra} (`pip install 'vismem[pipeline]'`)", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"vismem {arguments.command}: stopped", file=sys.stderr)
        return 130
    return status or 0


def build_parser() -> Parser:
    """The parser; the steps' commands are made from `vismem.steps`."""
    parser = Parser(prog="vismem", description=ABOUT)
    parser.add_argument("--version", action=Version, nargs=0, help="print the version")
    commands = Commands(parser, common_options(), output_options())
    run.add_commands(commands)
    ask.add_commands(commands)
    look.add_commands(commands)
    run.add_steps(commands)
    parser.overview = commands.overview(ABOUT)
    return parser

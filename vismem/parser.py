"""What the command line adds to argparse: groups of commands, errors of one line with the nearest right word."""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any, NoReturn

import yaml

from vismem.errors import nearest
from vismem.steps import BASELINES, STEPS, Step

GROUPS = {
    "Run": ("init", "plan", "preflight", "repro", "summary"),
    "Ask": ("try", "ask", "infer", "serve"),
    "Look and set up": ("models", "ui", "stack", "params", "completion"),
    "Steps of the pipeline, in their order; `repro` runs them": tuple(step.name for step in STEPS),
    "Baselines, with which the method is compared": tuple(step.name for step in BASELINES),
}
STATUSES = {
    "0": "done",
    "1": "failed; one line says what was wrong and what to do, VISMEM_DEBUG=1 where it came from",
    "2": "the command line is wrong",
    "130": "stopped by Ctrl-C; `serve`, `ui` and `stack` end with 0 then",
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the nearest right word. `overview` stands in for argparse's own help."""

    overview = ""

    def format_help(self) -> str:
        """The overview, where there is one."""
        return self.overview or super().format_help()

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        if wrong := re.fullmatch(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message):
            what, given, known = wrong[1].lower(), wrong[2], re.findall(r"'([^']+)'", wrong[3])
            said = "" if len(known) > 10 else f"; there are {', '.join(known)}"
            message = f"no {what} '{given}'{nearest(given, known)}{said}"
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """The error for arguments that no option or position takes."""
        options = re.findall(r"(?<![\w-])--[a-z][a-z-]*", super().format_help())
        named = [f"{word}{nearest(word, options) if word.startswith('-') else ''}" for word in unknown]
        self.error(f"unknown {'argument' if len(named) == 1 else 'arguments'} {' '.join(named)}")


class Version(argparse.Action):
    """Prints the installed version, and looks it up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Exit with status 0."""
        parser.exit(message=f"vismem {metadata.version('vismem')}\n")


def setting(text: str) -> tuple[str, Any]:
    """Key and value of `KEY=VALUE`: a dotted key, and a value as in params.yaml."""
    key, equals, value = text.partition("=")
    if not (key.strip() and equals):
        raise argparse.ArgumentTypeError(f"'{text}' is not KEY=VALUE, such as stage1.steps=30")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"the value of '{text}' is not valid YAML") from None


def describe(step: Step) -> str:
    """What a step does, reads, writes and depends on, for its help."""
    reads = ", ".join(f"artifacts/{name}" for name in step.inputs) or "what the parameters name"
    also = f" (and {', '.join(step.optional)} where they are)" if step.optional else ""
    kind = "A step of the pipeline" if step in STEPS else "A baseline, no step of the pipeline"
    return (
        f"{sentence(step.about)} {kind}: it reads {reads}{also}, writes artifacts/{step.name}, and depends on these "
        f"sections of the parameters: {', '.join(step.sections)}."
    )


def sentence(about: str) -> str:
    """A command's line as a sentence."""
    return f"{about[0].upper()}{about[1:]}."


class Commands:
    """The commands of a parser, each in a group of the overview."""

    def __init__(self, parser: Parser, common: Parser) -> None:
        self._commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        self._common, self._abouts = common, dict[str, str]()

    def add(
        self, name: str, run: Callable[..., int | None], about: str, *, options: bool = True, description: str = ""
    ) -> Callable[..., Any]:
        """Make a command that calls `run`, with the common `options` or without; returns its `add_argument`."""
        parents = [self._common] if options else []
        said = description or sentence(about)
        made: Parser = self._commands.add_parser(name, parents=parents, help=about, description=said)
        made.set_defaults(run=run, parser=made)
        self._abouts[name] = about
        return made.add_argument

    def overview(self, about: str) -> str:
        """The help of the whole: every command with a line, by group, and the exit statuses."""

        def lines() -> Iterator[str]:
            yield from ("usage: vismem COMMAND [OPTION ...]", "", about)
            for title, names in GROUPS.items():
                known = [name for name in names if name in self._abouts]
                yield from ("", f"{title}:", *(f"  {name:<18}{self._abouts[name]}" for name in known))
            yield from ("", "`vismem COMMAND --help` explains a command, `vismem --version` prints the version.", "")
            yield from ("Exit status (of `repro` DVC's):", *(f"  {code:<4}{what}" for code, what in STATUSES.items()))

        return "\n".join(lines()) + "\n"


def add_request(add: Callable[..., Any], max_new_tokens: int) -> None:
    """What a question to a model may say, beside the question."""
    add("--image", action="append", required=True, metavar="FILE", help="image file; may be repeated")
    add("--stream", action="store_true", help="print the answer while it is decoded")
    add("--no-memory", action="store_false", dest="memory", help="answer without latent memory")
    about = "longest answer in tokens (default: %(default)s)"
    add("--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help=about)
    add("--temperature", type=float, default=0.0, metavar="T", help="0: the most probable answer (default: 0)")
    add("--seed", type=int, default=0, metavar="N", help="of sampling (default: 0)")


def request_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `add_request` asked for, the images aside."""
    return {name: getattr(arguments, name) for name in ("stream", "memory", "max_new_tokens", "temperature", "seed")}

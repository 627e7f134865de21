"""What the command line adds to argparse: groups of commands, errors of one line with the nearest right word."""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any, NoReturn

import shtab

from vismem.errors import nearest

COMPLETED = {  # by metavar
    "FILE": shtab.FILE,
    "FOLDER": shtab.DIRECTORY,
    "PROFILE": shtab.cmd("ls deploy/profiles 2> /dev/null | sed -n s/[.]yaml$//p"),
}
STATUSES = {
    "0": "done",
    "1": "failed; one line says what was wrong and what to do, VISMEM_DEBUG=1 where it came from",
    "2": "the command line is wrong",
    "3": "`drift` found that requests differ from the training data",
    "130": "stopped by Ctrl-C; `serve`, `api`, `playground`, `ui` and `stack` end with 0 then",
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the nearest right word. `overview` stands in for argparse's own help."""

    overview = ""
    after = ""  # what stands below the options, as it is

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Argparse's; shells complete files for an option that takes one."""
        action = super().add_argument(*names, **options)
        if options.get("metavar") in COMPLETED:
            action.complete = COMPLETED[options["metavar"]]  # type: ignore[attr-defined]
        return action

    def format_help(self) -> str:
        """The overview, where there is one."""
        return self.overview or super().format_help() + self.after

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        if wrong := re.fullmatch(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message):
            what, given, known = wrong[1].lower(), wrong[2], wrong[3].replace("'", "").split(", ")  # 3.12.8: no quotes
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
        print(f"vismem {metadata.version('vismem')}")
        parser.exit()


def sentence(about: str) -> str:
    """A command's line as a sentence."""
    return f"{about[0].upper()}{about[1:]}."


class Commands:
    """The commands of a parser, each in a group of the overview."""

    def __init__(self, parser: Parser, common: Parser, outputs: Parser) -> None:
        self._commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        self._common, self._outputs = common, outputs
        self._groups: dict[str, dict[str, str]] = {}

    def group(self, title: str) -> Callable[..., Callable[..., Any]]:
        """Begin a group; returns `add`."""
        self._groups[title] = {}
        return self.add

    def add(
        self,
        name: str,
        run: Callable[..., int | None],
        about: str,
        *,
        options: bool = True,
        outputs: bool = False,
        description: str = "",
        after: str = "",
    ) -> Callable[..., Any]:
        """Make a command that calls `run`; returns its `add_argument`.

        With `options` it takes those about parameters, with `outputs` the one for the folder of the steps' outputs.
        `after` stands below its help, line by line.
        """
        parents = [self._common] * options + [self._outputs] * outputs
        said = description or sentence(about)
        made: Parser = self._commands.add_parser(name, parents=parents, help=about, description=said)
        made.after = after
        made.set_defaults(run=run, parser=made)
        list(self._groups.values())[-1][name] = about
        return made.add_argument

    def overview(self, about: str) -> str:
        """The help of the whole: every command with a line, by group, and the exit statuses."""

        def lines() -> Iterator[str]:
            yield from ("usage: vismem COMMAND [OPTION ...]", "", about)
            for title, abouts in self._groups.items():
                yield from ("", f"{title}:", *(f"  {name:<18}{said}" for name, said in abouts.items()))
            yield from ("", "`vismem COMMAND --help` explains a command, `vismem --version` prints the version.", "")
            yield from ("Exit status:", *(f"  {code:<4}{what}" for code, what in STATUSES.items()))

        return "\n".join(lines()) + "\n"

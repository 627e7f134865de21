"""What a message says to the person who called: one line, with paths and commands as they would type them."""

import os
import re
import shutil
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from vismem.disk import NO_SPACE, free_space, megabytes
from vismem.errors import mask_credentials

CALLED_FROM, CALLED_WITH = "VISMEM_CALLED_FROM", "VISMEM_CALLED_WITH"  # variables: a folder and a profile
# A relative path, after the scheme of a SQLite store also a bare name; not a part of an address or of a longer path.
_PATH = re.compile(r"(?<![\w/.:~-])(sqlite:///(?=[\w.])|)((?:[\w.~=-]+/)*[\w.~=-]*[\w~=-])")
_WITHOUT_PROFILE = "infer|ask|try|api|playground|init|stack|compare|sweep|completion"  # commands
_COMMAND = re.compile(rf"`vismem (?!{_WITHOUT_PROFILE})([a-z]\w*(?: [^`]*)?)`")


@dataclass(frozen=True)
class Caller:
    """Where a command was called, and the profile that it named: then the process works in the profile's workspace."""

    folder: Path
    profile: str | None = None

    @classmethod
    def of(cls, profile: str | None) -> "Caller":
        """The caller of this process; of a step that `vismem repro` runs in a workspace, the one who called that."""
        folder, named = os.environ.get(CALLED_FROM), os.environ.get(CALLED_WITH)
        return cls(Path(folder), named) if folder and named else cls(Path.cwd(), profile)

    def known(self) -> AbstractContextManager[None]:
        """Within the block, the processes that this one starts know who called."""
        from vismem.services import environment

        return environment({CALLED_FROM: str(self.folder), CALLED_WITH: self.profile} if self.profile else {})

    def explain(self, error: Exception) -> str:
        """The error in one line, without credentials."""
        return mask_credentials(self.shown(" ".join(_said(error).split())))

    def shown(self, text: str) -> str:
        """The text with paths as seen from the caller's folder, and with the profile in the commands that it names."""
        if self.profile is None:
            return text
        with_profile = rf"`vismem \1 --profile {self.profile}`"
        return _PATH.sub(self._moved, _COMMAND.sub(with_profile, text))

    def path(self, path: Path) -> str:
        """A path as seen from the caller's folder."""
        return os.path.relpath(path.absolute(), self.folder)

    def program(self) -> list[str]:
        """What the caller types for `vismem`: the word where it is on the PATH, else this environment's script."""
        script, found = Path(sys.executable).with_name("vismem"), shutil.which("vismem")
        if found is not None and Path(found).parent.resolve() == script.parent.resolve():
            return ["vismem"]
        return [self.path(script)] if script.is_file() else [sys.executable, "-m", "vismem.cli"]

    def _moved(self, found: re.Match[str]) -> str:
        store, path = found.groups()
        first, slash, rest = path.partition("/")
        known = slash and (os.path.lexists(first) or first == "artifacts")
        if not (store or known):
            return found[0]
        place = os.path.join(os.path.realpath(first), rest) if slash else os.path.abspath(path)
        return f"{store}{os.path.relpath(place, self.folder)}"


def _said(error: Exception) -> str:
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    if error.errno not in NO_SPACE:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    free, there = free_space(Path(error.filename or "."))
    what = f"cannot write {error.filename}, the disk is full" if error.filename else "the disk is full"
    return f"{what}: {megabytes(free)} are free in {there}; free some and run the same command again"

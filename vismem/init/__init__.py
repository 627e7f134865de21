"""`vismem init`: a user's questions become a checked and split data set and a profile that runs the pipeline on it."""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from vismem.config import Config, load_config
from vismem.config.data import Split
from vismem.errors import UserError
from vismem.files import write_text
from vismem.init.bases import look_at
from vismem.init.profile import LARGE, MARK, render_profile, settings_of
from vismem.init.report import RECORD, describe
from vismem.init.rows import File, Row, Rows, read_rows
from vismem.init.splits import ORDER, Splits, split_rows
from vismem.locks import lock_file
from vismem.messages import Caller
from vismem.provenance import sha256_file
from vismem.steps import replace_folder
from vismem.times import tiny_vlm_seconds

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}")


@dataclass(frozen=True)
class Request:
    """What `vismem init` is asked for; paths as the user gave them."""

    name: str
    data: tuple[Path, ...]
    base: str | None = None  # folder or hub id; None: the default of the parameters
    seed: int | None = None
    images: Path | None = None  # the folder that images' paths start at; None: each file's
    test: Path | None = None  # a file that is the test split as it is
    validation: Path | None = None
    force: bool = False

    def files(self) -> list[File]:
        """Every file that is named; what is tested comes first, so that it stays where it is asked twice."""
        named: list[tuple[Path | None, Split | None]] = [(self.test, "test"), (self.validation, "validation")]
        named += [(path, None) for path in self.data]
        return [File(path, self.images or path.parent, split) for path, split in named if path is not None]


def init(params: Path, request: Request, caller: Caller) -> str:
    """Write data/NAME/ and deploy/profiles/NAME.yaml beside the parameter file; return what to tell the user.

    Both are there whole or not at all, and what is there already is replaced only with `force`, and only where `init`
    wrote it. UserError where that is not allowed, for files or a base that cannot be used, and where no row is good.
    """
    root = params.absolute().parent
    config = load_config(params)
    target, profile = root / "data" / request.name, root / "deploy" / "profiles" / f"{request.name}.yaml"
    _check_free(request, target, profile)
    base = look_at(config.base.model_copy(update={"model": _base_model(request.base, config, root)}))
    below = config if base.small else load_config(params, LARGE)
    rows = read_rows(request.files(), config.validate_, base.doubts, base.reserved())
    if not rows.good:
        named = ", ".join(str(file.path) for file in request.files())
        raise UserError(f"no good row in {named}: {'; '.join(rows.bad[:3]) or 'no rows at all'}")
    seed = config.seed if request.seed is None else request.seed
    splits = split_rows(rows.good, seed)
    settings = settings_of(request.name, base, splits.rows, below, _seen_from(rows.images, root), seed)
    command = f"vismem {shlex.join(sys.argv[1:])}" if sys.argv[1:2] == ["init"] else "vismem init"
    text = render_profile(request.name, command, base, settings)
    made = load_config(params, overrides={one.key: one.value for one in settings})
    seconds = sum(tiny_vlm_seconds(made, {split: len(of) for split, of in splits.rows.items()}).values())
    _write(request, target, profile, _files(rows, splits, request), text)
    wrote = [caller.path(path) for path in (target, profile)]
    return describe(shlex.join(caller.program()), request.name, rows, splits, base, seconds, below, wrote)


def _check_free(request: Request, target: Path, profile: Path) -> None:
    """UserError where the names are taken, or not to be had."""
    if not NAME.fullmatch(request.name):
        raise UserError(f"'{request.name}' is no name for a profile: letters, digits, - and _, up to 60")
    for path in (file.path for file in request.files()):
        if path.resolve().is_relative_to(target.resolve()):
            raise UserError(f"{path} lies in the folder that `vismem init` would write: choose another name")
    for path, ours in (
        (profile, profile.is_file() and profile.read_text().startswith(MARK)),
        (target, (target / RECORD).is_file()),
    ):
        shown = os.path.relpath(path)
        if path.exists() and not ours:
            raise UserError(f"{shown} is there already and not of `vismem init`: choose another name")
        if path.exists() and not request.force:
            raise UserError(f"{shown} is there already: choose another name, or replace it with --force")
    written = {RECORD, *(f"{split}.jsonl" for split in ORDER)}
    if others := sorted(file.name for file in target.glob("[!.]*") if file.name not in written):
        raise UserError(
            f"{os.path.relpath(target)} also holds {', '.join(others[:3])}, which would be lost: move that, or choose "
            "another name"
        )


def _base_model(named: str | None, config: Config, root: Path) -> str:
    """The base as the profile is to name it: a folder as seen from the root where it is inside, a hub id as it is."""
    if named is None or not Path(named).is_dir():
        return named or config.base.model
    return _seen_from(Path(named), root).as_posix()


def _seen_from(path: Path, root: Path) -> Path:
    """Relative to the root where it is inside, else absolute."""
    path = Path(os.path.abspath(path))
    return path.relative_to(root) if path.is_relative_to(root) else path


def _files(rows: Rows, splits: Splits, request: Request) -> dict[str, str]:
    """The texts of the files of data/NAME. The record changes with any picture, so that DVC sees it too."""
    pictures = sha256(b"".join(picture for row in rows.good for picture in row.pictures)).hexdigest()
    record = {
        "files": {str(file.path): sha256_file(file.path) for file in request.files()},
        "pictures_sha256": pictures,
        "rows": {split: len(chosen) for split, chosen in splits.rows.items()},
        "left_out": [*rows.bad, *rows.duplicates, *splits.leaks],
    }
    written = {name: "".join(map(_json_line, chosen)) for name, chosen in splits.rows.items()}
    return {f"{split}.jsonl": text for split, text in written.items()} | {RECORD: json.dumps(record, indent=2) + "\n"}


def _json_line(row: Row) -> str:
    return json.dumps(row.values, ensure_ascii=False) + "\n"


def _write(request: Request, target: Path, profile: Path, files: Mapping[str, str], text: str) -> None:
    """Move the folder into its place, and then the profile into its own; nothing is moved before all is written."""
    lock, fresh = (target.with_name(f".{target.name}.{word}") for word in ("lock", "new"))
    fresh_profile = profile.with_name(f".{profile.name}.new")
    with lock_file(lock, os.path.relpath(target)):
        try:
            _check_free(request, target, profile)  # another run may have written it meanwhile
            shutil.rmtree(fresh, ignore_errors=True)  # of a killed run
            for name, content in files.items():
                write_text(fresh / name, content)
            write_text(fresh_profile, text)
            replace_folder(fresh, target)
            fresh_profile.rename(profile)
        finally:
            fresh_profile.unlink(missing_ok=True)
            shutil.rmtree(fresh, ignore_errors=True)
            lock.unlink()

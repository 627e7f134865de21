"""Data that DVC keeps: fetched from a revision of a Git repository, once per md5, or found in the project itself."""

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from vismem.config import Config, DvcPath, DvcSource, LocalFiles, Source
from vismem.data.revisions import DataRevision
from vismem.disk import is_full_disk
from vismem.errors import UserError, mask_credentials
from vismem.files import read_json, user_cache, write_json
from vismem.locks import lock_file
from vismem.provenance import git

COMMIT = re.compile(r"[0-9a-f]{40}")
HASHES = ("md5", "md5-dos2unix")  # as DVC counts, and as DVC 2 did with texts
REMOTE_KEYS = {  # what a cloned repository may set of a remote: no file, command or credential
    *("url", "endpointurl", "oss_endpoint", "region", "account_name", "projectname", "user", "port", "auth"),
    *("version_aware", "worktree", "allow_anonymous_login", "use_ssl", "verify"),
    *("timeout", "connect_timeout", "read_timeout"),
}


def fetched(config: Config) -> tuple[Config, list[DataRevision]]:
    """Parameters in which every DVC source is the local ones that it is read by, and where the data came from.

    Local sources whose files the project itself has in DVC are named too, where they are as their .dvc file says.
    UserError where a revision, its path or its data cannot be had; nothing half fetched is left then.
    """
    sources: list[Source] = []
    found, files = dict[DataRevision, None](), dict[Path, None]()
    for source in config.prepare.sources:
        if isinstance(source, DvcSource):
            revision, place = fetch(source)
            found[revision] = None
            sources += [_moved(inner, source.path, place) for inner in source.sources]
        else:
            sources.append(source)
            named = source.paths().values() if isinstance(source, LocalFiles) else ()
            files |= dict.fromkeys(file for path in named for file in _tracked_by(path))
    return _with(config, sources), [*found, *(revision for file in files for revision in _committed(file))]


def pinned(config: Config) -> Config:
    """Parameters in which every DVC source says which md5 its revision holds now, so that a cache may go by that."""
    every = config.prepare.sources
    return _with(config, (s.model_copy(update={"md5": find(s).md5}) if isinstance(s, DvcSource) else s for s in every))


def _with(config: Config, sources: Iterable[Source]) -> Config:
    prepare = config.prepare.model_copy(update={"sources": tuple(sources)})
    return config.model_copy(update={"prepare": prepare})


def find(source: DvcPath) -> DataRevision:
    """What the revision holds, by its Git repository alone. UserError as from `fetch`."""
    if (known := _known(source)) is not None:
        return known
    with _opened(source) as files:
        return _revision(source, files)


def md5_here(rev: str, paths: Iterable[str]) -> set[str]:
    """The md5 of each path as the project that we stand in has it in a revision; of those that are there."""
    found = set()
    root = git(Path(), "rev-parse", "--show-toplevel")
    for path in paths if root else ():
        with suppress(UserError):
            found.add(find(DvcPath(repo=root, rev=rev, path=Path(path))).md5)
    return found


def fetch(source: DvcPath) -> tuple[DataRevision, Path]:
    """What the revision holds, and the fetched file or folder, in the user's cache under its md5.

    A full commit that was fetched before needs no network. UserError where Git, the revision, the path, the remote or
    the data is not there, or other bytes came than the md5 says; a killed fetch leaves nothing that a later one takes.
    """
    if (known := _known(source)) is not None and (place := _place(known)).exists():
        return known, place
    with _opened(source) as files:
        revision = _revision(source, files)
        place = _place(revision)
        partial = place.parent.with_name(f"{revision.md5}.partial")
        with lock_file(partial.with_suffix(".lock"), str(place.parent), patience=24 * 3600.0):
            if not place.exists():
                shutil.rmtree(partial, ignore_errors=True)  # of a killed run
                try:
                    _download(files, revision, partial / place.name)
                    place.parent.mkdir(exist_ok=True)  # the same data may be there under another name
                    (partial / place.name).rename(place)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
        write_json(_note(source, revision.commit), revision.model_dump())
    return revision, place


def _place(revision: DataRevision) -> Path:
    return user_cache() / "dvc" / revision.md5 / Path(revision.path).name


def _note(source: DvcPath, commit: str) -> Path:
    """The file that keeps what a commit holds."""
    asked = "\0".join((source.repo, commit, str(source.path), source.remote or ""))
    return user_cache() / "dvc" / f"{hashlib.sha256(asked.encode()).hexdigest()}.json"


def _known(source: DvcPath) -> DataRevision | None:
    """What is kept of a full commit, which never moves; None where that holds other data than is asked for."""
    note = _note(source, source.rev)
    if not COMMIT.fullmatch(source.rev) or not note.is_file():
        return None
    try:
        known = DataRevision(**{**read_json(note), "rev": source.rev})
    except (UserError, TypeError, ValueError):  # damaged, or of another version: found anew
        return None
    return known if source.md5 in (None, known.md5) else None


def _download(files: Any, revision: DataRevision, place: Path) -> None:
    from dvc.fs import localfs
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.db import HashFileDB

    place.parent.mkdir(parents=True)
    files.get(revision.path, str(place), recursive=True)
    here = HashFileDB(localfs, str(place.parent))
    found = [build(here, str(place), localfs, name, dry_run=True)[2].hash_info.value for name in HASHES]
    if revision.md5 not in found:
        raise UserError(f"DVC fetched {found[0]}, not {revision.md5}: the remote's files are damaged")


@contextmanager
def _opened(source: DvcPath) -> Iterator[Any]:
    """The revision as a file system. What DVC, Git or the remote's client raise within is a UserError of one line."""
    if find_spec("dvc") is None:
        raise UserError("prepare.sources dvc: DVC is not installed here: pip install 'vismem[pipeline]'")
    from dvc.api import DVCFileSystem
    from dvc.repo.open_repo import clean_repos

    where = f"{source.path} at {source.rev} of {source.repo}"
    try:
        files = DVCFileSystem(source.repo, rev=source.rev, remote=source.remote)
        if not Path(source.repo).is_dir():
            _check_settings(files.repo, source.path)
        yield files
    except Exception as error:
        if is_full_disk(error):
            raise
        raise UserError(f"prepare.sources dvc: {where}: {_why(error)}") from error
    finally:
        clean_repos()


def _check_settings(repo: Any, path: Path) -> None:
    """UserError where a cloned repository has DVC use files or commands of this machine, or go on to another one.

    DVC takes settings from its `.dvc/config` and `config.local`, and from the stages, as if they were the user's own.
    """
    settings = [repo.config.load_one(level) for level in ("repo", "local") if level in repo.config.files]
    _check_keys(key for level in settings for remote in level["remote"].values() for key in remote)
    _check_keys(key for level in settings for key in level["core"].keys() & {"site_cache_dir"})
    for stage in repo.index.stages:
        named = (*stage.deps, *stage.outs)
        _check_keys(key for one in named for key in getattr(one, "def_fs_config", None) or ())
        here = (PurePosixPath("/", path).is_relative_to(out.fs_path) for out in stage.outs)
        if stage.is_repo_import and any(here):
            raise UserError("it is imported there from another repository: name that one")


def _check_keys(keys: Iterable[str]) -> None:
    if unfit := ", ".join(sorted(set(keys) - REMOTE_KEYS)):
        raise UserError(
            f"the repository sets {unfit} of DVC, which only you may: in `dvc config --global` and the environment, "
            "or name a folder with a clone that you trust"
        )


def _why(error: BaseException) -> str:
    """The innermost cause, which alone names the address or the file, and what to do."""
    chain = [error]
    while (link := chain[-1].__cause__) is not None:
        chain.append(link)
    said = " ".join(str(chain[-1]).split()) or type(chain[-1]).__name__
    names = {type(link).__name__ for link in chain}
    if "RevError" in names:
        return f"{said}: name a commit, tag or branch that was pushed"
    if "CloneError" in names:
        return f"{said}: check the address, the network and Git's credentials"
    if names & {"PermissionError", "NoCredentialsError"}:
        return f"{said}: the DVC remote takes no such keys; those of S3 are AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if "FileNotFoundError" in names:
        return f"{said}: `dvc push` it to the remote from where it was added, or name another `remote`"
    return said


def _revision(source: DvcPath, files: Any) -> DataRevision:
    try:
        md5 = (files.info(str(source.path)).get("dvc_info") or {}).get("md5")
    except FileNotFoundError:
        raise UserError("there is no such file or folder in that revision") from None
    if not md5:
        raise UserError("DVC does not track it there as a whole: name what a .dvc file or a stage has as its output")
    if source.md5 not in (None, md5):
        raise UserError(f"its md5 is {md5}, and {source.md5} is asked for: the revision has moved")
    folder, settings = Path(source.repo), files.repo.config
    remote = source.remote or settings["core"].get("remote")
    if remote is None and not folder.is_dir():  # a folder has a cache
        raise UserError("the repository has no default DVC remote: `dvc remote default NAME` there, or give `remote`")
    origin = (_origin(files.repo) or folder.resolve().name) if folder.is_dir() else source.repo
    return DataRevision(
        repo=mask_credentials(origin),
        rev=source.rev,
        commit=str(files.repo.get_rev()),
        path=str(source.path),
        md5=str(md5),
        remote=mask_credentials(str(settings["remote"].get(remote, {}).get("url", ""))),
    )


def _moved(source: Any, path: Path, place: Path) -> Any:
    """A source that reads what lies at `place` and was `path` in the repository."""
    moved = {name: place / value.relative_to(path) for name, value in source.paths().items()}
    return source.model_copy(update=moved)


def _tracked_by(path: Path) -> list[Path]:
    """The .dvc file beside a local path or a folder above it, or none."""
    places = (place for place in (path.absolute(), *path.absolute().parents) if place.name)
    return [file for place in places if (file := place.with_name(f"{place.name}.dvc")).is_file()][:1]


def _committed(file: Path) -> list[DataRevision]:
    """What the project's own DVC says of the data of a .dvc file; nothing where the data is not as it was committed."""
    if find_spec("dvc") is None:
        return []
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    data, file = os.path.relpath(file.with_suffix("")), file.resolve()
    with suppress(UserError, DvcException):  # it was never committed, or DVC does not know the folder
        root = Repo.find_root(str(file.parent))
        with Repo(root) as repo:
            (out,) = repo.stage.load_one(str(file)).outs
            changed = out.changed_checksum()
        found = find(DvcPath(repo=os.path.relpath(root), rev="HEAD", path=file.relative_to(root).with_suffix("")))
        if not changed and found.md5 == out.hash_info.value:
            # the commit that brought the data, so that later ones change no output
            commit = git(file.parent, "log", "-1", "--format=%H", "--", file.name)
            return [found.model_copy(update={"rev": "", "commit": commit or found.commit})]
    print(f"{data} is not what {data}.dvc of the last commit says: `dvc add` and commit, or no model names its data")
    return []


def _origin(repo: Any) -> str:
    from scmrepo.exceptions import SCMError

    try:
        return str(repo.scm.get_remote_url("origin"))
    except (SCMError, AttributeError):  # no such remote, no Git
        return ""

"""`vismem serve`: restarts a server that no longer answers, and loads new releases while the old ones answer."""

import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from vismem.config import Config
from vismem.errors import UserError
from vismem.files import link_or_copy
from vismem.locks import lock_file, lock_folder
from vismem.provenance import MANIFEST, sha256_file
from vismem.runtime.access import own_token
from vismem.services import HOST, POLL, check_certificate, until_stopped
from vismem.serving.client import is_challenger
from vismem.serving.exchange import check_token
from vismem.serving.probe import ask_unary, check_model
from vismem.serving.repository import MANIFEST_VARIABLE, check_repository, is_unary, streaming_name
from vismem.serving.server import READY_TIMEOUT, TritonServer, find_error, model_names, triton_server

CHECK_SECONDS = 10.0  # from one question to a model to the next
PATIENCE = 60.0  # seconds without an answer or a token for others: a long prompt takes many on a CPU
RETRY_SECONDS = 30.0  # after which a repository that was damaged, or half written, is looked at again


class Releases:
    """What the server reads: a folder of links, one per model, to copies of what was deployed.

    A release takes another's place in one step, the replacement of a link. The copies are hard links where the file
    system has them: `vismem deploy` may remove what it deployed before.
    """

    def __init__(self, source: Path, folder: Path) -> None:
        """`source`: the model repository that `vismem deploy` writes. UserError where it is damaged or empty."""
        self.source, self.repository, self.copies = source, folder / "repository", folder / "copies"
        self.repository.mkdir()
        self.copies.mkdir()
        self.served: dict[str, str] = {}  # per model the hash of its manifest
        self.refused: dict[str, float] = {}  # per such hash until when, by time.monotonic()
        self.lost = ""  # why the champion could not be found when it was last looked for
        self.following: threading.Thread | None = None
        self.taking = threading.Lock()  # while a release is taken from `source`
        if not model_names(source):
            raise UserError(f"{source} holds no model (no */config.pbtxt): run `vismem deploy` first")
        check_repository(source)
        for model, value in self._deployed().items():
            self._copy(model, value)
            self._put(model, value)
            self.served[model] = value

    def follow(self, champion: Callable[[], Path], write: Callable[[str], None]) -> None:
        """Take releases from where `champion` says that it is now; what is served serves on where it is not found."""
        lost = ""
        try:
            source = champion()
            with self.taking:
                self.source = source
        except (UserError, OSError) as error:  # OSError: the disk is full
            lost = str(error)
        if lost != self.lost and lost:
            write(f"the champion is not found: {lost}")
        self.lost = lost

    def start_following(self, champion: Callable[[], Path], write: Callable[[str], None]) -> None:
        """The same in a thread of its own, unless that runs still: to fetch a champion may take minutes."""
        if self.following is None or not self.following.is_alive():
            self.following = threading.Thread(target=self.follow, args=(champion, write), daemon=True)
            self.following.start()

    def update(self, server: TritonServer, write: Callable[[str], None]) -> None:
        """Let `server` load what was deployed since, and say what came of it. UserError where the server exits.

        A model is loaded, and its golden questions asked, while the one before it answers; a new one that fails is
        put back. Challengers that are deployed no more are unloaded once a release answers.
        """
        with self.taking:
            if not (found := self._fresh()):
                return
            try:
                check_repository(self.source)
                for model, value in found.items():
                    self._copy(model, value)
            except (UserError, OSError) as error:  # OSError: it is being replaced
                if not found.values() & self.refused.keys():
                    write(f"not loaded: {error}")
                self.refused |= dict.fromkeys(found.values(), time.monotonic() + RETRY_SECONDS)
                return
            deployed = self._deployed()
        before = set(self.served.values())
        for model, value in sorted(found.items()):
            write(self._load(model, value, server))
        self._drop(before | set(self.served.values()))
        if any(map(_is_release, self.served)):
            for model in [name for name in self.served if not _is_release(name) and name not in deployed]:
                self._put(model, None)
                del self.served[model]

    def _fresh(self) -> dict[str, str]:
        """What was deployed and is neither served nor refused.

        A challenger takes no champion's place, and NAME_unary comes after NAME.
        """
        deployed, now = self._deployed(), time.monotonic()
        released = any(map(_is_release, self.served))
        found = {}
        for model, value in deployed.items():
            base = streaming_name(model)
            fits = base in self.served or not released or _is_release(base)
            if is_unary(model):
                fits = self.served.get(base) == deployed.get(base)
            if fits and self.served.get(model) != value and self.refused.get(value, 0) < now:
                found[model] = value
        return found

    def _deployed(self) -> dict[str, str]:
        """Per model the hash of its manifest; nothing for what is just being replaced."""
        found = {}
        for model in model_names(self.source):
            with suppress(OSError):
                found[model] = sha256_file(self.source / model / MANIFEST)
        return found

    def _load(self, model: str, value: str, server: TritonServer) -> str:
        """Put a release in its place and wait until Triton has loaded it, or failed to; the line that says so.

        Triton also loads the one before again, where a deployment has removed its folder (the files' ctime changes):
        what becomes of a release stands in the log behind the folder that its `model.py` names.
        """
        before, log, copy = self.served.get(model), server.service.log, self.copies / value
        version = max(int(folder.name) for folder in copy.iterdir() if folder.name.isdecimal())
        read = log.stat().st_size
        os.utime(copy)  # Triton loads what is newer than what it has, also where it is an older release
        self._put(model, value)
        end = time.monotonic() + READY_TIMEOUT
        reason = f"it did not load in {READY_TIMEOUT} s"
        verdict = re.compile(rf"(successfully loaded|failed to load) '{re.escape(model)}'\"?$", re.M)
        try:
            while time.monotonic() < end:
                _, _, lines = log.read_bytes()[read:].decode(errors="replace").partition(f"/{value}/{version}")
                said = verdict.search(lines)
                if said and said[1].startswith("success"):
                    self.served[model] = value
                    return f"{model}: the new release answers now"
                if said:
                    reason = find_error([line for line in lines.splitlines() if f"'{model}'" in line])
                    break
                server.service.check()
                time.sleep(POLL)
        finally:
            if self.served.get(model) != value:
                self.refused[value] = math.inf
                self._put(model, before)
                shutil.rmtree(copy)
        return f"{model}: the new release is refused, the one before it serves on: {reason}"

    def _drop(self, kept: Collection[str]) -> None:
        """Delete the copies of other releases: running answers may need that of the one before."""
        for copy in self.copies.iterdir():
            if copy.name not in kept:
                shutil.rmtree(copy)

    def _copy(self, model: str, value: str) -> None:
        """Keep the release `value` of a model, as it is in `source`; a pinned one is served where it is."""
        copy = self.copies / value
        if os.environ.get(MANIFEST_VARIABLE):
            copy.symlink_to((self.source / model).absolute())
        elif not copy.exists():
            partial = self.copies / "partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(self.source / model, partial, copy_function=link_or_copy)
            if sha256_file(partial / MANIFEST) != value:
                raise UserError(f"{self.source} is being replaced")
            partial.rename(copy)

    def _put(self, model: str, value: str | None) -> None:
        """Make `repository/model` a link to the copy of the release `value`, or remove it."""
        link, fresh = self.repository / model, self.copies / "link"
        if value is None:
            link.unlink()
        else:
            fresh.symlink_to(self.copies / value)
            os.replace(fresh, link)


def serve(
    config: Config,
    repository: Path,
    *,
    champion: Callable[[], Path] | None = None,
    log: Path = Path("runs/tritonserver.log"),
    host: str = HOST,
    grpc_port: int | None = None,
    http_port: int | None = None,
    metrics_port: int | None = None,
    certificate: Path | None = None,
    key: Path | None = None,
    write: Callable[[str], None] = print,
) -> None:
    """`vismem serve [--repository DIR] [--host H] [--grpc-port N] [--http-port N] [--metrics-port N]
    [--tls-certificate FILE --tls-key FILE]`; with VISMEM_API_TOKEN, for those who send that token.

    Serves the repository (the CLI's default: artifacts/deploy/model_repository) in the foreground until Ctrl-C or
    SIGTERM; what is deployed there meanwhile is loaded, or what is where `champion` says every CHECK_SECONDS. Ports not
    given are those of the deploy section. A server that fails is restarted; UserError where it cannot start.
    """
    if not repository.is_dir():
        hint = "run `vismem deploy` (or `make demo`) first, or name another with --repository"
        raise UserError(f"{repository} is not there: {hint}")
    check_certificate(certificate, key)
    check_token(own_token())
    tls = (certificate, key) if certificate and key else None
    asked = {"grpc": grpc_port, "http": http_port, "metrics": metrics_port}
    ports = {"grpc": config.deploy.grpc_port, "http": config.deploy.http_port, "metrics": config.deploy.metrics_port}
    ports |= {name: port for name, port in asked.items() if port is not None}
    log.parent.mkdir(parents=True, exist_ok=True)
    for left in log.parent.glob("serving-*"):  # of one that was killed, unless it serves still
        with suppress(UserError, OSError), lock_folder(left):  # it may be another user's
            shutil.rmtree(left)
    with (
        until_stopped(write),
        _own_log(log) as log,
        TemporaryDirectory(prefix="serving-", dir=log.parent) as folder,
        lock_folder(Path(folder)),
    ):
        releases = Releases(repository, Path(folder).absolute())  # links lead there
        while True:
            with triton_server(releases.repository, log=log, host=host, ports=ports, tls=tls) as server:
                ports = dict(server.ports)
                others = f"HTTP port {ports['http']}, metrics port {ports['metrics']}"
                others += f", {'with' if own_token() else 'without'} a token"
                address = f"{'grpcs://' if tls else ''}{server.grpc_url}"
                write(f"serving {', '.join(server.models)} on gRPC {address} ({others})")
                write(f"log: {log}; stop with Ctrl-C")
                try:
                    _watch(server, releases, champion, write)
                except UserError as error:
                    write(f"{error}: the server is restarted")
                    server.service.kill()
            log.replace(log.with_name(f"{log.name}.before"))


@contextmanager
def _own_log(log: Path) -> Iterator[Path]:
    """The log, or LOG-2 and so on where another server writes to it: what Triton says of a release is read there."""
    with ExitStack() as held:
        for number in count(1):
            own = log if number == 1 else log.with_stem(f"{log.stem}-{number}")
            lock = own.with_name(f"{own.name}.lock")
            try:
                held.enter_context(lock_file(lock, str(own)))
            except UserError:
                continue
            held.callback(lock.unlink, missing_ok=True)
            break
        yield own


def _watch(
    server: TritonServer, releases: Releases, champion: Callable[[], Path] | None, write: Callable[[str], None]
) -> None:
    """Ask every model now and then, and load what is deployed. UserError where a model, or the server, has failed."""
    checked = time.monotonic()
    while True:
        server.service.check()
        if time.monotonic() > checked + CHECK_SECONDS:
            for model in filter(is_unary, releases.served):
                question = partial(ask_unary, server.http_url, model, PATIENCE)
                check_model(question, server.metrics_url, streaming_name(model), PATIENCE, server.service.check)
            if champion:
                releases.start_following(champion, write)
            checked = time.monotonic()
        releases.update(server, write)
        time.sleep(POLL)


def _is_release(model: str) -> bool:
    return not is_challenger(streaming_name(model))

"""`vismem api` and `vismem playground`: a model behind the HTTP endpoint, in this process, on the CPU or a GPU."""

import asyncio
import math
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from socket import socket
from threading import Thread

import uvicorn
from starlette.middleware.trustedhost import TrustedHostMiddleware

from vismem.ask import examples
from vismem.errors import UserError
from vismem.generation.torch_executor import TorchExecutor
from vismem.inference import VisMem
from vismem.models.loading import tf32_beside
from vismem.provenance import MANIFEST, sha256_file
from vismem.runtime.access import TOKEN_VARIABLE, own_token
from vismem.services import DRAIN_VARIABLE, HOST, check_certificate, free_ports, until_stopped
from vismem.serving.answering import ROWS, Runtime
from vismem.serving.exchange import check_token
from vismem.serving.guards import Connection
from vismem.serving.http import create_app
from vismem.serving.playground import add_playground
from vismem.serving.request_log import RequestLog
from vismem.sources import find_added

LOOPBACK = {HOST: HOST, "localhost": "localhost", "::1": "[::1]"}  # as browsers send them: no other site has one
CUT_SECONDS = 5  # that their clients get, to be told


def serve_api(
    model: str,
    *,
    base: str | None = None,
    name: str = "vismem",
    device: str | None = None,
    dtype: str | None = None,
    host: str = HOST,
    port: int = 8080,
    rows: int = ROWS,
    max_patches: int,
    cache_mb: int,
    certificate: Path | None = None,
    key: Path | None = None,
    page: bool = False,
    write: Callable[[str], None] = print,
) -> None:
    """Serve until Ctrl-C or SIGTERM. UserError for a model that cannot be loaded, a busy port, half a certificate, and
    where the thread that decodes has ended, so that whatever watches the process starts it again.

    With `page` the playground is at /, for this machine's browsers, without a token.
    """
    token = "" if page else own_token()
    check_certificate(certificate, key)
    check_token(token)
    if rows < 1:
        raise UserError(f"--rows is {rows}: it must be at least 1")
    ports = free_ports({"http": port}, host=host, flag="--port")
    added = find_added(model)  # once: an alias may move, and a bundle is hashed
    loaded = VisMem.from_pretrained(added, device, dtype, base)  # type: ignore[arg-type]  # the command's choices
    runtime = Runtime(TorchExecutor(loaded.model, max_patches, cache_mb * 1_000_000), rows)
    runtime.metrics.show_evaluation(added.parent)
    manifest = added.parent / MANIFEST  # of a bundle
    served = {"version": model, "manifest_sha256": sha256_file(manifest) if manifest.is_file() else ""}
    runtime.log = RequestLog.from_environment(served, runtime.metrics.logged)
    app = create_app(runtime, name, token)
    if page:
        called = f"{model} ({loaded.model.backbone.family})"
        add_playground(app, name, called, examples(), loaded.scope, loaded.model.new_tokens)
    if page or (host in LOOPBACK and not token):
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[host, *LOOPBACK.values()])
    drain = float(os.environ.get(DRAIN_VARIABLE, "5"))
    settings = uvicorn.Config(
        app,
        host=host,
        port=ports["http"],
        log_level="warning",
        ssl_certfile=certificate,
        ssl_keyfile=key,
        http=Connection,
        ws="none",
        timeout_graceful_shutdown=math.ceil(drain) + CUT_SECONDS,
        server_header=False,
    )
    held = str(loaded.model.backbone.model.dtype).removeprefix("torch.")
    with tf32_beside(held), until_stopped(write), closing(runtime):
        named = f"[{host}]" if ":" in host else host
        address = f"{'https' if certificate else 'http'}://{named}:{ports['http']}"
        closed = "with a token" if token else "without a token"
        if not token and host not in LOOPBACK:
            closed += f", to all who reach this machine ({TOKEN_VARIABLE} sets one)"
        line = f"serving {name} ({loaded.model.backbone.family}) on {address}/v1, {closed}"
        said = f"playground: {address}/ (Ctrl-C ends it)" if page else line
        _Server(settings, lambda: write(said), runtime, drain).run()
        raise UserError("the thread that decodes has ended, and the server with it: start it again")


class _Server(uvicorn.Server):
    """A server that calls `ready` once it listens, and ends with the runtime.

    It closes the runtime, in a thread, `drain` seconds after it is told to stop.
    """

    def __init__(self, settings: uvicorn.Config, ready: Callable[[], None], runtime: Runtime, drain: float) -> None:
        super().__init__(settings)
        self.ready, self.runtime, self.drain = ready, runtime, drain

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """UserError where the port was taken while the model was loaded."""
        try:
            await super().startup(sockets)
        except SystemExit:  # uvicorn has logged why
            raise UserError(f"port {self.config.port} cannot be used: choose another with --port") from None
        self.ready()

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop: told to, or nothing decodes any more."""
        return await super().on_tick(counter) or self.runtime.closed

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Wait for running answers; those that are cut off say so to their clients."""
        asyncio.get_running_loop().call_later(self.drain, Thread(target=self.runtime.close).start)
        await super().shutdown(sockets)

"""`vismem api`: a trained model behind the HTTP endpoint, in this process, on the CPU or a GPU."""

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import uvicorn

from vismem.errors import UserError
from vismem.generation.torch_executor import TorchExecutor
from vismem.inference import VisMem
from vismem.services import HOST, free_ports, until_stopped
from vismem.serving.answering import ROWS, Runtime
from vismem.serving.http import create_app

TOKEN_VARIABLE = "VISMEM_API_TOKEN"  # not an option: every user of the machine can read those
END_SECONDS = 5  # that running answers get when the server stops


def serve_api(
    model: str,
    *,
    base: str | None = None,
    name: str = "vismem",
    device: str | None = None,
    dtype: str = "float32",
    host: str = HOST,
    port: int = 8080,
    rows: int = ROWS,
    max_patches: int,
    cache_mb: int,
    certificate: Path | None = None,
    key: Path | None = None,
    write: Callable[[str], None] = print,
) -> None:
    """Serve until Ctrl-C or SIGTERM. UserError for a model that cannot be loaded, a busy port, half a certificate."""
    if (certificate is None) != (key is None):
        raise UserError("TLS needs both --tls-certificate and --tls-key")
    for file in (certificate, key):
        if file and not file.is_file():
            raise UserError(f"{file} is not there")
    ports = free_ports({"http": port}, host=host, flag="--port")
    loaded = VisMem.from_pretrained(model, device, dtype, base)  # type: ignore[arg-type]  # the command's choices
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    runtime = Runtime(TorchExecutor(loaded.model, max_patches, cache_mb * 1_000_000), rows)
    app = create_app(runtime, name, token)
    settings = uvicorn.Config(
        app,
        host=host,
        port=ports["http"],
        log_level="warning",
        ssl_certfile=certificate,
        ssl_keyfile=key,
        timeout_graceful_shutdown=END_SECONDS,
        server_header=False,
    )
    with until_stopped(write), closing(runtime):
        scheme, closed = "https" if certificate else "http", "with a token" if token else "without a token"
        write(f"serving {name} ({loaded.model.backbone.family}) on {scheme}://{host}:{ports['http']}/v1, {closed}")
        uvicorn.Server(settings).run()

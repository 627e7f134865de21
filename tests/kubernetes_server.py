"""What stand-ins of the Kubernetes API share: JSON answers over HTTP, and the kubeconfig that leads to them."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import yaml


class JsonAnswers(BaseHTTPRequestHandler):
    """What every handler of such requests has."""

    def answer(self, body: Mapping[str, Any], status: int = 200) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def kubernetes_server(handler: type[JsonAnswers], cluster: object, folder: Path, **context: str) -> Iterator[Path]:
    """Serve `cluster`, which the handler finds as its own, and write the kubeconfig with that context: its file."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"cluster": cluster}))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    there = {"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
    context = {"cluster": "here", "user": "me", **context}
    config = {"apiVersion": "v1", "kind": "Config", "current-context": "here", "clusters": [there],
              "contexts": [{"name": "here", "context": context}], "users": [{"name": "me", "user": {}}]}  # fmt: skip
    (folder / "kubeconfig").write_text(yaml.safe_dump(config))
    try:
        yield folder / "kubeconfig"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

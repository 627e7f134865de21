"""Asks a running server a question, as a health check: `python -m vismem.serving.probe`, for Kubernetes and the like.

Triton reports a model ready for ever, also when the Python process behind it has died.
"""

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Sequence

from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from vismem.config import Config
from vismem.errors import UserError
from vismem.runtime.access import own_token
from vismem.serving.client import own_client
from vismem.serving.command import run_command
from vismem.serving.exchange import Answer, UnauthorizedError, encoded

BLANK = encoded(Image.new("RGB", (84, 84), "white"))
DEAD = "is not healthy"  # what Triton says of a model whose process has ended


def ask(url: str, model: str, timeout: float) -> Answer:
    """One token about a blank image from `model` at `url` (gRPC host:port). UserError if none comes in `timeout` s."""
    return own_client(url, model, timeout).ask(BLANK, "?", max_new_tokens=1)


def ask_unary(url: str, model: str, timeout: float) -> None:
    """The same of a unary model at `url` (HTTP), which asks the one behind it: both processes are proved by it."""
    body = {"IMAGE": [b64encode(BLANK).decode()], "PROMPT": "?", "MAX_NEW_TOKENS": 1}
    if token := own_token():
        body["authorization"] = f"Bearer {token}"  # Triton passes no header of /generate on (server issue 8790)
    try:
        urllib.request.urlopen(f"{url}/v2/models/{model}/generate", json.dumps(body).encode(), timeout=timeout).close()
    except urllib.error.HTTPError as error:
        raise UserError(f"model '{model}' at {url}: {error.read().decode(errors='replace')}") from None
    except OSError as error:
        raise UserError(f"model '{model}' at {url} sent nothing: {error}") from None


def probe(config: Config, url: str, metrics: str, timeout: float) -> str:
    """Report the state of the served model (or of its challenger): see `check_model`."""
    model = own_client(url, timeout=10).find_model(config.deploy.model_name)
    return check_model(lambda: ask(url, model, timeout), metrics, model, timeout)


def check_model(
    question: Callable[[], object],
    metrics: str,
    model: str,
    timeout: float,
    alive: Callable[[], object] = lambda: None,
) -> str:
    """Say that `model` answers a question, or is busy: its queue is full or slow, and it decodes tokens for others.

    UserError where neither comes in `timeout` seconds, its process has ended, or `alive` raises it for the server's; a
    restart helps it. Metrics that cannot be read just now prove nothing.
    """
    end = time.monotonic() + timeout
    before = _decoded(metrics, model)
    try:
        question()
    except UserError as error:
        if DEAD in str(error) or isinstance(error, UnauthorizedError):
            raise
        while True:
            alive()
            now = _decoded(metrics, model)
            before = now if before is None else before
            if now is not None and before is not None and now > before:
                return f"{model} is busy: it decoded {now - before} tokens for others while we waited"
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
    return f"{model} answers"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line; return 0 if the model is well, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m vismem.serving.probe", description=__doc__)
    parser.add_argument("--url", default="127.0.0.1:8001", help="of gRPC, grpcs:// with TLS (default: %(default)s)")
    parser.add_argument("--metrics", default="http://127.0.0.1:8002/metrics", help="(default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds to wait for the answer (default: 20)")
    return run_command(parser, arguments, probe)


def _decoded(url: str, model: str) -> int | None:
    """How many tokens a model has decoded since the server's start; None where that cannot be read."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            text = response.read().decode()
    except OSError:  # URLError is one
        return None
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return round(sum(s.value for s in samples if s.name == "vismem_tokens_total" and s.labels.get("model") == model))


if __name__ == "__main__":
    sys.exit(main())

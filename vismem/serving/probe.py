"""Asks a running server a question, as a health check: `python -m vismem.serving.probe`, for Kubernetes and the like.

Triton reports a model ready for ever, also when the Python process behind it has died.
"""

import argparse
import io
import re
import sys
import time
import urllib.request
from collections.abc import Sequence

from PIL import Image

from vismem.config import Config
from vismem.errors import UserError
from vismem.serving.client import Token, find_model, infer
from vismem.serving.command import run_command


def ask(url: str, model: str, timeout: float) -> tuple[Token, ...]:
    """One token about a blank image from `model` at `url` (gRPC host:port). UserError if none comes in `timeout` s."""
    blank = io.BytesIO()
    Image.new("RGB", (84, 84), "white").save(blank, "PNG")
    return tuple(infer(url, model, [blank.getvalue()], "?", max_new_tokens=1, timeout=timeout))


def probe(config: Config, url: str, metrics: str, timeout: float) -> str:
    """Report the state of the served model (or of its challenger): see `check_model`."""
    return check_model(url, metrics, find_model(url, config.deploy.model_name), timeout)


def check_model(url: str, metrics: str, model: str, timeout: float) -> str:
    """Say that `model` answers, or is busy: its queue is full or slow, and it decodes tokens for others meanwhile.

    UserError where neither comes in `timeout` seconds; a restart helps it.
    """
    end = time.monotonic() + timeout
    before = _decoded(metrics, model)
    try:
        ask(url, model, timeout)
    except UserError:
        while (others := _decoded(metrics, model) - before) <= 0:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
        return f"{model} is busy: it decoded {others} tokens for others while we waited"
    return f"{model} answers"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line; return 0 if the model is well, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m vismem.serving.probe", description=__doc__)
    parser.add_argument("--url", default="127.0.0.1:8001", help="gRPC host:port (default: %(default)s)")
    parser.add_argument("--metrics", default="http://127.0.0.1:8002/metrics", help="(default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds to wait for the answer (default: 20)")
    return run_command(parser, arguments, probe)


def _decoded(url: str, model: str) -> int:
    """How many tokens a model has decoded since the server's start."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            text = response.read().decode()
    except OSError as error:  # URLError is one
        raise UserError(f"the server's metrics at {url} cannot be read: {error}") from None
    counts = re.findall(
        rf'^vismem_tokens_total\{{(?=[^}}]*model="{re.escape(model)}")[^}}]*\}} (\d+)', text, re.MULTILINE
    )
    return sum(map(int, counts))


if __name__ == "__main__":
    sys.exit(main())

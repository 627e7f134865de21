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
from vismem.serving.client import Client
from vismem.serving.command import run_command
from vismem.serving.exchange import Answer


def ask(url: str, model: str, timeout: float) -> Answer:
    """One token about a blank image from `model` at `url` (gRPC host:port). UserError if none comes in `timeout` s."""
    blank = io.BytesIO()
    Image.new("RGB", (84, 84), "white").save(blank, "PNG")
    return Client(f"grpc://{url}", model=model, timeout=timeout).ask(blank.getvalue(), "?", max_new_tokens=1)


def probe(config: Config, url: str, metrics: str, timeout: float) -> str:
    """Report the state of the served model (or of its challenger): it answers, or is busy. UserError if neither.

    A server is busy if in `timeout` seconds it began questions of others, but not ours or refused ours because its
    queue is full; a restart would not help it. A dead server may take up our own question, so one alone proves nothing.
    """
    end = time.monotonic() + timeout
    before = _executions(metrics)
    model = Client(f"grpc://{url}", timeout=10).find_model(config.deploy.model_name)
    try:
        ask(url, model, timeout)
    except UserError:
        while (others := _executions(metrics) - before) <= 1:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
        return f"{model} is busy: it began {others} questions while ours waited"
    return f"{model} answers"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line; return 0 if the model is well, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m vismem.serving.probe", description=__doc__)
    parser.add_argument("--url", default="127.0.0.1:8001", help="gRPC host:port (default: %(default)s)")
    parser.add_argument("--metrics", default="http://127.0.0.1:8002/metrics", help="(default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds to wait for the answer (default: 20)")
    return run_command(parser, arguments, probe)


def _executions(url: str) -> int:
    """How many questions the server's models have taken up since its start."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            text = response.read().decode()
    except OSError as error:  # URLError is one
        raise UserError(f"the server's metrics at {url} cannot be read: {error}") from None
    return sum(int(count) for count in re.findall(r"^nv_inference_exec_count\{[^}]*\} (\d+)", text, re.MULTILINE))


if __name__ == "__main__":
    sys.exit(main())

"""Asks a running server a question, as a health check: `python -m vismem.serving.probe`, for Kubernetes and the like.

Triton reports a model ready for ever, also when the Python process behind it has died.
"""

import argparse
import io
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence

from PIL import Image

from vismem.errors import UserError
from vismem.serving.client import Token, find_model, infer

_EXECUTIONS = re.compile(r"^nv_inference_exec_count\{[^}]*\} (\d+)", re.MULTILINE)


def ask(url: str, model: str, timeout: float) -> tuple[Token, ...]:
    """One token about a blank image from `model` at `url` (gRPC host:port). UserError if none comes in `timeout` s."""
    blank = io.BytesIO()
    Image.new("RGB", (84, 84), "white").save(blank, "PNG")
    return tuple(infer(url, model, [blank.getvalue()], "?", max_new_tokens=1, timeout=timeout))


def probe(url: str, metrics_url: str, name: str, timeout: float) -> str:
    """Say how the model `name` (or its challenger) is: it answers, or is busy. UserError if it is neither.

    Busy is a server that did not come to our question in `timeout` seconds, but to others: to be restarted would not
    help it. A dead one may take up our own question, so a single one shows nothing.
    """
    before = _executions(metrics_url)
    model = find_model(url, name)
    try:
        ask(url, model, timeout)
    except UserError:
        if (others := _executions(metrics_url) - before) > 1:
            return f"{model} is busy: {others} questions were taken up in {timeout:g} s, ours has not been answered yet"
        raise
    return f"{model} answers"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line; return 0 if the model is well, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m vismem.serving.probe", description=__doc__)
    parser.add_argument("--url", default="127.0.0.1:8001", help="gRPC host:port (default: %(default)s)")
    parser.add_argument("--metrics", default="http://127.0.0.1:8002/metrics", help="(default: %(default)s)")
    parser.add_argument("--model", default="vismem", help="its name, or its challenger's (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds to wait for the answer (default: 20)")
    options = parser.parse_args(arguments)
    try:
        print(probe(options.url, options.metrics, options.model, options.timeout))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _executions(metrics_url: str) -> int:
    """How many questions the server's models have taken up since its start."""
    try:
        with urllib.request.urlopen(metrics_url, timeout=5) as response:
            text = response.read().decode()
    except (urllib.error.URLError, OSError) as error:
        raise UserError(f"the server's metrics at {metrics_url} cannot be read: {error}") from None
    return sum(int(count) for count in _EXECUTIONS.findall(text))


if __name__ == "__main__":
    sys.exit(main())

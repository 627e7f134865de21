"""How long a malformed request takes to be refused, and how much it delays an answer that is being decoded.

    export PYTHONPATH=.:tests:tests/integration:tests/e2e
    OMP_WAIT_POLICY=passive python benchmarks/refusals.py [--repeats 3] [--json FILE]

The requests are those of tests/malformed.py, over HTTP (`vismem api`) and Triton's gRPC. Times run from before the
request's first byte is sent, so that the upload counts too.
"""

import json
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import test_http_malformed as over_http
import test_triton_malformed as over_grpc
from abuse import served
from common import parser, publish, questions, table
from http_calls import post
from malformed import MALFORMED

from vismem.serving.client import Client


def requests(kind: str, address: str) -> dict[str, Callable[[], Any]]:
    """Every malformed request, by name, as a call that returns when it is refused."""
    if kind == "api":
        bodies: dict[str, Any] = {name: over_http.body_of(request) for name, request in MALFORMED.items()}
        bodies |= {name: body for name, (_, body, _) in over_http.WRONG.items()}
        files = {name: body if isinstance(body, bytes) else json.dumps(body).encode() for name, body in bodies.items()}
        return {name: partial(post, address, file) for name, file in files.items()}
    server: Any = SimpleNamespace(grpc_url=address.removeprefix("grpc://"))
    inputs = {name: (over_grpc.inputs_of(request), {}) for name, request in MALFORMED.items()}
    inputs |= {name: (tensors, types) for name, (tensors, types, _) in over_grpc.WRONG.items()}
    return {name: partial(over_grpc.ask, server, tensors, **types) for name, (tensors, types) in inputs.items()}


def gaps(client: Client, found: list[float], stop: threading.Event) -> None:
    """Ask until `stop`, and note the seconds between the words of the answers."""
    sample = questions(1)[0]
    while not stop.is_set():
        before = None
        for piece in client.stream(sample.images, sample.question, memory="off"):
            now = time.perf_counter()
            if before is not None and piece.event == "token":
                found.append(now - before)
            before = now


def while_asked(address: str, work: Callable[[], None]) -> float:
    """The longest seconds between two words of an answer while `work` runs."""
    found, stop = list[float](), threading.Event()
    asking = threading.Thread(target=gaps, args=(Client(address, timeout=120), found, stop))
    asking.start()
    try:
        time.sleep(1)
        found.clear()
        work()
    finally:
        stop.set()
        asking.join()
    return max(found)


def main() -> None:
    """Send, measure, print."""
    args = parser(__doc__, repeats=(3, "times that each request is sent")).parse_args()
    figures, rows = dict[str, Any](), []
    for kind in ("api", "triton"):
        with tempfile.TemporaryDirectory() as scratch, served(kind, Path(scratch), "vismem_challenger") as (address, _):
            calls = requests(kind, address)
            took: dict[str, list[float]] = {name: [] for name in calls}

            def refuse(calls: dict[str, Callable[[], Any]] = calls, took: dict[str, list[float]] = took) -> None:
                for name, call in calls.items():
                    started = time.perf_counter()
                    call()
                    took[name].append(time.perf_counter() - started)

            refuse()  # untimed: connections, imports
            for times in took.values():
                times.clear()
            alone = while_asked(address, lambda: time.sleep(5))
            beside = while_asked(address, lambda: [refuse() for _ in range(args.repeats)] and None)
            for _ in range(args.repeats):
                refuse()
        alone_times = {name: min(times) for name, times in took.items()}
        slowest = sorted(alone_times, key=alone_times.__getitem__)[-3:]
        figures[kind] = {
            "requests": len(calls),
            "milliseconds_median": round(1e3 * float(np.median(list(alone_times.values()))), 1),
            "milliseconds_max": round(1e3 * max(alone_times.values()), 1),
            "slowest": ", ".join(f"{name} {1e3 * alone_times[name]:.1f}" for name in slowest),
            "gap_alone": round(1e3 * alone, 1),
            "gap_beside": round(1e3 * beside, 1),
        }
        rows.append(" | ".join(map(str, [kind, *figures[kind].values()])))
    header = "server | requests | median, ms | slowest, ms | which | longest gap of an answer, ms | beside refusals, ms"
    publish(figures, table(header, rows), args.json)


if __name__ == "__main__":
    main()

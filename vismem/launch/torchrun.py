"""Several processes on this machine, one per GPU: torchrun's elastic agent, and the error files of its processes."""

import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig as AgentConfig
from torch.distributed.launcher.api import elastic_launch

from vismem.errors import UserError
from vismem.services import environment, exit_on_sigterm


def run_processes(num_processes: int, function: Callable[..., str], *arguments: Any) -> str:
    """Run the function in each of `num_processes` new processes; return what rank 0 returns.

    UserError with the reason of the process that failed first. SIGTERM ends all of them, then this process.
    """
    agent = AgentConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=num_processes, max_restarts=0, run_id="vismem",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", signals_to_handle="SIGTERM",
    )  # fmt: skip
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it would print what is raised below
    with environment(process_environment()), exit_on_sigterm():  # the agent leaves its handler behind
        try:
            results: dict[int, str] = elastic_launch(agent, function)(*arguments)
        except ChildFailedError as error:
            raise UserError(_first_reason(list(error.failures.values()))) from None
        except SignalException as error:
            sys.exit(128 + error.sigval)
    return results[0]


def process_environment() -> dict[str, str]:
    """What several processes on one machine need in their environment; what is set already stays."""
    wanted = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    if not torch.cuda.is_available():
        wanted |= {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def reason_of(logs: Path, tail: Sequence[str]) -> str:
    """Why a torchrun failed that kept its error files below `logs`; without any, the end of its log."""
    text = "\n".join(tail)
    if killed := re.search(r"exitcode +: -(?!15\b)(\d+)", text):  # torchrun's report; 15: what it does to the others
        return _killed(int(killed[1]))
    errors = [json.loads(file.read_text())["message"] for file in logs.rglob("error.json")]
    return _first_message(errors) if errors else "the end of its log: " + "\n".join(tail[-20:])


def _first_reason(failures: Sequence[ProcessFailure]) -> str:
    for failure in failures:
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
            return _killed(-failure.exitcode)
    return _first_message([failure.message for failure in failures])


def _first_message(messages: Sequence[Any]) -> str:
    """The first UserError, else the first exception: the others often only say that their peer is gone."""
    written = [message for message in messages if isinstance(message, dict)]
    if not written:
        return str(messages[0])
    written.sort(key=lambda said: (not said["message"].startswith("UserError"), float(said["extraInfo"]["timestamp"])))
    text: str = written[0]["message"]
    if not text.startswith("UserError"):
        print(written[0]["extraInfo"]["py_callstack"], file=sys.stderr)
    return text.removeprefix("UserError: ")


def _killed(number: int) -> str:
    return f"a process was killed by signal {number} (9: often out of memory). Launch again to resume"

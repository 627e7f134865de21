"""Several processes on this machine, one for each GPU, through `accelerate launch`."""

import os
import subprocess
import sys
from collections import deque
from pathlib import Path

import torch

TAIL = 200  # lines of the log that are kept: torchrun reports at its end on every process
WORKER = ("-m", "vismem.launch.worker")


def run_on_this_machine(desk: Path, num_processes: int) -> tuple[bool, str]:
    """Run the job on the desk; returns whether it succeeded, and the end of its log, all of which goes to stderr."""
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--num_machines", "1", "--num_processes", str(num_processes), "--main_process_port", "0"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *(["--multi_gpu"] if num_processes > 1 else []),  # also on the CPU: with --cpu it would start only one
        *(*WORKER, str(desk)),
    ]
    tail: deque[str] = deque(maxlen=TAIL)
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", env=worker_environment(),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", file=sys.stderr, flush=True)
            tail.append(line)
    return process.returncode == 0, "".join(tail)


def worker_environment() -> dict[str, str]:
    """This process's environment, and what several processes on one machine need beside it."""
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **os.environ}
    if not torch.cuda.is_available():
        environment |= {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    return environment

"""The processes that share a step, as torchrun starts them: which one this is, and how they wait for each other."""

import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from vismem.errors import UserError

PR_SET_PDEATHSIG = 1  # of prctl(2)
PATIENCE = timedelta(
    hours=12
)  # while the first process hashes, saves or asks a judge; when one dies, torchrun ends all


@dataclass(frozen=True)
class Ranks:
    """All processes of a step. Alone, nothing waits; `state` is accelerate's where there are several."""

    state: Any = None

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def leave(self) -> None:
        """Wait once more, then end the process group."""
        if self.state is not None:
            self.wait()
            self.state.destroy_process_group()


def is_rank() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_main_rank() -> bool:
    """Whether this process is the only one, or the first of several: who writes what only one may write."""
    return os.environ.get("RANK", "0") == "0"


def share_of_work(accelerator: Any, together: int) -> tuple[int, int]:
    """Which share of a step's work this process of accelerate's has, and of how many; `together` have the same one."""
    return accelerator.process_index // together, accelerator.num_processes // together


def join_ranks() -> Ranks:
    """Meet the other processes. UserError if they are not as many as torchrun said, or share GPUs.

    If torchrun's agent dies, so does this process, however busy: a second launch must not find it at work.
    """
    if not is_rank():
        return Ranks()
    import torch
    from accelerate import PartialState

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    gpus, here = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if 0 < gpus < here:
        raise UserError(f"{here} processes on a machine with {gpus} GPUs: ask for one process per GPU")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    state = PartialState(cpu=gpus == 0, timeout=PATIENCE)
    if state.num_processes != int(os.environ["WORLD_SIZE"]):
        raise UserError(f"{os.environ['WORLD_SIZE']} processes were started, and {state.num_processes} run together")
    return Ranks(state)

"""One process of those that run a step together: `python -m vismem.launch.worker DESK`, started by torchrun's agent."""

import os
import signal
import sys
import threading
from pathlib import Path

import torch
from accelerate import PartialState

from vismem.config import parse_config
from vismem.errors import UserError
from vismem.launch.desk import LINE, LOCK, Job, leave_reason, wait_for_unlocking
from vismem.steps import BY_NAME


def main(desk: Path) -> None:
    """Do this process's part of the job on the desk. What goes wrong is left there as well as raised."""
    if (desk / LOCK).is_file():  # else the launcher is on another machine, and whoever runs us sees to that
        threading.Thread(target=_end_with_launcher, args=(desk,), daemon=True).start()
    try:
        run(Job.read(desk), desk)
    except Exception as error:
        leave_reason(desk, str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
        raise


def run(job: Job, desk: Path) -> None:
    """Run the step with the other processes. UserError if there are not as many as the job says, or too few GPUs."""
    gpus, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if 0 < gpus < here:
        raise UserError(f"{here} processes on a machine with {gpus} GPUs: ask for one process a GPU")
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.num_processes != job.world_size:
        raise UserError(f"{job.world_size} processes were asked for, and {state.num_processes} run together")
    config = parse_config(job.config, "the launcher's job")
    inputs = {name: Path(folder) for name, folder in job.inputs.items()}
    line = BY_NAME[job.step].load()(config, inputs, Path(job.out))
    if state.is_main_process:
        (desk / LINE).write_text(line)
    state.wait_for_everyone()
    state.destroy_process_group()


def _end_with_launcher(desk: Path) -> None:
    wait_for_unlocking(desk)
    os.kill(os.getpid(), signal.SIGKILL)  # however busy: a second launch must find no one at work


if __name__ == "__main__":
    main(Path(sys.argv[1]))

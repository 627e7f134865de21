"""Kubeflow Trainer: the only file that imports its SDK (`kubeflow` 0.5, API trainer.kubeflow.org/v1alpha1).

On a cluster, one pod per node and torchrun in each; without one, the SDK's local process back end. Each process runs
the step as `vismem STEP` would.
"""

import os
import shlex
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kubeflow.trainer import (
    CustomTrainer,
    CustomTrainerContainer,
    KubernetesBackendConfig,
    LocalProcessBackendConfig,
    TrainerClient,
)
from kubeflow.trainer.backends.localprocess import constants as local
from kubeflow.trainer.constants import constants
from kubeflow.trainer.options import (
    ActiveDeadlineSeconds,
    ContainerPatch,
    JobSetSpecPatch,
    JobSetTemplatePatch,
    JobSpecPatch,
    JobTemplatePatch,
    Labels,
    Name,
    PodSpecPatch,
    PodTemplatePatch,
    ReplicatedJobPatch,
    RuntimePatch,
    TrainerCommand,
    TrainingRuntimeSpecPatch,
)
from kubernetes.config import ConfigException  # type: ignore[import-untyped]

from vismem.config import Config
from vismem.errors import UserError
from vismem.files import write_text
from vismem.launch.config import LaunchConfig
from vismem.launch.torchrun import process_environment, reason_of
from vismem.params_file import render_params
from vismem.services import exit_on_sigterm

POLL = 5.0  # seconds between looks at a job
PATIENCE = 60  # consecutive looks that may fail before the job is given up: the API server may be restarting
TAIL = 200  # lines of the log that are kept: torchrun reports on every process at its end
VOLUME = "shared"  # its name within a pod; a volume of that name in the runtime is replaced
TORCHRUN = ("-m", "torch.distributed.run")

# --- this machine ----------------------------------------------------------------------------------------------------


def run_locally(
    launch: LaunchConfig, name: str, config: Config, artifacts: Path, inputs: Mapping[str, Path] | None
) -> str:
    """Run the step through the local process back end; returns its line. UserError with the reason if it fails.

    By default that back end builds a virtual environment for each job, without torchrun; its jobs get ours.
    """
    with TemporaryDirectory(prefix="vismem-") as folder:
        logs = Path(folder) / "logs"
        options = ("--standalone", "--nproc-per-node", str(launch.num_processes), "--log-dir", str(logs))
        local.TORCH_COMMAND = shlex.join(("/usr/bin/env", sys.executable, *TORCHRUN, *options))
        local.LOCAL_EXEC_JOB_TEMPLATE = "trap 'rm -rf \"$PYENV_LOCATION\"' EXIT\n$ENTRYPOINT"
        client = TrainerClient(LocalProcessBackendConfig())
        arguments = step_arguments(name, config, artifacts, inputs, Path(folder) / "params.yaml")
        environment = {**os.environ, **process_environment()}
        trainer = CustomTrainer(func=_run_cli, func_args={"arguments": arguments}, env=environment)
        job = client.train(runtime=constants.DEFAULT_TRAINING_RUNTIME, trainer=trainer)
        tail = deque(client.get_job_logs(job, follow=True), TAIL)  # prints them, too
        ended = {constants.TRAINJOB_COMPLETE, constants.TRAINJOB_FAILED}  # a failed job raises nothing
        status = client.wait_for_job_status(job, ended, polling_interval=1).status
        client.delete_job(job)
        return _line(name, status == constants.TRAINJOB_COMPLETE, logs, list(tail))


def step_arguments(
    name: str, config: Config, artifacts: Path, inputs: Mapping[str, Path] | None, params: Path
) -> list[str]:
    """The arguments of `vismem` that run the step in one process of several; writes its parameters to `params`."""
    write_text(params, render_params(config))
    folders = [f"--input={needed}={folder.absolute()}" for needed, folder in (inputs or {}).items()]
    return [name, f"--params={params}", f"--artifacts={artifacts.absolute()}", "--processes=1", *folders]


def _run_cli(parameters: dict[str, list[str]]) -> None:
    """Run in every process; the back end copies this function's source, so it names nothing of this file."""
    import runpy
    import sys

    sys.argv[1:] = parameters["arguments"]
    runpy.run_module("vismem.cli", run_name="__main__")


def _line(name: str, succeeded: bool, logs: Path, tail: Sequence[str]) -> str:
    """The line that the step printed. UserError with the reason where it failed."""
    if not succeeded:
        raise UserError(reason_of(logs, tail))
    printed = [line for line in tail if line.startswith(f"{name}: ")]
    return printed[-1] if printed else f"{name}: done"


# --- a cluster -------------------------------------------------------------------------------------------------------


def run_on_cluster(
    launch: LaunchConfig, name: str, config: Config, place: Path, inputs: Mapping[str, Path] | None
) -> str:
    """Run the step in `place` on the shared volume, as a TrainJob of that folder's name; returns its line.

    A job of that name that is still running, left by a launcher that was killed, is joined. However this ends, the job
    is deleted. UserError where a process fails (with its reason), or where the cluster, or Trainer on it, does not
    answer or refuses.
    """
    logs = place / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    torchrun = ("--nnodes", launch.num_nodes, "--nproc-per-node", launch.num_processes, "--log-dir", logs)
    arguments = step_arguments(name, config, place, inputs, place / "params.yaml")
    command = ["python", *TORCHRUN, *map(str, torchrun), "-m", "vismem.cli", *arguments]
    succeeded, tail = run_job(place.name, command, launch)
    return _line(name, succeeded, logs, tail)


def run_job(name: str, command: list[str], launch: LaunchConfig) -> tuple[bool, list[str]]:
    """Run the command on every node as the TrainJob `name`; returns whether it succeeded, and the end of node 0's log.

    UserError as from `run_on_cluster`.
    """
    try:
        client = TrainerClient(KubernetesBackendConfig(namespace=launch.namespace))
        status = _status(client, name)
        if status == constants.TRAINJOB_FAILED:
            _delete(client, name)
            status = None
        with exit_on_sigterm():  # so that the nodes are given back
            try:
                if status is None:
                    client.train(launch.runtime, trainer=_container(launch), options=_options(name, command, launch))
                return _follow(client, name)
            finally:
                _delete(client, name)
    except (RuntimeError, TimeoutError, ConfigException) as error:
        reason = getattr(error.__cause__, "reason", None)
        raise UserError(
            f"Kubeflow Trainer, namespace {launch.namespace}: {error}{f' ({reason})' if reason else ''}; "
            "deploy/kubernetes/README.md says what the cluster must have"
        ) from error


def _container(launch: LaunchConfig) -> CustomTrainerContainer:
    resources = {name: str(amount) for name, amount in launch.resources.items()} or None
    return CustomTrainerContainer(launch.image, num_nodes=launch.num_nodes, resources_per_node=resources)


def _options(name: str, command: list[str], launch: LaunchConfig) -> list[Any]:
    """What the SDK's trainer cannot say: the command, the shared volume, where pods may run, how long.

    PET_* variables, which the controller sets, tell torchrun of the other nodes. Nodes get no secrets: all that they
    read lies on the shared volume. Should they need one, it goes into the runtime, since no patch may set a node's env.
    """
    pod = PodSpecPatch(
        volumes=[{"name": VOLUME, "persistentVolumeClaim": {"claimName": launch.claim}}],
        containers=[
            ContainerPatch(constants.NODE, volume_mounts=[{"name": VOLUME, "mountPath": str(launch.shared)}]),
        ],
        node_selector=dict(launch.node_selector) or None,
        tolerations=[dict(toleration) for toleration in launch.tolerations] or None,
    )
    job = JobTemplatePatch(spec=JobSpecPatch(template=PodTemplatePatch(spec=pod)))
    job_set = JobSetTemplatePatch(spec=JobSetSpecPatch([ReplicatedJobPatch(constants.NODE, job)]))
    return [
        Name(name),
        Labels({"app.kubernetes.io/part-of": "vismem", "app.kubernetes.io/component": "training"}),
        TrainerCommand(command),
        ActiveDeadlineSeconds(round(launch.hours * 3600)),
        RuntimePatch(TrainingRuntimeSpecPatch(job_set)),
    ]


def _follow(client: TrainerClient, name: str) -> tuple[bool, list[str]]:
    """Print node 0's log until the job has ended."""
    tail: deque[str] = deque(maxlen=TAIL)
    seen = failures = 0
    while True:
        try:
            status = client.get_job(name).status
            ended = status in (constants.TRAINJOB_COMPLETE, constants.TRAINJOB_FAILED)
            for line in _rest(client.get_job_logs(name, follow=not ended), seen):
                print(line, file=sys.stderr, flush=True)
                tail.append(line)
                seen += 1
            failures = 0
        except (RuntimeError, TimeoutError) as error:  # also where a container has not begun to write its log
            failures += 1
            if failures > PATIENCE:
                raise
            print(f"{name}: {error}; looking again", file=sys.stderr, flush=True)
            ended = False
        if ended:
            return status == constants.TRAINJOB_COMPLETE, list(tail)
        time.sleep(POLL)


def _rest(lines: Iterator[str], seen: int) -> Iterator[str]:
    """The lines behind those seen before: a log that was cut off is read again from its start."""
    return (line for number, line in enumerate(lines) if number >= seen)


def _status(client: TrainerClient, name: str) -> str | None:
    """None if there is no such job."""
    try:
        status: str = client.get_job(name).status
    except RuntimeError as error:
        if getattr(error.__cause__, "status", None) == 404:
            return None
        raise
    return status


def _delete(client: TrainerClient, name: str) -> None:
    """Delete the job if it is there, and wait until it is gone."""
    if _status(client, name) is None:
        return
    client.delete_job(name)
    for _ in range(PATIENCE):
        if _status(client, name) is None:
            return
        time.sleep(POLL)

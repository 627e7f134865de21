"""Kubeflow Trainer: the only file that imports its SDK (`kubeflow` 0.5, API trainer.kubeflow.org/v1alpha1).

On a cluster, one pod a node and torchrun in each; without one, the SDK's local process back end.
"""

import shlex
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
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

from vismem.errors import UserError
from vismem.launch.how import How
from vismem.launch.machine import TAIL, WORKER, worker_environment
from vismem.services import exit_on_sigterm

POLL = 5.0  # seconds between looks at a job
PATIENCE = 60  # looks in a row that may fail before the job is given up: the API server may be restarting
VOLUME = "shared"  # its name within a pod; a volume of that name in the runtime is replaced
TORCHRUN = ("-m", "torch.distributed.run")

# --- this machine ----------------------------------------------------------------------------------------------------


def run_locally(desk: Path, num_processes: int) -> tuple[bool, str]:
    """Run the job on the desk through the local process back end; returns whether it succeeded, and its log's end.

    By default that back end builds a virtual environment for each job, without torchrun; its jobs get ours.
    """
    here = (sys.executable, *TORCHRUN, "--standalone", "--nproc-per-node", str(num_processes))
    local.TORCH_COMMAND = shlex.join(("/usr/bin/env", *here))
    local.LOCAL_EXEC_JOB_TEMPLATE = "trap 'rm -rf \"$PYENV_LOCATION\"' EXIT\n$ENTRYPOINT"
    client = TrainerClient(LocalProcessBackendConfig())
    trainer = CustomTrainer(func=_work, func_args={"desk": str(desk)}, env=worker_environment())
    name = client.train(runtime=constants.DEFAULT_TRAINING_RUNTIME, trainer=trainer)
    tail = deque(client.get_job_logs(name, follow=True), TAIL)  # prints them, too
    ended = {constants.TRAINJOB_COMPLETE, constants.TRAINJOB_FAILED}  # a failed job raises nothing
    status = client.wait_for_job_status(name, ended, polling_interval=1).status
    client.delete_job(name)
    return status == constants.TRAINJOB_COMPLETE, "\n".join(tail)


def _work(parameters: dict[str, str]) -> None:
    """Run in every process; the back end copies this function's source, so it names nothing of this file."""
    from pathlib import Path

    from vismem.launch.worker import main

    main(Path(parameters["desk"]))


# --- a cluster -------------------------------------------------------------------------------------------------------


def run_on_cluster(name: str, desk: Path, how: How) -> tuple[bool, str]:
    """Run the job on the desk as the TrainJob `name`; returns whether it succeeded, and the end of node 0's log.

    A job of that name that is still at work, left by a launcher that was killed, is joined. However this ends, the job
    is deleted. UserError where the cluster, or Trainer on it, does not answer or refuses.
    """
    try:
        client = TrainerClient(KubernetesBackendConfig(namespace=how.namespace))
        status = _status(client, name)
        if status == constants.TRAINJOB_FAILED:
            _delete(client, name)
            status = None
        with exit_on_sigterm():  # so that the nodes are given back
            try:
                if status is None:
                    client.train(how.runtime, trainer=_container(how), options=_options(name, desk, how))
                return _follow(client, name)
            finally:
                _delete(client, name)
    except (RuntimeError, TimeoutError, ConfigException) as error:
        reason = getattr(error.__cause__, "reason", None)
        raise UserError(
            f"Kubeflow Trainer, namespace {how.namespace}: {error}{f' ({reason})' if reason else ''}; "
            "deploy/kubernetes/README.md says what the cluster must have"
        ) from error


def _container(how: How) -> CustomTrainerContainer:
    resources = {name: str(amount) for name, amount in how.resources.items()} or None
    return CustomTrainerContainer(how.image, num_nodes=how.num_nodes, resources_per_node=resources)


def _options(name: str, desk: Path, how: How) -> list[Any]:
    """What the SDK's trainer cannot say: the command, the shared volume, where pods may run, how long.

    PET_* variables, which the controller sets, tell torchrun of the other nodes. Nodes get no secrets: all that they
    read lies on the shared volume. Should they need one, it goes into the runtime, since no patch may set a node's env.
    """
    pod = PodSpecPatch(
        volumes=[{"name": VOLUME, "persistentVolumeClaim": {"claimName": how.claim}}],
        containers=[
            ContainerPatch(constants.NODE, volume_mounts=[{"name": VOLUME, "mountPath": str(how.shared)}]),
        ],
        node_selector=dict(how.node_selector) or None,
        tolerations=[dict(toleration) for toleration in how.tolerations] or None,
    )
    job = JobTemplatePatch(spec=JobSpecPatch(template=PodTemplatePatch(spec=pod)))
    job_set = JobSetTemplatePatch(spec=JobSetSpecPatch([ReplicatedJobPatch(constants.NODE, job)]))
    return [
        Name(name),
        Labels({"app.kubernetes.io/part-of": "vismem", "app.kubernetes.io/component": "training"}),
        TrainerCommand(["python", *TORCHRUN, "--nproc-per-node", str(how.num_processes), *WORKER, str(desk)]),
        ActiveDeadlineSeconds(round(how.hours * 3600)),
        RuntimePatch(TrainingRuntimeSpecPatch(job_set)),
    ]


def _follow(client: TrainerClient, name: str) -> tuple[bool, str]:
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
            return status == constants.TRAINJOB_COMPLETE, "\n".join(tail)
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

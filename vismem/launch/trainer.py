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
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from kubeflow import trainer as sdk
from kubeflow.common.utils import get_default_target_namespace
from kubeflow.trainer import options
from kubeflow.trainer.backends.localprocess import constants as local
from kubeflow.trainer.constants.constants import (
    DEFAULT_TRAINING_RUNTIME,
    GROUP,
    NODE,
    TRAINING_RUNTIME_PLURAL,
    TRAINJOB_COMPLETE,
    TRAINJOB_FAILED,
    VERSION,
)
from kubernetes.client import ApiException  # type: ignore[import-untyped]
from kubernetes.config import ConfigException  # type: ignore[import-untyped]

from vismem.config import Config
from vismem.errors import UserError
from vismem.files import write_text
from vismem.launch.config import QUEUE, LaunchConfig
from vismem.launch.torchrun import process_environment, reason_of
from vismem.params_file import render_params
from vismem.services import exit_on_sigterm
from vismem.steps import BY_NAME

POLL = 5.0  # seconds between looks at a job
PATIENCE = 60  # consecutive looks that may fail before the job is given up: the API server may be restarting
LOGS = "logs"  # folder beside a step's output, of torchrun's processes
TAIL = 200  # lines of the log that are kept: torchrun reports on every process at its end
TORCHRUN = ("-m", "torch.distributed.run")
# The runtime's own toleration: Trainer merges strategically, so that a list of others takes its place.
GPU_TAINT = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
ENDED = {TRAINJOB_COMPLETE, TRAINJOB_FAILED}


def run_locally(launch: LaunchConfig, name: str, config: Config, artifacts: Path, inputs: Mapping[str, Path]) -> str:
    """Run the step through the local process back end; returns its line. UserError with the reason if it fails.

    By default that back end builds a virtual environment for each job, without torchrun; its jobs get ours.
    """
    with TemporaryDirectory(prefix="vismem-") as folder:
        logs = Path(folder) / LOGS
        torchrun = (*TORCHRUN, "--standalone", "--nproc-per-node", str(launch.num_processes), "--log-dir", str(logs))
        local.TORCH_COMMAND = shlex.join(("/usr/bin/env", sys.executable, *torchrun))
        local.LOCAL_EXEC_JOB_TEMPLATE = "trap 'rm -rf \"$PYENV_LOCATION\"' EXIT\n$ENTRYPOINT"
        client = sdk.TrainerClient(sdk.LocalProcessBackendConfig())
        arguments = step_arguments(name, config, artifacts, inputs, Path(folder) / "params.yaml")
        environment = {**os.environ, **process_environment()}
        trainer = sdk.CustomTrainer(func=_run_cli, func_args={"arguments": arguments}, env=environment)
        job = client.train(DEFAULT_TRAINING_RUNTIME, trainer=trainer)
        tail = deque(client.get_job_logs(job, follow=True), TAIL)  # prints them, too
        status = client.wait_for_job_status(job, ENDED, polling_interval=1).status  # a failed job raises nothing
        client.delete_job(job)
        return _line(name, status == TRAINJOB_COMPLETE, logs, list(tail))


def step_arguments(name: str, config: Config, artifacts: Path, inputs: Mapping[str, Path], params: Path) -> list[str]:
    """The arguments of `vismem` that run the step in one process of several; writes its parameters to `params`."""
    write_text(params, render_params(config))
    read = {needed: folder for needed, folder in inputs.items() if needed in BY_NAME[name].reads}
    folders = [f"--input={needed}={folder.absolute()}" for needed, folder in read.items()]
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


def run_on_cluster(launch: LaunchConfig, name: str, config: Config, place: Path, inputs: Mapping[str, Path]) -> str:
    """Run the step in `place` on the shared volume, as a TrainJob of that folder's name; returns its line.

    A job of that name that is still running, left by a launcher that was killed, is joined. However this ends, the job
    is deleted. UserError where a process fails (with its reason), or where the cluster, or Trainer on it, does not
    answer or refuses.
    """
    logs = place / LOGS
    torchrun = ("--nnodes", launch.num_nodes, "--nproc-per-node", launch.num_processes, "--log-dir", logs)
    arguments = step_arguments(name, config, place, inputs, place / "params.yaml")
    command = ["python", *TORCHRUN, *map(str, torchrun), "-m", "vismem.cli", *arguments]
    succeeded, tail = run_job(place.name, command, launch, place / name)
    return _line(name, succeeded, logs, tail)


def run_job(name: str, command: list[str], launch: LaunchConfig, output: Path) -> tuple[bool, list[str]]:
    """Run the command on every node as the TrainJob `name`; returns whether it succeeded, and the end of node 0's log.

    The job lies in this pod's own namespace; outside a cluster in that of the kubeconfig's context. UserError as from
    `run_on_cluster`.
    """
    namespace = get_default_target_namespace()
    try:
        client = sdk.TrainerClient(sdk.KubernetesBackendConfig(namespace=namespace))
        status = _status(client, name)
        # complete without its folder `output`: it ended while its launcher was gone, and what it made was taken since
        if status == TRAINJOB_FAILED or (status == TRAINJOB_COMPLETE and not output.is_dir()):
            _delete(client, name)
        with exit_on_sigterm():  # so that the nodes are given back
            try:
                if _status(client, name) is None:
                    shutil.rmtree(output.with_name(LOGS), ignore_errors=True)  # a job that still runs writes there
                    submit_job(client, name, command, launch)
                return _follow(client, name)
            finally:
                _delete(client, name)
    except (RuntimeError, TimeoutError, ConfigException) as error:
        reason = getattr(error.__cause__, "reason", None)
        raise UserError(
            f"Kubeflow Trainer, namespace {namespace}: {error}{f' ({reason})' if reason else ''}; "
            "deploy/kubernetes/README.md says what the cluster must have"
        ) from error


def submit_job(client: sdk.TrainerClient, name: str, command: list[str], launch: LaunchConfig) -> None:
    """Post the TrainJob. Options say what the SDK's trainer cannot: command, shared volume, where pods may run, time.

    PET_* variables, which the controller sets, tell torchrun of the other nodes. Nodes get no secrets: all that they
    read lies on the shared volume. Should they need one, it goes into the runtime, since no patch may set a node's env.
    Where `launch` names no queue of Kueue, the runtime may, as its label.
    """
    labels = {"app.kubernetes.io/part-of": "vismem", "app.kubernetes.io/component": "training"}
    if queue := launch.queue or _labels_of_runtime(client, launch.runtime).get(QUEUE):
        labels[QUEUE] = queue
    resources = {resource: str(amount) for resource, amount in launch.resources.items()} or None
    mount = {"name": "shared", "mountPath": str(launch.shared)}  # a volume of that name in the runtime is replaced
    pod = options.PodSpecPatch(
        volumes=[{"name": "shared", "persistentVolumeClaim": {"claimName": launch.claim}}],
        containers=[options.ContainerPatch(NODE, volume_mounts=[mount])],
        node_selector=dict(launch.node_selector) or None,
        tolerations=[GPU_TAINT, *map(dict, launch.tolerations)] if launch.tolerations else None,
    )
    job = options.JobTemplatePatch(spec=options.JobSpecPatch(template=options.PodTemplatePatch(spec=pod)))
    job_set = options.JobSetTemplatePatch(spec=options.JobSetSpecPatch([options.ReplicatedJobPatch(NODE, job)]))
    client.train(
        launch.runtime,
        trainer=sdk.CustomTrainerContainer(launch.image, num_nodes=launch.num_nodes, resources_per_node=resources),
        options=[
            options.Name(name),
            options.Labels(labels),
            options.TrainerCommand(command),
            options.ActiveDeadlineSeconds(round(launch.hours * 3600)),
            options.RuntimePatch(options.TrainingRuntimeSpecPatch(job_set)),
        ],
    )


def _labels_of_runtime(client: sdk.TrainerClient, name: str) -> dict[str, str]:
    """The labels of the namespace's own TrainingRuntime, which the SDK reads and drops; none if it is the cluster's."""
    backend = client.backend
    try:
        found = backend.custom_api.get_namespaced_custom_object(
            GROUP, VERSION, backend.namespace, TRAINING_RUNTIME_PLURAL, name
        )
    except ApiException as error:
        if error.status != 404:
            raise RuntimeError(f"Failed to get Runtime: {name}") from error
        return {}
    return dict(found["metadata"].get("labels") or {})


def _follow(client: sdk.TrainerClient, name: str) -> tuple[bool, list[str]]:
    """Print node 0's log until the job has ended."""
    tail: deque[str] = deque(maxlen=TAIL)
    seen = failures = 0
    while True:
        try:
            status = client.get_job(name).status
            log = client.get_job_logs(name, follow=status not in ENDED)
            for line in islice(log, seen, None):  # a log that was cut off is read again from its start
                print(line, file=sys.stderr, flush=True)
                tail.append(line)
                seen += 1
            if status in ENDED:
                return status == TRAINJOB_COMPLETE, list(tail)
            failures = 0
        except (RuntimeError, TimeoutError) as error:  # also where a container has not begun to write its log
            failures += 1
            if failures > PATIENCE:
                raise
            print(f"{name}: {error}; looking again", file=sys.stderr, flush=True)
        time.sleep(POLL)


def _status(client: sdk.TrainerClient, name: str) -> str | None:
    """None if there is no such job."""
    try:
        return str(client.get_job(name).status)
    except RuntimeError as error:
        if getattr(error.__cause__, "status", None) == 404:
            return None
        raise


def _delete(client: sdk.TrainerClient, name: str) -> None:
    """Delete the job if it is there, and wait until it is gone."""
    if _status(client, name) is not None:
        client.delete_job(name)
    for _ in range(PATIENCE):
        if _status(client, name) is None:
            return
        time.sleep(POLL)

"""kfp's DockerRunner, mended: with kfp 2.17 a container that fails can pass for one that succeeded.

kfp lets the engine remove the container at its end and then asks for the exit status; where the engine is quicker, kfp
takes "not found" for 0 (github.com/kubeflow/pipelines/issues/13332). Here it is removed after its status is known.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import docker
from docker.errors import DockerException
from kfp import local
from kfp.local import docker_task_handler

from vismem.errors import UserError


def container_runner(image: str, folder: Path) -> local.DockerRunner:
    """A runner for `kfp.local.init` whose containers work as the owner of `folder`, on this machine's network.

    They get this process's variables of MLflow, S3, the model hub and OpenMP. UserError where no engine answers, or it
    has no such image.
    """
    try:
        docker.from_env().images.get(image)
    except DockerException as error:
        raise UserError(f"no container of {image}: {error}; DOCKER_HOST says where the engine is") from None
    docker_task_handler.run_docker_container = run_container
    handed_down = ("MLFLOW_", "AWS_", "HF_TOKEN", "OMP_")
    variables = {name: value for name, value in os.environ.items() if name.startswith(handed_down)}
    owner = folder.stat()
    return local.DockerRunner(network_mode="host", user=f"{owner.st_uid}:{owner.st_gid}", environment=variables)


def run_container(client: Any, image: str, command: Sequence[str], volumes: Mapping[str, Any], **options: Any) -> int:
    """Run the command to its end, print what it says, remove the container; return the exit status.

    The image must be there: a registry is not asked. Raises docker.errors.ImageNotFound where it is not.
    """
    container = client.containers.create(image, list(command), volumes=dict(volumes), **options)
    try:
        container.start()
        for line in container.logs(stream=True):
            print(line.decode(errors="replace"), end="")
        return int(container.wait()["StatusCode"])
    finally:
        container.remove(force=True)

"""kfp's DockerRunner, mended: with kfp 2.17 a container that fails can pass for one that succeeded.

kfp lets the engine remove the container at its end and then asks for the exit status; where the engine is quicker, kfp
takes "not found" for 0 (github.com/kubeflow/pipelines/issues/13332). Here it is removed after its status is known.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import docker
from kfp import local
from kfp.local import docker_task_handler


def docker_runner(**options: Any) -> local.DockerRunner:
    """A runner for `kfp.local.init` (or `run_local.run`); the options are those of docker's `containers.run`."""
    docker_task_handler.run_docker_container = run_container
    return local.DockerRunner(**options)


def run_container(
    client: docker.DockerClient, image: str, command: Sequence[str], volumes: Mapping[str, Any], **options: Any
) -> int:
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

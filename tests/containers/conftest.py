"""The container engine and the images: podman's Docker API unless a Docker daemon runs; images built by `make images`.

What is missing fails the tests. VISMEM_IMAGES=TAG tests images that are there already instead of building them;
CONTAINERS_CONF names a podman configuration for machines that need one.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

ROOT = Path(__file__).parents[2]
BUILT = os.environ.get("VISMEM_IMAGES", "")
TAG = BUILT or "test"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "cluster")]  # for `pipelines`, and the model of Kubeflow


@pytest.fixture(scope="session")
def images() -> dict[str, str]:
    """`{"train": NAME, "serve": NAME}`, built from the checkout as it is; unchanged layers are used again."""
    if not BUILT:
        settings = {"TORCH": "cpu", "TRITON": "wheel", **os.environ, "TAG": TAG}
        done = subprocess.run([ROOT / "deploy/docker/build.sh"], env=settings, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0, f"the images do not build:\n{done.stderr[-3000:]}"
    prefix = "" if _daemon_answers() else "localhost/"  # podman's name for an image that no registry holds
    return {name: f"{prefix}vismem-{name}:{TAG}" for name in ("train", "serve")}


@pytest.fixture(scope="session")
def engine(images: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[docker.DockerClient]:
    """A client of the Docker API, where kfp looks for it too. Containers of the tests' images go at the end."""
    socket = tmp_path_factory.mktemp("engine") / "podman.sock"
    service = None
    with pytest.MonkeyPatch.context() as patch:
        if not _daemon_answers():
            assert shutil.which("podman"), "no Docker daemon and no podman here: install one"
            service = subprocess.Popen(["podman", "system", "service", "--time=0", f"unix://{socket}"])
            patch.setenv("DOCKER_HOST", f"unix://{socket}")
            deadline = time.monotonic() + 60
            while not socket.exists():
                assert service.poll() is None, "podman's service ended while starting"
                assert time.monotonic() < deadline, "podman's service does not start"
                time.sleep(0.1)
        client = docker.from_env(timeout=600)
        try:
            yield client
            for container in client.containers.list(all=True):
                if set(container.image.tags) & set(images.values()):
                    container.remove(force=True)
        finally:
            client.close()
            if service is not None:
                service.terminate()
                service.wait(30)


def _daemon_answers() -> bool:
    try:
        client = docker.from_env()
    except docker.errors.DockerException:
        return False
    client.close()
    return True

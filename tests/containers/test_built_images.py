"""The images as they run: what they are, the smoke pipeline in real containers, and the served model over gRPC."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
from docker.models.containers import Container
from project import PASSES

from pipelines import run_local
from vismem.data.sample import StoredSamples
from vismem.services import free_ports
from vismem.serving.client import Client
from vismem.serving.exchange import plain

ROOT = Path(__file__).parents[2]
USER = "1000:1000" if os.getuid() == 0 else f"{os.getuid()}:{os.getgid()}"


def folder_for_containers(folder: Path) -> Path:
    """A folder that the containers' user may write to."""
    if os.getuid() == 0:
        os.chown(folder, 1000, 1000)
    return folder


def run_pipeline(folder: Path, image: str, **overrides: object) -> int:
    """The smoke pipeline with each task in a container; its exit status."""
    settings = [f"--set={key}={value}" for key, value in {**PASSES, **overrides}.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("OMP_NUM_THREADS", "1")
        return run_local.main(["--profile=smoke", f"--image={image}", f"--folder={folder}", "--no-cache", *settings])


def said(engine: docker.DockerClient, image: str, *command: str, **options: object) -> str:
    """Standard output of a command in a container that is gone afterwards.

    Its log is read when it has ended: read along, and removed at once, it can lose its last lines.
    """
    container = engine.containers.run(image, list(command), detach=True, network_mode="host", **options)
    try:
        assert container.wait()["StatusCode"] == 0
        return str(container.logs(stderr=False).decode()).strip()
    finally:
        container.remove(force=True)


@pytest.mark.parametrize("name", ["train", "serve"])
def test_an_image_says_where_it_came_from_and_runs_as_an_ordinary_user(
    engine: docker.DockerClient, images: dict[str, str], name: str
) -> None:
    image = engine.images.get(images[name])
    print(f"{images[name]}: {image.attrs['Size'] / 1e6:.0f} MB")
    commit = image.labels["org.opencontainers.image.revision"].removesuffix("-dirty")
    ours = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    if "VISMEM_IMAGES" in os.environ:  # those may be of an earlier one
        subprocess.run(["git", "merge-base", "--is-ancestor", commit, ours.strip()], cwd=ROOT, check=True)
    else:
        assert commit == ours.strip()
    assert said(engine, images[name], "-c", "id -u; id -g", entrypoint=["sh"]).split() == ["1000", "1000"]
    writable = said(engine, images[name], "-c", "find /opt -writable ! -type l | wc -l", entrypoint=["sh"])
    assert writable == "0", "the user could change the code that it runs"


def test_the_serving_image_has_no_torch(engine: docker.DockerClient, images: dict[str, str]) -> None:
    program = "import importlib.util as u; print([n for n in ('torch', 'mlflow', 'dvc', 'kfp') if u.find_spec(n)])"
    assert said(engine, images["serve"], "-c", program, entrypoint=["python3"]) == "[]"


def test_the_lineage_in_the_training_image_names_the_commit(
    engine: docker.DockerClient, images: dict[str, str]
) -> None:
    program = "from vismem.provenance import git_state; print(git_state()['commit'])"
    revision = engine.images.get(images["train"]).labels["org.opencontainers.image.revision"]
    assert said(engine, images["train"], "python", "-c", program) == revision


@pytest.fixture(scope="module")
def finished(engine: docker.DockerClient, images: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run of the smoke pipeline."""
    folder = folder_for_containers(tmp_path_factory.mktemp("pipeline"))
    assert run_pipeline(folder, images["train"]) == 0
    (run,) = folder.glob("vismem-*")
    return run


def test_the_smoke_pipeline_runs_in_containers_to_a_deployed_model(finished: Path) -> None:
    for artifact in ("prepare", "validate", "base", "stage1", "stage2", "evaluate", "export", "register", "promote"):
        assert any((finished / artifact / artifact).iterdir()), artifact
    assert (finished / "summary" / "summary").read_text().startswith("# The run succeeded")
    owners = {path.stat().st_uid for path in finished.rglob("*")}
    assert owners == {int(USER.split(":")[0])}


def test_a_failing_task_in_a_container_leaves_the_run_red(
    engine: docker.DockerClient, images: dict[str, str], tmp_path: Path
) -> None:
    assert run_pipeline(folder_for_containers(tmp_path), images["train"], **{"stage1.stepz": 3}) == 1
    (page,) = tmp_path.glob("vismem-*/summary/summary")
    assert page.read_text().startswith("# The run failed")


@pytest.fixture
def served(
    engine: docker.DockerClient, images: dict[str, str], finished: Path
) -> Iterator[tuple[Container, dict[str, int]]]:
    """The serving image on the pipeline's model, as strictly confined as in deploy/kubernetes."""
    ports = free_ports(dict.fromkeys(("grpc", "http", "metrics"), 0))
    container = engine.containers.run(
        images["serve"],
        [f"--{name}-port={port}" for name, port in ports.items()],
        detach=True,
        network_mode="host",
        read_only=True,
        cap_drop=["ALL"],
        tmpfs={"/tmp": ""},
        working_dir="/tmp",
        shm_size="256m",
        environment={"HOME": "/tmp"},
        volumes={str(finished / "deploy" / "deploy" / "model_repository"): {"bind": "/models", "mode": "ro"}},
    )
    try:
        deadline = time.monotonic() + 180
        while "serving vismem on" not in container.logs().decode():
            container.reload()
            assert container.status in ("created", "running"), container.logs().decode()[-3000:]
            assert time.monotonic() < deadline, container.logs().decode()[-3000:]
            time.sleep(0.5)
        yield container, ports
    finally:
        container.remove(force=True)


def test_the_serving_image_answers_over_grpc_and_stops_when_told_to(
    served: tuple[Container, dict[str, int]], finished: Path
) -> None:
    container, ports = served
    url = f"127.0.0.1:{ports['grpc']}"
    sample = next(iter(StoredSamples(finished / "validate" / "validate" / "data" / "test")))
    client = Client(f"grpc://{url}", model="vismem")
    streamed = tuple(client.stream(sample.images, sample.question, max_new_tokens=24))
    assert plain(streamed)
    assert client.ask(sample.images, sample.question, max_new_tokens=24).pieces == streamed

    metrics = f"http://127.0.0.1:{ports['metrics']}/metrics"
    probe = ["python", "-m", "vismem.serving.probe", "--url", url, "--metrics", metrics]
    assert container.exec_run(probe) == (0, b"vismem answers\n")

    container.stop(timeout=30)
    assert container.wait()["StatusCode"] == 0
    assert "Started GRPCInferenceService" in container.logs().decode(), "Triton's log should be the container's"

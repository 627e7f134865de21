"""The cluster model's pods in real containers: a fresh volume, an eviction, the cache, the command line's scores."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
from committed import SHARED
from kfp_model import Kubeflow, Pod, Values
from nodes import Node
from project import PASSES
from real_stack import Stack, running_stack

from pipelines.pipeline import S3
from vismem.records import Metrics
from vismem.stack import BUCKET

ROOT = Path(__file__).parents[2]
STORE = "v2/artifacts"
TRAINED = ("prepare", "validate", "base", "stage1", "stage2", "evaluate")
NEVER_CACHED = {"configure", "preflight", "register", "promote", "summary"}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack") / "data") as stack:
        yield stack


class Cluster:
    """A model of Kubeflow whose pods run on the engine, with a shared volume as storage gives it: root's."""

    def __init__(self, engine: docker.DockerClient, image: str, stack: Stack, folder: Path) -> None:
        self.engine, self.image, self.stack, self.volume = engine, image, stack, folder / "volume"
        self.volume.mkdir(parents=True)
        self.give_volume_to("0:0")
        secrets = {"vismem-s3": {key: stack.environment[key] for key in S3}}
        secrets["vismem-mlflow"] = {"MLFLOW_TRACKING_URI": stack.environment["MLFLOW_TRACKING_URI"]}
        claims = {"vismem-shared": self.volume}
        self.node = Node(engine, folder / "pods", claims=claims, secrets=secrets, store=stack.s3)
        self.kubeflow = Kubeflow(self.node.execute, store=f"minio://{BUCKET}/{STORE}")

    def give_volume_to(self, owner: str) -> None:
        """Change the owner of the volume's root in a container that runs as root."""
        bound = {str(self.volume): {"bind": "/shared", "mode": "rw"}}
        self.engine.containers.run(self.image, ["chown", owner, "/shared"], user="0:0", volumes=bound, remove=True)

    def run(self) -> dict[str, Pod]:
        """The pods of a run of the smoke profile."""
        overrides = {**PASSES, "preflight.buckets": [BUCKET]}
        arguments = {"profile": "smoke", "overrides": overrides, "image": self.image}
        return self.kubeflow.run(SHARED, arguments)

    def files(self, artifact: Values) -> dict[str, bytes]:
        """What lies in the store of an artifact, by path below it."""
        prefix = artifact["uri"].removeprefix(f"minio://{BUCKET}/")
        return {key.removeprefix(prefix).lstrip("/"): held for key, held in self.stack.objects(prefix).items()}

    def page(self, pods: dict[str, Pod]) -> str:
        """The first line of the run's summary."""
        return self.files(pods["summary"].made["summary"])[""].decode().splitlines()[0]


@pytest.fixture(scope="module")
def cluster(
    engine: docker.DockerClient, images: dict[str, str], stack: Stack, tmp_path_factory: pytest.TempPathFactory
) -> Cluster:
    return Cluster(engine, images["train"], stack, tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="module")
def refused(cluster: Cluster) -> dict[str, Pod]:
    """The first run, on a volume that is root's."""
    return cluster.run()


@pytest.fixture(scope="module")
def finished(cluster: Cluster, refused: dict[str, Pod]) -> dict[str, Pod]:
    """The next one, on a volume of the tasks' user; stage I's first pod is evicted when it has a checkpoint."""
    cluster.give_volume_to("1000:1000")
    cluster.node.evict["stage1"] = lambda: any(cluster.volume.rglob("stage1.checkpoint"))
    return cluster.run()


def test_a_volume_that_is_root_s_fails_the_run_before_anything_is_trained_and_the_log_says_what_to_do(
    cluster: Cluster, refused: dict[str, Pod]
) -> None:
    assert set(refused) == {"configure", "preflight", "summary"}
    log = cluster.node.logs["preflight"][0]
    assert re.search("1 of [0-9]+ checks failed", log)
    assert "shared volume /shared/work: user 1000:1000 cannot write there" in log
    assert "`chown 1000:1000` its root" in log
    assert cluster.page(refused) == "# The run failed"


def test_the_run_deploys_its_version(cluster: Cluster, finished: dict[str, Pod]) -> None:
    assert set(finished) >= {*TRAINED, *NEVER_CACHED, "export", "deploy"}
    assert cluster.page(finished) == "# The run succeeded"
    assert finished["promote"].made["promote"]["metadata"]["version"] == "1"
    assert any(name.startswith("model_repository/vismem") for name in cluster.files(finished["deploy"].made["deploy"]))


def test_a_training_pod_that_is_evicted_goes_on_from_its_checkpoint(cluster: Cluster, finished: dict[str, Pod]) -> None:
    first, second = cluster.node.logs["stage1"]
    assert "resumed at step" not in first
    assert "stage1: resumed at step" in second
    logs = finished["stage1"].made["executor-logs"]
    assert logs["uri"].endswith("executor-logs-1")
    assert cluster.files(logs)[""].decode() in second
    assert not list(cluster.volume.rglob("*.checkpoint")), "a finished training should leave no checkpoint"


def test_weights_and_scores_are_those_of_the_command_line(
    cluster: Cluster, finished: dict[str, Pod], tmp_path: Path
) -> None:
    ran = [sys.executable, "-m", "vismem.cli"]
    threads = {"OMP_NUM_THREADS": finished["stage1"].env["OMP_NUM_THREADS"]}  # with more, sums are rounded otherwise
    for step in TRAINED:
        given = [f"--params={ROOT}/params.yaml", "--profile=smoke", f"--artifacts={tmp_path}"]
        subprocess.run([*ran, step, *given], check=True, cwd=tmp_path, env=os.environ | threads)
    for step in ("base", "stage1", "stage2"):
        made = cluster.files(finished[step].made[step])
        weights = {name: held for name, held in made.items() if name.endswith(".safetensors")}
        assert weights
        assert weights == {name: (tmp_path / step / name).read_bytes() for name in weights}, step
    pods = tmp_path / "pods"
    pods.mkdir()
    (pods / "metrics.json").write_bytes(cluster.files(finished["evaluate"].made["evaluate"])["metrics.json"])
    assert scores(pods) == scores(tmp_path / "evaluate")


def test_the_same_run_again_takes_what_it_can_from_the_cache(cluster: Cluster, finished: dict[str, Pod]) -> None:
    again = cluster.run()
    assert set(again) == {*NEVER_CACHED, "deploy"}
    assert cluster.page(again) == "# The run succeeded"
    assert again["promote"].made["promote"]["metadata"]["version"] == "1", "a bundle that is registered is that version"


def scores(folder: Path) -> dict[str, object]:
    """What `evaluate` found, without what depends on seconds; stage II's folder says how many it took."""
    found = Metrics.read(folder).model_dump(exclude={"overhead", "stage2_sha256"})
    for groups in found["arms"].values():
        del groups["seconds_per_sample"]
    return found

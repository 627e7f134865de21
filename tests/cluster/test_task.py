"""What a task makes of what its pod gets: the image's name, the keys of S3, how training is launched, the volume."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vismem.config import Config
from vismem.errors import UserError
from vismem.kubeflow.cluster import load_cluster
from vismem.kubeflow.parameters import check_image, parameters_of
from vismem.kubeflow.task import run_preflight, run_task
from vismem.preflight import check_shared


@pytest.mark.parametrize("image", ["train", "train:latest", "host:5000/train", "host:5000/vismem/train:latest"])
def test_an_image_whose_name_may_mean_another_tomorrow_is_refused(image: str) -> None:
    with pytest.raises(UserError, match=f"image '{image}' has a tag that moves"):
        check_image(image)


@pytest.mark.parametrize("image", ["train:0.2.0", "host:5000/train:0.2.0", f"host/train:latest@sha256:{'a' * 64}"])
def test_an_image_with_a_version_or_a_digest_is_taken(image: str) -> None:
    check_image(image)


def test_a_task_launches_as_its_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of Kubeflow Trainer, the image of its own pod: there is no volume here, so that is all."""
    settings = load_cluster({"training_backend": "trainer", "num_nodes": 2, "num_processes": 8, "queue": "gpus"})
    monkeypatch.setenv("VISMEM_LAUNCH", json.dumps(settings.launch()))
    out: Any = SimpleNamespace(path=str(tmp_path / "stage1" / "stage1"), metadata={})
    with pytest.raises(UserError, match="2 nodes need backend 'trainer' and an image"):
        run_task(parameters_of("stage1", Config()), out)
    with pytest.raises(UserError, match="no shared volume at /shared"):
        run_task(parameters_of("stage1", Config()), out, image="train:1.0")


def test_the_settings_may_lie_in_a_file_that_a_variable_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISMEM_CLUSTER", str(tmp_path / "cluster.yaml"))
    with pytest.raises(UserError, match=r"VISMEM_CLUSTER names .*cluster.yaml, and there is no such file"):
        load_cluster()
    (tmp_path / "cluster.yaml").write_text("training_cpu: 16\nnode_selector: {zone: b}\n")
    found = load_cluster()
    assert (found.training_cpu, found.node_selector) == ("16", {"zone": "b"})
    (tmp_path / "cluster.yaml").write_text("training_cpus: 16\n")
    with pytest.raises(UserError, match=r"cluster.yaml: unknown key 'training_cpus' \(did you mean 'training_cpu'\?\)"):
        load_cluster()


def test_preflight_looks_at_the_shared_volume_and_finds_its_keys_of_s3_by_their_plain_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISMEM_WORK", str(tmp_path / "file" / "work"))
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("VISMEM_AWS_ACCESS_KEY_ID", "ours")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another's")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    parameters = parameters_of("preflight", Config())
    with pytest.raises(UserError, match=r"1 of [0-9]+ checks failed: .*shared volume"):
        run_preflight(parameters, SimpleNamespace(path=str(tmp_path / "page"), metadata={}))
    assert os.environ["AWS_ACCESS_KEY_ID"] == "ours"


def test_a_shared_volume_that_belongs_to_another_user_is_noticed(tmp_path: Path) -> None:
    """Kubeflow sets no fsGroup, and a new volume is often root's."""
    assert check_shared(tmp_path / "work").ok
    assert list((tmp_path / "work").iterdir()) == []
    if os.getuid():
        pytest.skip("only root can become the user of the tasks")
    os.seteuid(1000)
    try:
        found = check_shared(tmp_path / "work")
    finally:
        os.seteuid(0)
    assert not found.ok
    assert "Permission denied" in found.seen
    assert "chown" in found.remedy

"""`vismem submit` against a stand-in of the API of Kubeflow Pipelines: what arrives there, and what never does."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import published
import pytest
from kfp_api import KfpApi
from manifests import KUBERNETES, named, namespace_of

from vismem.cli import main
from vismem.config import resolve
from vismem.errors import UserError
from vismem.kubeflow.cluster import load_cluster
from vismem.plan import host_memory
from vismem.submit import ACCOUNT, IMAGE, TOKEN, Install

IMAGES = "registry.example.org/team"
DIGEST = f"sha256:{'0' * 64}"
LARGE = "qwen2_5_vl_7b"


@pytest.fixture
def server() -> Iterator[KfpApi]:
    with KfpApi() as running:
        yield running


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the settings that kfp keeps there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("KF_PIPELINES_ENDPOINT", TOKEN):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The published configuration of the profile's base, in the place of the hub's."""
    return str(published.save_published(tmp_path_factory.mktemp("base"), "Qwen2.5-VL-7B-Instruct"))


def overlay(folder: Path, name: str = "standalone", **edits: str) -> list[str]:
    """The option for a copy of an overlay, edited as its user would."""
    text = (KUBERNETES / "overlays" / name / "kustomization.yaml").read_text()
    text = text.replace("registry.example.com", IMAGES).replace("newTag: 0.2.0", f"digest: {DIGEST}")
    for old, new in edits.items():
        text = text.replace(old.replace("_", "-"), new)
    folder.mkdir(exist_ok=True)
    (folder / "kustomization.yaml").write_text(text)
    return ["--overlay", str(folder)]


def resources(body: dict[str, Any]) -> dict[str, Any]:
    """What the pod of stage I asks for."""
    executors = body["pipeline_spec"]["pipeline_spec"]["deploymentSpec"]["executors"]
    found: dict[str, Any] = executors["exec-stage1"]["container"]["resources"]
    return found


def started(server: KfpApi) -> dict[str, Any]:
    (request,) = server.asked("POST", "runs")
    body: dict[str, Any] = request.body
    return body


def test_a_run_has_the_overlay_s_image_and_the_account_of_the_manifests(server: KfpApi, tmp_path: Path) -> None:
    given = ["--profile", "smoke", "--set", "stage1.steps=30", "--endpoint", server.endpoint]
    assert main(["submit", *given, *overlay(tmp_path / "mine"), 'tolerations=[{"key": "gpu"}]', "gpu_count=2"]) == 0
    body = started(server)
    assert body["service_account"] == ACCOUNT
    assert named("single-gpu", "ServiceAccount", ACCOUNT)
    assert body["runtime_config"]["parameters"] == {
        "profile": "smoke",
        "overrides": {"stage1.steps": 30},
        "image": f"{IMAGES}/{IMAGE}@{DIGEST}",
    }
    assert resources(body)["accelerator"]["resourceCount"] == "2"
    assert '"key": "gpu"' in json.dumps(body["pipeline_spec"]["platform_spec"])
    assert [each.namespace for each in server.experiments.values()] == [None]


def test_what_is_printed_is_what_runs(server: KfpApi, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--profile", "smoke", "--endpoint", server.endpoint, *overlay(tmp_path / "mine")]
    assert main(["submit", *given, "--dry-run"]) == 0
    assert server.requests == []
    (script,) = re.findall(r"python - <<'EOF'\n(.*)EOF", capsys.readouterr().out, re.DOTALL)
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    first = started(server)
    assert main(["submit", *given]) == 0
    _, second = (request.body for request in server.asked("POST", "runs"))
    assert {**first, "display_name": ""} == {**second, "display_name": ""}


def test_a_kubeflow_of_many_users_gets_the_profile_s_namespace_and_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "token").write_text("the-token")
    monkeypatch.setenv(TOKEN, str(tmp_path / "token"))
    with KfpApi(multi_user=True) as server:
        given = ["submit", "--profile", "smoke", "--endpoint", server.endpoint]
        for more, wanted in (([], namespace_of("kubeflow-profile")), (["--namespace", "team"], "team")):
            assert main([*given, *more, *overlay(tmp_path / "mine", "kubeflow-profile")]) == 0
            assert list(server.experiments.values())[-1].namespace == wanted
        assert {request.authorization for request in server.asked("POST", "runs")} == {"Bearer the-token"}
    assert "the-token" not in capsys.readouterr().out


def test_several_nodes_take_the_pipeline_of_the_shared_volume(server: KfpApi, tmp_path: Path) -> None:
    mine = overlay(tmp_path / "mine", single_gpu="multi-node")
    assert main(["submit", "--profile", "smoke", "--endpoint", server.endpoint, *mine]) == 0
    assert "vismem-shared" in str(started(server)["pipeline_spec"]["platform_spec"])


def test_a_large_profile_brings_sizes_that_are_enough(server: KfpApi, tmp_path: Path, large: str) -> None:
    given = ["submit", "--profile", LARGE, "--endpoint", server.endpoint, *overlay(tmp_path / "mine")]
    given += ["--set", f"base.model={large}"]
    assert main(given) == 0
    cluster, asked = resolve(LARGE).cluster, resources(started(server))
    assert asked["resourceMemoryLimit"] == cluster["training_memory"]
    assert asked["accelerator"]["resourceCount"] == str(cluster["gpu_count"])
    assert main([*given, "training_backend=trainer", "num_nodes=2"]) == 0
    assert "accelerator" not in resources(server.asked("POST", "runs")[-1].body)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["training_memory=128Gi"], "training_memory=128Gi is too small (training: 8 processes"),
        (["evaluation_memory=20Gi"], "evaluation_memory=20Gi is too small (export: "),
        (["gpu_count=0"], "it would train on the CPU"),
        (["gpu_count=4"], "gpu_count=4 for 8 processes"),
        (["evaluation_gpu_count=0"], "on the CPU, for days"),
        (["gpu_cuont=8"], "no parameter 'gpu_cuont' (did you mean 'gpu_count'?)"),
        (["num_processes=many"], "'num_processes': Input should be a valid integer"),
        (["num_processes=0"], "'num_processes': Input should be greater than 0"),
        (["training_memory=200 GB"], "'training_memory': String should match pattern"),
        (["tolerations=["], "tolerations=[ is no YAML: while parsing a flow node"),
        (["profile=smoke"], "use --profile"),
        (['overrides={"seed": 3}'], "use --set"),
        (["tolerations={}"], "'tolerations': Input should be a valid tuple"),
        (["gpu_count"], "'gpu_count' is not NAME=VALUE"),
        (["--params", "mine.yaml"], "reads no parameter file"),
        (
            ["--set", "registry.tracking_uri=https://me:s3cret@host/"],
            "credentials, for all to read who may see a run: ",
        ),
        (["--overlay", "nowhere"], "no nowhere/kustomization.yaml"),
        (["--overlay", str(KUBERNETES / "overlays" / "standalone")], "names no registry of yours"),
    ],
)
def test_what_cannot_succeed_is_refused_before_anything_is_sent(
    server: KfpApi, tmp_path: Path, large: str, given: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--profile", LARGE, "--set", f"base.model={large}", "--endpoint", server.endpoint]
    assert main(["submit", *options, *overlay(tmp_path / "mine"), *given]) == 1
    said = capsys.readouterr()
    assert reason in said.err
    assert "s3cret" not in said.out + said.err
    assert server.requests == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "kustomization.yaml is no kustomization with namespace and images: "),
        ("images: [{name: vismem-train, newName: r.io/vismem-train}]", "no kustomization with namespace and images"),
        ("namespace: x\nimages: {vismem-train: r.io}", "no kustomization with namespace and images"),
        ("namespace: [", "no kustomization with namespace and images: while parsing"),
        ("namespace: x\nimages:\ncomponents:\n", "names no registry of yours"),
    ],
)
def test_an_overlay_that_is_broken_is_one_line(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text(text)
    with pytest.raises(UserError, match=reason):
        Install.read(tmp_path)


@pytest.mark.parametrize("text", ["", "[", "3", "root: {}", "root: {inputDefinitions: 7}"])
def test_a_compiled_pipeline_that_is_broken_is_one_line(
    text: str, server: KfpApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vismem.submit.PIPELINE", broken := tmp_path / "pipeline.yaml")
    broken.write_text(text)
    assert main(["submit", "--endpoint", server.endpoint, *overlay(tmp_path / "mine")]) == 1
    assert f"{broken} is no compiled pipeline" in capsys.readouterr().err
    assert server.requests == []


def test_a_tag_is_taken_as_it_is_written(tmp_path: Path) -> None:
    image = "{name: vismem-train, newName: r.io/vismem-train, newTag: 1.10}"
    (tmp_path / "kustomization.yaml").write_text(f"namespace: 7\nimages: [{image}]\ncomponents: [../multi-node]")
    assert Install.read(tmp_path) == Install("7", "r.io/vismem-train:1.10", shared=True)


def test_an_image_without_a_digest_is_warned_of_and_a_base_out_of_reach_not_held_against_the_run(
    server: KfpApi, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tagged = overlay(tmp_path / "mine", **{f"digest: {DIGEST}": "newTag: 0.2.0"})
    base = ["--set", f"base.model={tmp_path}"]
    assert main(["submit", "--profile", LARGE, "--endpoint", server.endpoint, *base, *tagged]) == 0
    said = capsys.readouterr().err
    assert f"{IMAGES}/{IMAGE}:0.2.0 is a tag" in said
    assert "memory was not checked" in said


def test_a_server_that_refuses_or_is_not_there_is_one_line(
    server: KfpApi, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fail["POST runs"] = (500, "InternalServerError: the database is gone")
    given = ["submit", "--profile", "smoke", *overlay(tmp_path / "mine")]
    for endpoint, reason in ((server.endpoint, "the database is gone"), ("http://127.0.0.1:1", "Connection refused")):
        assert main([*given, "--endpoint", endpoint]) == 1
        said = capsys.readouterr().err
        assert reason in said
        assert said.count("\n") == 1
    assert main(given) == 1
    assert "KF_PIPELINES_ENDPOINT" in capsys.readouterr().err


@pytest.mark.parametrize("profile", [path.stem for path in (Path("deploy") / "profiles").glob("*.yaml")])
def test_what_a_profile_says_of_the_cluster_are_settings_of_its_pods(profile: str) -> None:
    load_cluster(resolve(profile).cluster)


@pytest.mark.parametrize("name", ["InternVL3_5-8B-HF", "llava-onevision-qwen2-7b-ov-hf"])
def test_the_sizes_of_the_7b_profile_are_enough_for_the_others_that_extend_it(name: str, tmp_path: Path) -> None:
    config = resolve(LARGE, {"base.model": str(published.save_published(tmp_path, name))})
    assert config.cluster["training_memory"] == "256Gi"
    assert max(host_memory(config, int(config.cluster["num_processes"])).values()) < 256 * 2**30

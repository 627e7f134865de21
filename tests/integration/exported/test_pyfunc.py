"""A registered version as MLflow's own tools use it: `mlflow.pyfunc.load_model` and `mlflow models serve`."""

import base64
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
import pytest
import tiny
from mlflow.exceptions import MlflowException
from pictures import noise, pictures
from project import Project

from vismem import VisMem
from vismem.data.sample import write_shards
from vismem.export.export import export
from vismem.files import read_json
from vismem.provenance import sha256_folder
from vismem.services import check_http, free_ports, start_service
from vismem.serving.answering import Runtime

URI = "models:/vismem@champion"


@pytest.fixture(scope="module")
def bare(inputs, config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bare")
    export(config.model_copy(update={"export": config.export.model_copy(update={"graphs": False})}), inputs, out)
    return out


def release(project: Project, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Register a real bundle and make it champion; MLflow's own tools find the store."""
    test = project.steps["validate"] / "data" / "test"
    write_shards(tiny.samples(), test)
    project.test_sha256 = sha256_folder(test, "*.parquet")
    project.build(b"", stage2_sha256=read_json(bundle / "lineage.json")["inputs_sha256"]["stage2"])
    project.steps["export"] = bundle
    project.run("register")
    assert project.run("promote")["promoted"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", project.config.registry.tracking_uri)
    return project


def rows() -> list[dict[str, str]]:
    samples = tiny.samples()[:3]
    return [{"image": base64.b64encode(one.images[0]).decode(), "question": one.question} for one in samples]


def directly(bundle: Path, **settings: Any) -> list[dict[str, Any]]:
    """The answers of the same bundle without MLflow."""
    told = []
    for one in tiny.samples()[:3]:
        if (bundle / "onnx").is_dir():
            chunks = list(Runtime.open(bundle).generate(pictures(one), one.question, **settings))
            answer, usage = "".join(chunk.text for chunk in chunks).strip(), chunks[-1].usage
            assert usage is not None
            told.append({"answer": answer, "tokens": usage.tokens, "memories": sum(usage.memories.values())})
        else:
            said = VisMem.from_pretrained(bundle).answer(one.images[0], one.question, **settings)
            told.append({"answer": str(said), "tokens": said.tokens, "memories": len(said.invocations)})
    return told


@pytest.mark.parametrize("kind", ["bundle", "bare"])
def test_mlflow_loads_the_champion_and_it_answers_as_the_bundle_does(
    project: Project, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    bundle = request.getfixturevalue(kind)
    release(project, bundle, monkeypatch)
    model = mlflow.pyfunc.load_model(URI)
    for settings in ({}, {"max_new_tokens": 6}, {"max_new_tokens": 6, "memory": "off"}):
        found = model.predict(rows(), params=settings).drop(columns="marked").to_dict("records")
        asked = settings if kind == "bundle" else {**settings, "memory": "memory" not in settings}
        assert found == directly(bundle, **asked)
    whole = model.predict(rows()[:1], params={"max_new_tokens": 6})["marked"][0]
    assert "".join(model.predict_stream(rows()[0], params={"max_new_tokens": 6})).strip() == whole
    for line in Path(mlflow.pyfunc.get_model_dependencies(URI)).read_text().splitlines():
        name, _, pinned = line.partition("==")
        assert metadata.version(name) == pinned
    example = model.input_example
    assert example is not None
    assert model.predict(example, params={"max_new_tokens": 2}).shape == (1, 4)


def test_a_bundle_with_graphs_needs_no_torch(project: Project, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release(project, bundle, monkeypatch)
    program = (
        "import sys; sys.modules['torch'] = None\n"
        f"import json, mlflow; model = mlflow.pyfunc.load_model('{URI}')\n"
        "print(json.dumps(model.predict(json.load(sys.stdin), params={'max_new_tokens': 6})['answer'].tolist()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(rows()), capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [one["answer"] for one in directly(bundle, max_new_tokens=6)]


def test_what_cannot_be_answered_is_said(
    project: Project, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release(project, bundle, monkeypatch)
    model, good = mlflow.pyfunc.load_model(URI), rows()[0]
    picture = tmp_path / "a.png"
    picture.write_bytes(base64.b64decode(good["image"]))
    settings = {"max_new_tokens": 4}
    by_path = model.predict({**good, "image": str(picture)}, params=settings)
    by_url = model.predict({**good, "image": f"data:image/png;base64,{good['image']}"}, params=settings)
    assert by_path.equals(by_url)
    for change, params, said in (
        ({"image": "no.png"}, {}, "'no.png' is not base64 nor the path of a file here"),
        ({"image": base64.b64encode(b"GIF89a").decode()}, {}, "does not decode"),
        ({"question": " "}, {}, "PROMPT is empty"),
        ({}, {"memory": "both"}, "MEMORY is 'both'"),
        ({}, {"max_new_tokens": 10**6}, "MAX_NEW_TOKENS is 1000000"),
    ):
        with pytest.raises(MlflowException, match=said):
            model.predict({**good, **change}, params=params)
    with pytest.raises(MlflowException, match="question"):
        model.predict({"image": good["image"]})


def test_mlflow_models_serve_answers_over_http_and_opens_no_file_for_a_caller(
    project: Project, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release(project, bundle, monkeypatch)
    picture = tmp_path / "a.png"
    noise(28, 28).save(picture)
    port = free_ports({"serve": 0})["serve"]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", URI, "-p", str(port), "--env-manager", "local"]
    address = f"http://127.0.0.1:{port}"

    def ask(records: list[dict[str, str]]) -> Any:
        body = json.dumps({"dataframe_records": records, "params": {"max_new_tokens": 6}}).encode()
        request = urllib.request.Request(f"{address}/invocations", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)["predictions"]

    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # MLflow starts uvicorn by its name
    with start_service("serve", command, {**os.environ, "PATH": path}, tmp_path / "log", stop_seconds=10) as server:
        server.wait_until(lambda: check_http(f"{address}/health"))
        assert [{k: v for k, v in one.items() if k != "marked"} for one in ask(rows())] == directly(
            bundle, max_new_tokens=6
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask([{**rows()[0], "image": str(picture)}])
        assert refused.value.code == 400
        assert "is not base64: send the encoded file" in refused.value.read().decode()

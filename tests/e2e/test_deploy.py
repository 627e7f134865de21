"""The step deploy on a real tritonserver with a stand-in runtime: released, refused, and a failed smoke test."""

import contextlib
import json
from functools import partial
from pathlib import Path

import pytest
from stand_in import IMAGE, client_of, make_repository

from vismem.config import parse_config
from vismem.data.sample import Sample, write_shards
from vismem.errors import UserError
from vismem.provenance import MANIFEST, sha256_file
from vismem.records import Release
from vismem.serving import deploy as deploy_step
from vismem.serving.repository import write_model_repository
from vismem.serving.server import TritonServer


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Outputs of export, promote and validate, the smallest that deploy reads; the runtime is the stand-in."""
    make_repository(tmp_path / "made")
    library = tmp_path / "made" / "vismem"
    monkeypatch.setattr(deploy_step, "write_model_repository", partial(write_model_repository, library=library))
    rows = [Sample(id=str(i), images=(IMAGE,), question=f"question {i}", answer=str(i)) for i in range(3)]
    write_shards(rows, tmp_path / "validate" / "data" / "test")
    (tmp_path / "promote").mkdir()
    return {"export": tmp_path / "made" / "bundle", "promote": tmp_path / "promote", "validate": tmp_path / "validate"}


def test_deploy_serves_a_refused_version_as_challenger_and_says_so(inputs: dict[str, Path], tmp_path: Path) -> None:
    refused = {"promoted": False, "reasons": ("gain 0.2 is below 1.0",)}
    Release(name="vismem", version="4", model_id="m-1", previous=None, **refused).write(inputs["promote"])
    line = deploy_step.deploy(parse_config({}), inputs, tmp_path / "out")
    assert line.startswith(
        "NOT released, the gate refused version 4 (gain 0.2 is below 1.0): deployed as vismem_challenger"
    )
    assert (tmp_path / "out" / "model_repository" / "vismem_challenger" / "4" / "model.py").is_file()
    smoke = json.loads((tmp_path / "out" / "smoke.json").read_text())
    assert (smoke["model"], smoke["version"], smoke["promoted"], smoke["items"]) == ("vismem_challenger", 4, False, 3)
    assert (smoke["id"], smoke["question"]) == ("0", "question 0")
    assert (tmp_path / "out" / "example-1.png").read_bytes() == IMAGE, "the summary names it in a command"
    assert smoke["answer_marked"].startswith("é0⟨short⟩ é1 é2")
    assert smoke["answer"].startswith("é0 é1 é2")
    assert smoke["reference"] == "0"


def test_deploy_serves_a_released_version_under_the_models_name(
    server: TritonServer, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = {"promoted": True, "reasons": (), "manifest_sha256": sha256_file(inputs["export"] / MANIFEST)}
    Release(name="vismem", version="5", model_id="m-1", previous=None, **passed).write(inputs["promote"])
    (tmp_path / "out" / "model_repository" / "half").mkdir(parents=True)  # left by a killed run
    running = contextlib.nullcontext(server)  # the one that runs already: a second start shows nothing new
    monkeypatch.setattr(deploy_step, "triton_server", lambda repository, log: running)
    line = deploy_step.deploy(parse_config({}), inputs, tmp_path / "out")
    assert line.startswith("deployed vismem version 5: 3 questions answered by a server")
    models = sorted(path.name for path in (tmp_path / "out" / "model_repository").iterdir())
    assert models == ["vismem", "vismem_unary"]


def test_a_bundle_that_was_exported_again_is_not_deployed_as_the_version_that_was_judged(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    judged = {"promoted": True, "reasons": (), "manifest_sha256": "0" * 64}
    Release(name="vismem", version="5", model_id="m-1", previous=None, **judged).write(inputs["promote"])
    with pytest.raises(UserError, match=r"is not what was judged as version 5: run `vismem register` and"):
        deploy_step.deploy(parse_config({}), inputs, tmp_path / "out")


def test_the_smoke_test_fails_on_an_empty_answer(server: TritonServer) -> None:
    sample = Sample(id="s1", images=(IMAGE,), question="nothing", answer="1")
    with pytest.raises(UserError, match=r"smoke test: vismem gave an empty answer to 'nothing' \(s1\)"):
        deploy_step.smoke_test(client_of(server), [sample])


def test_the_smoke_test_fails_where_two_answers_to_one_question_differ(server: TritonServer) -> None:
    sample = Sample(id="s2", images=(IMAGE,), question="count", answer="1")
    with pytest.raises(UserError, match=r"streamed and collected answers of vismem differ for s2: '\d' against '\d'"):
        deploy_step.smoke_test(client_of(server), [sample])

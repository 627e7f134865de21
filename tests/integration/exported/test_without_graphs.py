"""A bundle without graphs (`export.graphs` false): what VisMem adds and a reference to the base, whatever its size."""

from pathlib import Path

import pytest
import tiny
import tiny_families
from project import PARITY

from vismem import VisMem
from vismem.config import EvaluateConfig
from vismem.errors import UserError
from vismem.export.export import export
from vismem.export.onnx import WEIGHTS, write_graphs
from vismem.files import read_json
from vismem.models.reference import Base
from vismem.provenance import sha256_folder, verify_manifest
from vismem.records import ParityReport
from vismem.registry import gate
from vismem.runtime.bundle import Bundle, BundleError
from vismem.runtime.limits import MAX_NEW_TOKENS


@pytest.fixture(scope="module")
def bare(inputs, config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bare")
    changed = {
        "export": config.export.model_copy(update={"graphs": False}),
        "evaluate": EvaluateConfig(max_new_tokens=3000),
    }
    settings = config.model_copy(update=changed)
    assert "without graphs" in export(settings, inputs, out)
    return out


def test_it_holds_no_weight_of_the_base_but_their_hash(bare: Path, bundle: Path, inputs) -> None:
    assert verify_manifest(bare) == []
    assert not (bare / "onnx").exists()
    weights = {file.relative_to(bare).as_posix() for file in bare.rglob("*") if file.suffix in (".safetensors", ".bin")}
    assert weights == {"vismem/memory.safetensors", "vismem/policy.safetensors"}
    for name in weights:
        assert (bare / name).read_bytes() == (inputs["stage2"] / Path(name).name).read_bytes()
    reference = Base.read(bare / "vismem")
    assert reference is not None
    assert reference.sha256 == sha256_folder(inputs["base"], "*.safetensors")
    assert (bundle / "onnx" / WEIGHTS).is_file(), "as the other one does"
    assert all(file.stat().st_size < 2**20 for file in (bundle / "onnx").glob("*.onnx")), "their weights lie outside"


def test_a_request_that_does_not_say_asks_for_no_more_than_one_may(bare: Path) -> None:
    assert read_json(bare / "vismem" / "vismem.json")["max_new_tokens"] == MAX_NEW_TOKENS


def test_it_answers_as_what_was_trained(bare: Path, inputs, tiny_base: Path) -> None:
    trained = VisMem.from_pretrained(inputs["stage2"], base=inputs["base"])
    served = VisMem.from_pretrained(bare)
    for sample in tiny.samples()[:3]:
        pictures = tiny_families.pictures(sample)
        said = [str(each.answer(pictures, sample.question, max_new_tokens=6)) for each in (trained, served)]
        assert said[0] == said[1]


def test_a_family_without_graphs_is_refused_with_the_way_that_serves_it(tmp_path: Path) -> None:
    model = tiny.vismem(tiny_families.save_base(tmp_path / "base", "internvl"))
    with pytest.raises(UserError) as refused:
        write_graphs(model, tmp_path / "onnx", 18)
    assert str(refused.value) == (
        "export writes graphs for qwen2_5_vl only, not for internvl: with `export.graphs: false` export writes what "
        "VisMem adds, which `vismem api` serves"
    )
    assert not (tmp_path / "onnx").exists()


def test_a_base_with_other_weights_is_refused(bare: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has other weights"):
        VisMem.from_pretrained(bare, base=tiny.save_base(tmp_path, seed=1))


def test_the_gate_passes_it_and_says_why_and_triton_s_runtime_refuses_it(bare: Path) -> None:
    parity = ParityReport.read(bare)
    rule = gate._parity(parity)
    assert rule.passed
    assert "no ONNX graphs" in rule.reason
    assert not gate._parity(PARITY.model_copy(update={"items": 0, "greedy_equal": 0})).passed, "with graphs it must be"
    with pytest.raises(BundleError, match="has no ONNX graphs: serve it by `vismem api`"):
        Bundle(bare, threads=1)


def test_its_card_says_how_to_serve_it(bare: Path, bundle: Path) -> None:
    with_graphs, without = ((folder / "README.md").read_text() for folder in (bundle, bare))
    assert "ONNX against torch" in with_graphs
    assert "vismem api" not in with_graphs
    assert "ONNX against torch" not in without
    assert '`vismem api --model "PATH OF THIS FOLDER" --dtype float32`' in without
    assert read_json(bare / "lineage.json")["params"]["export"]["graphs"] is False

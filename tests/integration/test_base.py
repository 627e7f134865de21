"""The step `base`: a folder or hub id is found from wherever a run works, checked, and copied with its fingerprint."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_families
import torch
from alive import Alive
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM

from vismem.config import Config, parse_config
from vismem.errors import UserError
from vismem.files import read_json, write_json
from vismem.models.backbones import FAMILIES
from vismem.models.families import NAMES
from vismem.models.loading import load_base
from vismem.plan import plan
from vismem.provenance import sha256_folder, write_manifest
from vismem.steps import run_step
from vismem.training.base import base

ROOT = Path(__file__).parents[2]


def config(model: Path | str) -> Config:
    return parse_config({"base": {"model": str(model)}})


def test_a_model_from_a_folder_is_copied_with_its_weights_and_their_fingerprint(
    tiny_base: Path, tmp_path: Path
) -> None:
    line = base(config(tiny_base), {}, tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).tokenizer.chat_template
    old, new = load_file(tiny_base / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)
    metrics = read_json(tmp_path / "metrics.json")
    assert metrics["family"] == "qwen2_5_vl"
    assert metrics["parameters"] == AutoModelForImageTextToText.from_pretrained(tmp_path).num_parameters()
    assert metrics["weights_sha256"] == sha256_folder(tmp_path, "*.safetensors")
    assert metrics["weights_sha256"][:12] in line


def test_a_model_s_own_code_is_never_run_whatever_a_user_would_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks, where it is not told."""
    model, ran = tmp_path / "model", tmp_path / "ran"
    write_json(model / "config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}})
    (model / "own.py").write_text(f"open({str(ran)!r}, 'w')\nfrom transformers import PretrainedConfig as Own\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for load in (lambda: base(config(model), {}, tmp_path / "out"), lambda: plan(config(model), "1xH100", "84x84")):
        with pytest.raises(UserError):
            load()
    assert not ran.exists()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a real one's vocabulary, in bfloat16, in several files."""
    return tiny_families.save_wide_base(tmp_path_factory.mktemp("sharded"), tmp_path_factory.mktemp("small"))


def test_weights_of_the_right_type_are_linked_file_by_file_and_never_loaded(sharded: Path, tmp_path: Path) -> None:
    """So they take neither room on the disk nor memory, whatever their size."""
    with Alive(lambda tensor: tensor.device.type != "meta") as alive:
        line = base(parse_config({"base": {"model": str(sharded), "dtype": "bfloat16"}}), {}, tmp_path)
    assert alive.peak < 1_000_000
    assert line.endswith(", linked")
    weights = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(weights) > 1
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == weights
    assert all((tmp_path / name).samefile(sharded / name) for name in weights)
    facts = read_json(tmp_path / "metrics.json")
    assert facts["weights_sha256"] == facts["source_sha256"] == sha256_folder(tmp_path, "*.safetensors")
    models = [AutoModelForImageTextToText.from_pretrained(folder) for folder in (sharded, tmp_path)]
    assert facts["parameters"] == models[0].num_parameters()
    assert all(torch.equal(old, new) for old, new in zip(*(model.parameters() for model in models), strict=True))
    assert models[0].generation_config.to_dict() == models[1].generation_config.to_dict()


def test_weights_of_another_type_are_written_in_the_one_that_is_asked_for(sharded: Path, tmp_path: Path) -> None:
    line = base(config(sharded), {}, tmp_path)
    assert line.endswith(", copied as float32")
    assert AutoModelForImageTextToText.from_pretrained(tmp_path).dtype is torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_that_lacks_weights_is_refused(tiny_base: Path, tmp_path: Path, dtype: str) -> None:
    """Hugging Face would draw them at random."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_base, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"lacks weights of the model: lm_head\.weight"):
        base(parse_config({"base": {"model": str(folder), "dtype": dtype}}), {}, tmp_path / "out")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights as safetensors"):
        base(config(folder), {}, tmp_path / "out")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "weights cut off": lambda folder: cut(folder / "model.safetensors"),
    "a tokenizer cut off": lambda folder: cut(folder / "tokenizer.json"),
    "an index without a map": lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
    "other sizes than the weights'": lambda folder: edit(folder / "config.json", '"intermediate_size": ', "1"),
    "a word for a number": lambda folder: edit(folder / "config.json", '"hidden_size": ', '"wide"'),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
}


def edit(file: Path, key: str, value: str) -> None:
    """Give a JSON file's first entry of that key another value."""
    before, found, after = file.read_text().partition(key)
    assert found
    file.write_text(f"{before}{key}{value},{after.partition(',')[2]}")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_base_is_one_plain_error(tiny_base: Path, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "model")
    DAMAGES[damage](folder)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=f"{folder}"):
        base(config(folder), {}, tmp_path / "out")
    if "index" not in damage:  # which is read only where the weights are in several files
        with pytest.raises(UserError, match=f"{folder}"):
            load_base(folder)


def test_settings_of_a_base_that_would_change_probabilities_are_said_not_to_be_applied(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "model")
    for settings in ({}, {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "temperature": 0.1, "do_sample": True}):
        write_json(folder / "generation_config.json", settings)
        load_base(folder)
    assert not caplog.records
    write_json(folder / "generation_config.json", {"repetition_penalty": 1.05})
    load_base(folder)
    (said,) = caplog.messages
    assert said.startswith(f"'{folder}' sets repetition_penalty=1.05, which is not applied")


def test_the_default_is_found_from_any_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # as in Kubeflow's local runner and in the container image
    assert Config().base.folder() == ROOT / "assets" / "tiny-vlm"
    run_step("base", Config(), Path("artifacts"))
    old, new = (
        load_file(folder / "model.safetensors") for folder in (ROOT / "assets/tiny-vlm", Path("artifacts/base"))
    )
    assert all(torch.equal(old[key], new[key]) for key in old)


def test_a_folder_of_the_working_folder_comes_before_the_project_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "assets" / "tiny-vlm").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert Config().base.folder() == Path("assets/tiny-vlm")
    assert config("org/name").base.folder() is None


def test_a_folder_that_differs_from_its_manifest_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    write_manifest(folder)
    base(config(folder), {}, tmp_path / "out")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"model\.safetensors has changed"):
        base(config(folder), {}, tmp_path / "again")


def test_a_base_without_vision_of_another_family_or_that_is_missing_is_refused(tmp_path: Path) -> None:
    text_only = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    text_only.save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match=r"has no vision; supported: .*qwen2_5_vl"):
        base(config(tmp_path / "llama"), {}, tmp_path / "out")
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text('{"model_type": "clip", "vision_config": {}, "text_config": {}}')
    with pytest.raises(UserError, match="is of family 'clip'"):
        base(config(tmp_path / "clip"), {}, tmp_path / "out")
    with pytest.raises(UserError, match="no model that can be loaded"):
        base(config(tmp_path / "nowhere"), {}, tmp_path / "out")


def test_the_families_that_are_named_are_those_that_have_a_file() -> None:
    assert (*FAMILIES,) == NAMES

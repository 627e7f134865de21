"""The exported bundle's files: weights once on disk, no trace of the machine, a card, a manifest that is verified."""

import io
import json
import mmap
import re
import shlex
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from pictures import TOKENS
from PIL import Image
from project import KIND, USE

from vismem import VisMem
from vismem.cli import main
from vismem.errors import UserError
from vismem.export.export import export
from vismem.export.onnx import prompt_parts
from vismem.models.tokens import KINDS
from vismem.models.vismem import VisMemModel
from vismem.provenance import verify_manifest
from vismem.pyfunc import _load_pyfunc
from vismem.records import Invocation, MemoryUse, Metrics
from vismem.runtime.bundle import Bundle


def test_the_table_of_embeddings_is_a_plain_array_over_the_file_itself(bundle):
    """numpy's own kind of such arrays takes longer to look up a token than the rest of a step; a copy takes memory."""
    for table in (opened := Bundle(bundle, 1)).embedding, opened.memory_rows:
        assert type(table) is np.ndarray
        while isinstance(table, np.ndarray):
            table = table.base
        assert isinstance(table, mmap.mmap)


def test_it_says_how_long_an_answer_of_its_evaluation_was_for_every_server(bundle):
    assert Bundle(bundle, 1).new_tokens == VisMem.from_pretrained(bundle).model.new_tokens == TOKENS


def test_every_weight_lies_on_disk_once(bundle, model):
    places, sizes, used = {}, {}, {}
    data = (bundle / "onnx" / "weights.bin").read_bytes()
    for file in sorted((bundle / "onnx").glob("*.onnx")):
        for tensor in onnx.load(file, load_external_data=False).graph.initializer:
            entry = {item.key: item.value for item in tensor.external_data}
            if entry:
                offset, length = int(entry["offset"]), int(entry["length"])
                places.setdefault(data[offset : offset + length], set()).add(offset)
                sizes[offset] = length
                used.setdefault(offset, set()).add(file.name)
    assert all(len(offsets) == 1 for offsets in places.values())
    assert any(names == {"vision.onnx", "short.onnx"} for names in used.values())
    base = sum(parameter.nbytes for parameter in model.backbone.model.parameters())
    added = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("policy_lora"))
    assert sum(sizes.values()) <= len(data) <= (base + added) * 1.01 + 64 * len(sizes)


def test_graphs_hold_no_trace_of_the_machine_that_wrote_them(bundle):
    for file in (bundle / "onnx").glob("*.onnx"):
        content = file.read_bytes()
        for trace in (b".py", b"site-packages", str(Path.cwd()).encode(), b"stack_trace", b"pkg.torch"):
            assert trace not in content, (file.name, trace)


def test_the_bundle_explains_itself(bundle, inputs):
    assert verify_manifest(bundle) == []
    assert not (bundle / "leftover").exists()
    lineage = json.loads((bundle / "lineage.json").read_text())
    assert lineage["params"]["export"]["parity_items"] == 6
    assert set(lineage["files"]) >= {"onnx/weights.bin", "vismem/memory.safetensors", "README.md", "parity.json"}
    card = (bundle / "README.md").read_text()
    metrics = json.loads((inputs["evaluate"] / "metrics.json").read_text())
    assert f"{metrics['arms']['vismem']['overall']:.1f} (" in card
    assert lineage["git"]["commit"] in card
    for text in (card, json.dumps(lineage)):
        assert str(inputs["base"].parent) not in text
    again = VisMemModel.from_pretrained(bundle / "vismem", inputs["base"])
    trained = VisMemModel.from_pretrained(inputs["stage2"], inputs["base"])
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), trained.parameters(), strict=True))


def test_a_bundle_finds_its_base_and_answers_in_torch_as_its_graphs_do(bundle, runtime):
    loaded = VisMem.from_pretrained(bundle)
    for sample in tiny.samples(4):
        pictures = [Image.open(io.BytesIO(data)) for data in sample.images]
        chunks = list(runtime.generate(pictures, sample.question, max_new_tokens=TOKENS))
        answer = loaded.answer(sample.images, sample.question, max_new_tokens=TOKENS)
        assert answer == "".join(chunk.text for chunk in chunks).strip()
        assert [memory.kind for memory in answer.invocations] == [c.event for c in chunks if c.event in KINDS]


def test_the_card_is_one_of_the_hub_and_shows_a_picture_that_goes_with_it(bundle, inputs, tmp_path):
    VisMem.from_pretrained(bundle).save_pretrained(tmp_path)
    metrics = json.loads((inputs["evaluate"] / "metrics.json").read_text())
    for folder in (bundle, tmp_path):
        card = ModelCard.load(folder / "README.md")
        assert (card.data.library_name, card.data.pipeline_tag) == ("vismem", "image-text-to-text")
        (result,) = card.data.eval_results
        assert result.metric_value == round(metrics["arms"]["vismem"]["overall"], 1)
        (picture,) = re.findall(r'<img src="([^"]+)"', card.text)
        with Image.open(folder / picture) as image:
            assert image.format == "PNG"
        assert verify_manifest(folder) == []


def test_the_card_s_examples_run_as_they_stand(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("photo.png").write_bytes(tiny.samples(1)[0].images[0])
    card = (bundle / "README.md").read_text().replace("PATH OF THIS FOLDER", str(bundle))
    python, without_torch = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    (command,) = re.findall(r"```bash\n(.*?)```", card, flags=re.DOTALL)
    texts = []
    for run in (
        partial(exec, python, {}),
        partial(main, shlex.split(command.replace("\\\n", " "))[1:]),
        partial(exec, without_torch, {}),
    ):
        run()
        texts.append(capsys.readouterr().out.strip())
    assert texts[0] == texts[1] != ""
    assert texts[2] != ""


@pytest.mark.parametrize("named", [{"short": 0.5, "long": 0.25}, None])
def test_a_bundle_names_the_memories_per_answer_of_the_arm_vismem_if_it_was_evaluated(named, inputs, config, tmp_path):
    metrics = Metrics.read(inputs["evaluate"])
    overall = USE | {kind: KIND | {"per_answer": value} for kind, value in (named or {}).items()}
    used = Invocation(overall=MemoryUse(**overall), tasks={}) if named else None
    arms = metrics.arms if named else {"vanilla": metrics.arms["vanilla"]}
    metrics.model_copy(update={"invocation": used, "arms": arms}).write(tmp_path)
    settings = config.model_copy(update={"export": config.export.model_copy(update={"graphs": False})})
    (out := tmp_path / "bundle").mkdir()
    export(settings, inputs | {"evaluate": tmp_path}, out)
    assert json.loads((out / "lineage.json").read_text()).get("memories_per_answer") == named


def test_missing_metrics_are_named(inputs, config, tmp_path):
    with pytest.raises(UserError, match=r"metrics\.json.*vismem evaluate"):
        export(config, inputs | {"evaluate": tmp_path}, tmp_path)


def test_a_template_that_puts_the_question_first_is_refused(model, monkeypatch):
    template = "{% for part in messages[0].content | reverse %}{{ part.text or '<|image_pad|>' }}{% endfor %}"
    monkeypatch.setattr(model.backbone.processor, "chat_template", template)
    with pytest.raises(UserError, match=r"chat template .*`export\.graphs: false`.*`vismem api`"):
        prompt_parts(model.backbone.processor)


FILES = ("onnx/weights.bin", "onnx/decoder.onnx", "onnx/runtime.json", "processor/tokenizer.json", "manifest.json")


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_or_missing_file_is_refused_by_name(name, bundle, tmp_path):
    file = shutil.copytree(bundle, tmp_path / "bundle") / name
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{name} (has changed|is damaged)"):
        _load_pyfunc(str(tmp_path))
    file.unlink()
    with pytest.raises(UserError, match=f"{name} is (missing|not there)"):
        _load_pyfunc(str(tmp_path))


def test_an_unknown_file_is_refused_by_name(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "bundle")
    (tmp_path / "bundle" / "processor" / "added_tokens.json").write_text("{}")
    with pytest.raises(UserError, match=r"processor/added_tokens\.json is not in the manifest"):
        _load_pyfunc(str(tmp_path))

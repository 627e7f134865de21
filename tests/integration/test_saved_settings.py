"""A saved model says how it was trained: its base's type and its longest answer, by which it is asked."""

import io
from contextlib import closing
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from vismem import VisMem
from vismem.files import read_json, write_json
from vismem.generation.torch_executor import TorchExecutor
from vismem.models.loading import load_base
from vismem.models.vismem import VisMemModel
from vismem.serving.answering import Runtime

SAMPLE = tiny.samples()[0]
ASKED = SAMPLE.images, SAMPLE.question


@pytest.fixture(scope="module")
def folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model that was trained in bfloat16, and never ends an answer by itself."""
    root = tmp_path_factory.mktemp("steps")
    (root / "base").symlink_to(tiny_base)
    model = VisMemModel(load_base(root / "base", "bfloat16"), tiny.MEMORY, tiny.vismem(tiny_base).invocation_config)
    model.new_tokens = 3
    model.save_pretrained(root / "stage2")
    return root / "stage2"


def test_a_model_is_asked_as_it_was_trained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = VisMem.from_pretrained(folder)
    assert model.model.backbone.model.dtype is torch.bfloat16
    monkeypatch.setattr(model.model, "stop_ids", ())
    assert [model.answer(*ASKED).tokens, model.answer(*ASKED, max_new_tokens=2).tokens] == [3, 2]
    pieces = {n: "".join(p.text for p in model.stream(*ASKED, max_new_tokens=n)) for n in (None, 3, 4)}
    assert pieces[None] == pieces[3] != pieces[4]
    images = [Image.open(io.BytesIO(data)) for data in SAMPLE.images]
    with closing(Runtime(TorchExecutor(model.model))) as runtime:
        *_, end = runtime.generate(images, SAMPLE.question)
    assert end.usage is not None
    assert end.usage.tokens == 3


def test_what_is_named_wins(folder: Path) -> None:
    assert VisMem.from_pretrained(folder, dtype="float32").model.backbone.model.dtype is torch.float32


def test_an_earlier_folder_is_asked_as_before(folder: Path, tmp_path: Path) -> None:
    settings = read_json(folder / "vismem.json")
    assert (settings.pop("dtype"), settings.pop("max_new_tokens")) == ("bfloat16", 3)
    (tmp_path / "base").symlink_to(folder.parent / "base")
    (tmp_path / "stage2").mkdir()
    for file in folder.iterdir():
        (tmp_path / "stage2" / file.name).symlink_to(file)
    (tmp_path / "stage2" / "vismem.json").unlink()
    write_json(tmp_path / "stage2" / "vismem.json", settings)
    model = VisMem.from_pretrained(tmp_path / "stage2").model
    assert (model.backbone.model.dtype, model.new_tokens) == (torch.float32, 120)

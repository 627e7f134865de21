"""A model whose files are no longer those that were written is refused, in one line that names its folder."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from transformers import AutoTokenizer

from vismem import VisMem
from vismem.errors import UserError
from vismem.files import read_json, write_json
from vismem.models.reference import Base
from vismem.models.vismem import VisMemModel
from vismem.provenance import write_manifest
from vismem.sources import find_added


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> VisMem:
    return VisMem(tiny.vismem(tiny_base), Base(str(tiny_base)), tiny_base)


def test_a_bundle_without_its_manifest_is_refused_whichever_of_its_folders_is_named(
    model: VisMem, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    model.model.save_pretrained(bundle / "vismem")
    model.base.write(bundle / "vismem")
    manifest = write_manifest(bundle)
    assert find_added(bundle) == find_added(bundle / "vismem") == bundle / "vismem"
    manifest.unlink()
    for folder in (bundle, bundle / "vismem"):
        with pytest.raises(UserError, match=rf"^{folder} is damaged: .*manifest\.json is not there: fetch or export"):
            VisMem.from_pretrained(folder)


def test_a_saved_model_without_its_manifest_is_refused_and_what_training_wrote_has_none(
    model: VisMem, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"saved is damaged: .*manifest\.json is not there"):
        VisMem.from_pretrained(tmp_path / "saved")
    model.model.save_pretrained(tmp_path / "stage2")
    assert find_added(tmp_path / "stage2") == tmp_path / "stage2"


def swapped_words(base: Path) -> None:
    written = read_json(base / "tokenizer.json")
    words = written["model"]["vocab"]
    one, two = [word for word in words if len(word) == 1][:2]
    words[one], words[two] = words[two], words[one]
    write_json(base / "tokenizer.json", written)
    assert AutoTokenizer.from_pretrained(base).convert_tokens_to_ids(one) == words[one]


def swapped_merges(base: Path) -> None:
    """The words and their ids are the same: a text is cut into others of them."""
    written = read_json(base / "tokenizer.json")
    written["model"]["merges"].reverse()
    write_json(base / "tokenizer.json", written)


def other_template(base: Path) -> None:
    template = base / "chat_template.jinja"
    template.write_text(template.read_text().replace("user", "human", 1) + "{# of June #}")


def other_settings(base: Path) -> None:
    settings = read_json(base / "processor_config.json")
    settings["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    write_json(base / "processor_config.json", settings)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (swapped_words, "tokenizer"),
        (swapped_merges, "tokenizer"),
        (other_template, "chat template"),
        (other_settings, "image_mean of images"),
    ],
)
def test_a_base_that_reads_otherwise_is_refused(
    change: Callable[[Path], None], what: str, model: VisMem, tiny_base: Path, tmp_path: Path
) -> None:
    """All of its weights and all special tokens are as they were."""
    model.save_pretrained(tmp_path / "saved")
    base = shutil.copytree(tiny_base, tmp_path / "other")
    assert VisMem.from_pretrained(tmp_path / "saved", base=base)
    change(base)
    said = f"'{base}' has another {what} than the one that {tmp_path / 'saved'} was trained with"
    with pytest.raises(UserError) as refused:
        VisMem.from_pretrained(tmp_path / "saved", base=base)
    assert str(refused.value) == said


@pytest.mark.parametrize("text", [None, "{}"])
def test_a_memory_whose_own_tokenizer_is_lost_or_damaged_is_refused(
    text: str | None, model: VisMem, tiny_base: Path, tmp_path: Path
) -> None:
    model.model.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(UserError, match=rf"^{file} is missing or damaged \(.+\): restore it, or train it again$"):
        VisMemModel.from_pretrained(tmp_path, tiny_base)

"""Decoding one token at a time, without the layers' overhead, is what Hugging Face's own language model does."""

from pathlib import Path

import pytest
import tiny_families as families
import torch

from vismem.errors import UserError
from vismem.files import read_json, write_json
from vismem.generation.decode_state import RowCache
from vismem.models.backbones import decoder
from vismem.models.backbones.decoder import TokenDecoder
from vismem.models.loading import load_base
from vismem.models.lora import Lora, LoraSettings
from vismem.models.memory import causal_mask

ROWS, READ, LENGTHS = 3, 7, (7, 4, 6)


@pytest.fixture(params=["as-on-a-cpu", "as-on-a-gpu"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's output in memory: on a GPU its heads may lie next to one another, not its rows."""
    attend = decoder.scaled_dot_product_attention

    def on_gpu(*args: torch.Tensor, **options: object) -> torch.Tensor:
        attended: torch.Tensor = attend(*args, **options)
        return attended.transpose(0, 1).contiguous().transpose(0, 1)

    if request.param == "as-on-a-gpu":
        monkeypatch.setattr(decoder, "scaled_dot_product_attention", on_gpu)


@pytest.mark.parametrize("variant", families.VARIANTS)
@pytest.mark.usefixtures("layout")
@torch.no_grad()
def test_a_token_alone_gets_the_hidden_state_of_the_whole_model(variant: str, tmp_path: Path) -> None:
    backbone = load_base(families.save_base(tmp_path, variant))
    language = backbone.model.model.language_model
    assert TokenDecoder.known(language), "or this test compares the model with itself"
    adapter = Lora(backbone.language_targets(), LoraSettings(rank=2, alpha=4, dropout=0.0))
    for up in adapter.up.values():
        up.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    embeds = torch.randn(ROWS, READ + 1, backbone.width, generator=torch.Generator().manual_seed(0))
    read = torch.arange(READ) < torch.tensor(LENGTHS)[:, None]
    slots = torch.tensor(LENGTHS)[:, None]
    mask = torch.arange(READ + 1) <= slots[:, None, :, None]

    def after(step: object) -> torch.Tensor:
        cache = RowCache(READ + 2)
        cache.place(torch.arange(READ).expand(ROWS, -1), READ)
        positions = torch.arange(READ).expand(3, ROWS, -1)
        backbone.language(embeds[:, :READ], positions, causal_mask(read), cache)
        cache.place(slots, READ + 1)
        return step(embeds[:, READ:], slots.expand(3, ROWS, 1), mask, cache)  # type: ignore[operator, no-any-return]

    plain = after(backbone.language)
    torch.testing.assert_close(after(backbone.step), plain, atol=1e-5, rtol=1e-5)
    with adapter.active():
        adapted = after(backbone.language)
        assert not torch.allclose(adapted, plain, atol=1e-3)
        torch.testing.assert_close(after(backbone.step), adapted, atol=1e-5, rtol=1e-5)


def test_an_unknown_decoder_is_left_to_hugging_face(tmp_path: Path) -> None:
    backbone = load_base(families.save_base(tmp_path, "internvl"))
    language = backbone.model.model.language_model
    language.config._attn_implementation = "eager"
    assert not TokenDecoder.known(language)
    assert backbone.step == backbone.language


def test_a_language_model_with_sliding_windows_is_refused(tmp_path: Path) -> None:
    """Of Qwen2.5 some have them; here every token reads all that came before."""
    families.save_base(tmp_path, "qwen2_5_vl")
    settings = read_json(tmp_path / "config.json")
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0, "layer_types": None}
    write_json(tmp_path / "config.json", settings | {"text_config": settings["text_config"] | windows})
    with pytest.raises(UserError, match="uses sliding-window attention is not supported"):
        load_base(tmp_path)

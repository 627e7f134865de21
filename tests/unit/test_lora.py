"""A low-rank adapter on plain linear layers, against the sum written out."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from vismem.models.lora import Lora, LoraSettings, LoraTarget


def adapted(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Lora]:
    """A linear layer of 6 to 10 columns, of which 2 to 6 are adapted; the adapter's second matrix is off zero."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 10, dtype=dtype).requires_grad_(False)
    lora = Lora([LoraTarget("blocks.0.qkv", layer, 2, 6)], LoraSettings(rank=3, alpha=6.0, dropout=dropout))
    nn.init.normal_(lora.up["blocks_0_qkv_2"])
    return layer, lora


def expected(layer: nn.Linear, lora: Lora, inputs: Tensor) -> Tensor:
    """With alpha / rank = 2."""
    down, up = lora.down["blocks_0_qkv_2"], lora.up["blocks_0_qkv_2"]
    output = nn.functional.linear(inputs, layer.weight, layer.bias)
    output[..., 2:6] += (2.0 * (inputs.to(down.dtype) @ down.T @ up.T)).to(output.dtype)
    return output


def test_an_adapter_adds_the_scaled_product_of_its_matrices_to_its_columns_while_it_is_active() -> None:
    layer, lora = adapted()
    inputs = torch.randn(4, 5, 6)
    plain = layer(inputs)
    assert_close(plain, nn.functional.linear(inputs, layer.weight, layer.bias), msg="an adapter is made switched off")
    with lora.active():
        assert_close(layer(inputs), expected(layer, lora, inputs))
        with lora.active(False):
            assert torch.equal(layer(inputs), plain)
        assert not torch.equal(layer(inputs), plain)
    assert torch.equal(layer(inputs), plain)


def test_an_adapter_computes_in_its_own_precision_and_leaves_the_layer_s() -> None:
    layer, lora = adapted(dtype=torch.bfloat16)
    inputs = torch.randn(4, 6, dtype=torch.bfloat16)
    with lora.active():
        output = layer(inputs)
    assert output.dtype == torch.bfloat16
    assert lora.down["blocks_0_qkv_2"].dtype == torch.float32
    assert torch.equal(output, expected(layer, lora, inputs))


def test_a_fresh_adapter_adds_nothing_and_starts_within_the_bound_of_a_linear_layer() -> None:
    layer = nn.Linear(400, 8)
    lora = Lora([LoraTarget("q_proj", layer, 0, 8)], LoraSettings(rank=50, alpha=6.0, dropout=0.0))
    down, up = lora.down["q_proj_0"], lora.up["q_proj_0"]
    assert (down.shape, up.shape) == ((50, 400), (8, 50))
    assert not up.any()
    assert float(down.detach().abs().max()) == pytest.approx(400**-0.5, rel=0.01)
    inputs = torch.randn(3, 400)
    with lora.active():
        assert torch.equal(layer(inputs), nn.functional.linear(inputs, layer.weight, layer.bias))


def test_dropout_acts_on_the_adapter_s_input_in_training_alone() -> None:
    layer, lora = adapted(dropout=0.5)
    inputs = torch.randn(64, 6)
    plain = layer(inputs)
    with lora.active():
        lora.eval()
        assert_close(layer(inputs), expected(layer, lora, inputs))
        lora.train()
        torch.manual_seed(3)
        added = layer(inputs) - plain
    torch.manual_seed(3)
    kept = nn.functional.dropout(inputs, 0.5)
    assert_close(added, expected(layer, lora, kept) - layer(kept), atol=1e-5, rtol=1e-5)


def test_an_adapter_that_is_off_leaves_no_hook_however_often_it_was_on() -> None:
    layer, lora = adapted()
    lora.enabled = True
    lora.enabled = True
    with lora.active(), lora.rows([True, False]):
        assert len(layer._forward_hooks) == 1
    lora.enabled = False
    with lora.rows([True]):
        assert not layer._forward_hooks


@pytest.mark.parametrize("shape", [(3, 6), (3, 5, 6), (3, 4, 5, 6)])
def test_an_adapter_can_be_on_for_some_rows_of_a_batch(shape: tuple[int, ...]) -> None:
    layer, lora = adapted()
    inputs = torch.randn(shape)
    plain, all_adapted = layer(inputs), expected(layer, lora, inputs)
    with lora.active():
        with lora.rows([True, False, True]):
            mixed = layer(inputs)
        for on, alike in (([True] * 3, all_adapted), ([False] * 3, plain)):
            with lora.rows(on):
                assert_close(layer(inputs), alike)
        assert_close(layer(inputs), all_adapted)
    assert_close(mixed, torch.stack([all_adapted[0], plain[1], all_adapted[2]]))
    with lora.rows([True] * 3):
        assert torch.equal(layer(inputs), plain), "an adapter that is off stays so"

"""One token per row through a decoder of Llama's shape: what decoding spends its time on, without the layers' overhead.

The arithmetic is Hugging Face's. Linear layers that adapters hang on, or that processes share, are called as they are;
of the others only the weights are used. Attention reads each key once for all query heads that share it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention

KNOWN = {"Qwen2Attention", "Qwen2_5_VLAttention", "Qwen3Attention", "LlamaAttention"}


class _Layer:
    """A decoder layer's parts: looking them up in modules at every token costs as much as small layers do."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.before, self.after = layer.input_layernorm, layer.post_attention_layernorm
        self.query, self.key, self.value = attention.q_proj, attention.k_proj, attention.v_proj
        self.query_norm = getattr(attention, "q_norm", None)  # of each head (Qwen3)
        self.key_norm = getattr(attention, "k_norm", None)
        self.output, self.scale = attention.o_proj, attention.scaling
        self.gate, self.up, self.down, self.activation = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn


class TokenDecoder:
    """`Backbone.language` for one token per row. `known` says whether a language model has a shape that it computes."""

    @staticmethod
    def known(language: Any) -> bool:
        """Whether this is one of the decoders whose arithmetic stands here."""
        kinds = {type(layer.self_attn).__name__ for layer in language.layers}
        static = language.rotary_emb.rope_type not in ("dynamic", "longrope")  # their frequencies follow the length
        return kinds <= KNOWN and static and language.config._attn_implementation == "sdpa"

    def __init__(self, language: Any) -> None:
        self.rotary, self.norm = language.rotary_emb, language.norm
        self.width = language.layers[0].self_attn.head_dim
        self.layers = [_Layer(layer) for layer in language.layers]

    def __call__(self, embeds: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """Last hidden states (R, 1, d) of embeddings (R, 1, d); positions (3, R, 1); mask (R, 1, 1, keys) bool."""
        angles = positions[0, :, :, None].float() * self.rotary.inv_freq.float()  # the axes agree on what is no image
        angles = torch.cat([angles, angles], dim=-1)
        scale = self.rotary.attention_scaling
        cos, sin = ((wave * scale).to(embeds.dtype) for wave in (angles.cos(), angles.sin()))  # (R, 1, head width)
        hidden = embeds[:, 0]
        rows = len(hidden)
        heads = (rows, -1, self.width)
        mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill_(~mask, -torch.inf)  # as each layer would
        for index, layer in enumerate(self.layers):
            normed = _norm(layer.before, hidden)
            query, key = _linear(layer.query, normed).view(heads), _linear(layer.key, normed).view(heads)
            if layer.query_norm is not None:
                query, key = _norm(layer.query_norm, query), _norm(layer.key_norm, key)
            groups = key.shape[1]
            both = torch.cat([query, key], dim=1)
            first, second = both.chunk(2, dim=-1)
            both = both * cos + torch.cat([-second, first], dim=-1) * sin
            value = _linear(layer.value, normed).view(heads)
            keys, values = cache.update(both[:, -groups:, None], value[:, :, None], index)
            query = both[:, :-groups].reshape(rows, groups, -1, self.width)
            attended = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=layer.scale)
            hidden = hidden + _linear(layer.output, attended.reshape(rows, -1))
            normed = _norm(layer.after, hidden)
            gated = layer.activation(_linear(layer.gate, normed)) * _linear(layer.up, normed)
            hidden = hidden + _linear(layer.down, gated)
        result: Tensor = _norm(self.norm, hidden)[:, None]
        return result


def _linear(layer: Any, states: Tensor) -> Tensor:
    """A linear layer's output. The call of a module costs as much as a small product: it is spared where it can be."""
    if type(layer) is nn.Linear and not layer._forward_hooks and "forward" not in vars(layer):
        return linear(states, layer.weight, layer.bias)
    output: Tensor = layer(states)
    return output


def _norm(layer: Any, states: Tensor) -> Tensor:
    """An RMS norm's output, in one operation."""
    return rms_norm(states, states.shape[-1:], layer.weight, layer.variance_epsilon)

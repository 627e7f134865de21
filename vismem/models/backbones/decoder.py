"""One token a row through a decoder of Llama's shape: what decoding spends its time on, without the layers' overhead.

The arithmetic is Hugging Face's, operation by operation, and the layers' own linear and norm modules are called, so
adapters that hang on them work. Attention reads each key once for all query heads that share it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

KNOWN = {"Qwen2Attention", "Qwen2_5_VLAttention", "Qwen3Attention", "LlamaAttention"}


class _Layer(NamedTuple):
    """A decoder layer's parts: looking them up in modules at every token costs as much as small layers do."""

    before: Any
    query: Any
    key: Any
    value: Any
    query_norm: Any  # of each head (Qwen3), else None
    key_norm: Any
    output: Any
    after: Any
    mlp: Any
    scale: float


class TokenDecoder:
    """`Backbone.language` for one token a row. `known` says whether a language model has a shape that it computes."""

    @staticmethod
    def known(language: Any) -> bool:
        """Whether this is one of the decoders whose arithmetic stands here."""
        kinds = {type(layer.self_attn).__name__ for layer in language.layers}
        return kinds <= KNOWN and language.config._attn_implementation == "sdpa"

    def __init__(self, language: Any) -> None:
        self.rotary, self.norm = language.rotary_emb, language.norm
        self.axes = hasattr(self.rotary, "mrope_section")  # Qwen2.5-VL's positions have three axes
        self.width = language.layers[0].self_attn.head_dim
        self.layers = [
            _Layer(
                layer.input_layernorm,
                attention.q_proj,
                attention.k_proj,
                attention.v_proj,
                getattr(attention, "q_norm", None),
                getattr(attention, "k_norm", None),
                attention.o_proj,
                layer.post_attention_layernorm,
                layer.mlp,
                attention.scaling,
            )
            for layer in language.layers
            for attention in (layer.self_attn,)
        ]

    def __call__(self, embeds: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """Last hidden states (R, 1, d) of embeddings (R, 1, d); positions (3, R, 1); mask (R, 1, 1, keys) bool."""
        cos, sin = self.rotary(embeds, positions if self.axes else positions[0])  # (R, 1, head width), for all heads
        hidden = embeds[:, 0]
        rows = len(hidden)
        heads = (rows, -1, self.width)
        for index, layer in enumerate(self.layers):
            normed = layer.before(hidden)
            query, key = layer.query(normed).view(heads), layer.key(normed).view(heads)
            if layer.query_norm is not None:
                query, key = layer.query_norm(query), layer.key_norm(key)
            groups = key.shape[1]
            both = torch.cat([query, key], dim=1)
            first, second = both.chunk(2, dim=-1)
            both = both * cos + torch.cat([-second, first], dim=-1) * sin
            value = layer.value(normed).view(heads)
            keys, values = cache.update(both[:, -groups:, None], value[:, :, None], index)
            attended = scaled_dot_product_attention(
                both[:, :-groups].reshape(rows, groups, -1, self.width),
                keys,
                values,
                attn_mask=mask,
                scale=layer.scale,
            )
            hidden = hidden + layer.output(attended.view(rows, -1))
            hidden = hidden + layer.mlp(layer.after(hidden))
        result: Tensor = self.norm(hidden)[:, None]
        return result

"""A VisMemModel on Qwen2.5-VL as pure functions of tensors, for ONNX: decoder, vision encoder, short former, builder.

They share the base's parameters; the adapters are a switch at run time (paper Sec. 3.3, Eq. 5-6 and 9-11).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vismem.models.lora import Lora
from vismem.models.memory import summary
from vismem.models.vismem import VisMemModel

MASKED = -1e9  # finite: a row that sees nothing must not become NaN


class LowRank(nn.Module):
    """(alpha / r) * B A x, what an adapter adds to a linear layer."""

    def __init__(self, down: Tensor, up: Tensor, scale: float) -> None:
        """`down` is A (r, in), `up` is B (out, r)."""
        super().__init__()
        self.down, self.up = nn.Parameter(down.detach()), nn.Parameter(up.detach() * scale)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return nn.functional.linear(nn.functional.linear(x, self.down), self.up)


def adapters_of(lora: Lora) -> tuple[nn.ModuleList, nn.ModuleList]:
    """The adapters of all layers' queries, and those of their values; targets stand in that order in a layer."""
    modules = [LowRank(down, lora.up[key], lora.scale) for key, down in lora.down.items()]
    return nn.ModuleList(modules[::2]), nn.ModuleList(modules[1::2])


def bare(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer without its hooks, on which the live model's adapters hang."""
    return nn.functional.linear(x, layer.weight, layer.bias)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding on the last axis; `cos` and `sin` broadcast against `x`."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class Decoder(nn.Module):
    """The language model over embeddings, with past keys and values: prefill, decoding and long former (Eq. 11)."""

    frequencies: Tensor
    axes: Tensor

    def __init__(self, model: VisMemModel) -> None:
        """The policy's own adapter is in it only where training switched it on."""
        super().__init__()
        language = model.backbone.model.model.language_model
        config, rotary = language.config, language.rotary_emb
        self.layers, self.norm, self.lm_head = language.layers, language.norm, model.backbone.head
        self.query, self.value = adapters_of(model.long.lora)
        self.has_policy = model.policy_lora.enabled
        if self.has_policy:
            self.policy_query, self.policy_value = adapters_of(model.policy_lora)
        self.tokens, self.long = model.tokens, model.long
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // self.heads
        self.rope_scale = float(rotary.attention_scaling)
        self.register_buffer("frequencies", rotary.inv_freq.clone().float())
        axes = [axis % 3 for axis, width in enumerate(rotary.mrope_section) for _ in range(width)]
        self.register_buffer("axes", nn.functional.one_hot(torch.tensor(axes), 3).float())  # (head_dim / 2, 3)

    def forward(
        self, embeddings: Tensor, mask: Tensor, positions: Tensor, adapter: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """One pass over new embeddings.

        embeddings (B, S, d); mask (B, T) 1.0 where past and new tokens are real; positions (3, B, S) float;
        adapter (B,) 1.0 where the long former's LoRA is on (the policy's is off there); past: key and value of each
        layer in turn (B, kv_heads, T - S, head_dim). Returns logits of the last position (B, V + 2), the two invokes
        last; hidden states after the final norm (B, S, d); the long memory that the last N_l of them make
        (B, <= N_l, d); and keys and values of the new embeddings (B, kv_heads, S, head_dim), in the past's order.
        """
        batch, length, _ = embeddings.shape
        angles = torch.einsum("abs,fa->bsf", positions, self.axes) * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)[:, None]  # (B, 1, S, head_dim)
        cos, sin = angles.cos() * self.rope_scale, angles.sin() * self.rope_scale
        total = mask.shape[1]
        place = torch.arange(total, device=mask.device)
        seen = (place[None] <= place[total - length :, None])[None] & (mask[:, None] > 0)
        bias = torch.where(seen, 0.0, MASKED)[:, None, None]  # (B, 1, 1, S, T)
        x, present = embeddings, []
        for number, layer in enumerate(self.layers):
            attention, y, switch = layer.self_attn, layer.input_layernorm(x), adapter[:, None, None]
            added_query, added_value = switch * self.query[number](y), switch * self.value[number](y)
            if self.has_policy:
                added_query = added_query + (1 - switch) * self.policy_query[number](y)
                added_value = added_value + (1 - switch) * self.policy_value[number](y)
            query, value = bare(attention.q_proj, y) + added_query, bare(attention.v_proj, y) + added_value
            parts = ((query, self.heads), (attention.k_proj(y), self.kv_heads), (value, self.kv_heads))
            query, key, value = (part.reshape(batch, length, n, self.head_dim).transpose(1, 2) for part, n in parts)
            present += [key := rotate(key, cos, sin), value]
            # Grouped attention without copies: of the past's keys neither for each query head nor before the new ones.
            query = rotate(query, cos, sin).reshape(batch, self.kv_heads, -1, length, self.head_dim)
            query, keys, values = query * self.head_dim**-0.5, (past[2 * number], key), (past[2 * number + 1], value)
            scores = torch.cat([query @ part[:, :, None].transpose(-1, -2) for part in keys], dim=-1) + bias
            weights, read = torch.softmax(scores, dim=-1), total - length
            mixed = weights[..., :read] @ values[0][:, :, None] + weights[..., read:] @ values[1][:, :, None]
            mixed = mixed.reshape(batch, self.heads, length, self.head_dim)
            x = x + attention.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        hidden = self.norm(x)
        last = hidden[:, -1]
        invoke = nn.functional.linear(last, self.tokens.head, self.tokens.bias)
        logits = torch.cat((self.lm_head(last), invoke), dim=-1)
        return logits, hidden, self.long.read_out(hidden), present


class VisionTower(nn.Module):
    """The vision encoder's blocks as functions of tokens; base of the two vision graphs.

    Attention is dense with a mask, so patches need no window permutation.
    """

    frequencies: Tensor

    def __init__(self, model: VisMemModel) -> None:
        super().__init__()
        visual = model.backbone.model.model.visual
        self.patch_embed, self.blocks, self.merger = visual.patch_embed, visual.blocks, visual.merger
        self.full = sorted(visual.fullatt_block_indexes)
        self.query, self.value = adapters_of(model.short.lora)
        self.heads, self.width = visual.config.num_heads, visual.config.hidden_size
        self.register_buffer("frequencies", visual.rotary_pos_emb.inv_freq.clone().float())

    def run(
        self, x: Tensor, positions: Tensor, adapter: Tensor, biases: Sequence[Tensor | None], stream: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """All blocks over tokens x (T, w) at positions (T, 2) float: row and column; (0, 0) rotates by nothing.

        biases: what is added to the scores (T, T) of full-attention blocks, and of the others. stream: key and value
        (heads, P, head width) of each full-attention block in turn, read beside the tokens' own, or nothing. Returns
        the tokens after the last block, and a stream of their own.
        """
        angles = (positions[:, :, None] * self.frequencies).reshape(positions.shape[0], -1)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        shape, own = (-1, self.heads, self.width // self.heads), []
        for number, block in enumerate(self.blocks):
            y = block.norm1(x)
            query, key, value = bare(block.attn.qkv, y).chunk(3, dim=-1)
            query = query + adapter * self.query[number](y)
            value = value + adapter * self.value[number](y)
            query, key, value = (part.reshape(shape).transpose(0, 1) for part in (query, key, value))
            query, key, bias = rotate(query, cos, sin), rotate(key, cos, sin), biases[number not in self.full]
            if number in self.full:
                own += [key, value]
                if stream:
                    seen = stream[len(own) - 2 : len(own)]
                    key, value = torch.cat((seen[0], key), dim=1), torch.cat((seen[1], value), dim=1)
            scores = query @ key.transpose(-1, -2) * block.attn.scaling
            weights = torch.softmax(scores if bias is None else scores + bias, dim=-1)
            x = x + block.attn.proj((weights @ value).transpose(0, 1).reshape(-1, self.width))
            x = x + block.mlp(block.norm2(x))
        return x, own


class VisionEncoder(VisionTower):
    """Patches to image features, and the stream that the short former reads."""

    def forward(
        self, pixels: Tensor, positions: Tensor, windows: Tensor, images: Tensor, adapter: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """All patches of one request.

        pixels (P, values); positions (P, 2) float; windows, images (P,): numbers of each patch's window and image;
        adapter (1,): 1.0 for the short former's stream. Returns features (P / g, d), patch embeddings (P, w), and the
        stream (see `run`).
        """
        weight = self.patch_embed.proj.weight  # the convolution's stride is its kernel, so it is a product
        embeds = nn.functional.linear(pixels, weight.reshape(self.width, -1))
        same_window = torch.where(windows[:, None] == windows[None], 0.0, MASKED)
        same_image = torch.where(images[:, None] == images[None], 0.0, MASKED)
        x, stream = self.run(embeds, positions, adapter, (same_image, same_window), ())
        return self.merger(x), embeds, stream


class ShortMemory(VisionTower):
    """F_s and the projector (Eq. 9-10): queries and memory tokens beside the patches' stream."""

    def __init__(self, model: VisMemModel) -> None:
        super().__init__(model)
        self.short = model.short

    def forward(
        self,
        queries: Tensor,
        segment: Tensor,
        positions: Tensor,
        features: Tensor,
        patch_embeds: Tensor,
        stream: list[Tensor],
    ) -> Tensor:
        """One memory (N_s, d).

        queries (K, d); segment (T, d), the current segment's hidden states; positions (P, 2) float of the patches;
        features, patch_embeds and stream: as VisionEncoder gives them with its adapter on. Where M_init stands alone,
        of these only queries and stream are read.
        """
        memory: Tensor = self.short.memory_init
        places = queries.new_zeros(len(queries) + len(memory), 2)  # the identity
        if self.short.patches:
            real = torch.ones_like(features[None, :, 0], dtype=torch.bool)
            said = summary(segment[None], torch.ones_like(segment[None, :, 0]))
            weight = self.short.look(queries[None], said, features[None], real)
            memory = memory + self.short.seen(weight, patch_embeds[None])[0]
            places = torch.cat((places[: len(queries)], self.short.seen(weight, positions[None])[0]))
        x = torch.cat((self.short.query(queries), memory))
        x, _ = self.run(x, places, torch.ones(1), (None, None), stream)
        result: Tensor = self.merger(x[len(queries) :])
        return result


class Builder(nn.Module):
    """B (Eq. 5): the cognitive state to queries, and to the tokens that the long former appends to its sequence."""

    def __init__(self, model: VisMemModel) -> None:
        super().__init__()
        self.builder, self.long = model.builder, model.long

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """H (T, d) of one row: Q (K, d), and [Q, M_init] as the language model reads them (K + N_l, d)."""
        queries: Tensor = self.builder(state[None], torch.ones_like(state[None, :, 0], dtype=torch.bool))[0]
        return queries, torch.cat((self.long.query(queries) * self.long.query_scale, self.long.memory_init))

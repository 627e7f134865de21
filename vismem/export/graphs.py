"""A VisMemModel on Qwen2.5-VL as pure functions of tensors, for ONNX: decoder, vision encoder, short former, builder.

They share the base's parameters, of which query, key and value are made one; the adapters are a switch at run time
(paper Sec. 3.3, Eq. 5-6 and 9-11).
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from vismem.models.lora import Lora
from vismem.models.memory import summary
from vismem.models.vismem import VisMemModel

MASKED = -1e9  # finite: a row that sees nothing must not become NaN


class Fused(nn.Module):
    """Linear layers over one input as one, and the adapters on them, which are switched at run time.

    W x + b + U (switch * D x), D and U the adapters' A and B, with 0 in U for the layers that they do not change.
    """

    def __init__(self, layers: Sequence[nn.Linear], adapters: Sequence[Lora]) -> None:
        super().__init__()
        starts = dict(zip(layers, accumulate((layer.out_features for layer in layers), initial=0), strict=False))
        self.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]).detach())
        self.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]).detach())
        own = [(lora, key, at) for lora in adapters for key, at in lora.targets.items() if at.module in starts]
        down = torch.cat([lora.down[key].detach() for lora, key, _ in own])
        up, rank = self.weight.new_zeros(len(self.weight), len(down)), 0
        for lora, key, at in own:
            first, part = starts[at.module] + at.start, lora.up[key].detach() * lora.scale
            up[first : first + len(part), rank : rank + part.shape[1]] = part
            rank += part.shape[1]
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    def forward(self, x: Tensor, switch: Tensor) -> Tensor:
        """(..., in) -> (..., out of all layers). `switch` broadcasts against (..., sum of the adapters' ranks)."""
        added = nn.functional.linear(switch * nn.functional.linear(x, self.down), self.up)
        return nn.functional.linear(x, self.weight, self.bias) + added


def normed(norm: Any, x: Tensor) -> Tensor:
    """An RMS norm, as ONNX Runtime knows it: of all its operations it makes one."""
    result: Tensor = norm.weight * (x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon))
    return result


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding on the last axis; `cos` and `sin` broadcast against `x`."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class Decoder(nn.Module):
    """The language model over embeddings, with past keys and values: prefill, decoding and long former (Eq. 11)."""

    frequencies: Tensor
    axes: Tensor
    slope: Tensor
    start: Tensor

    def __init__(self, model: VisMemModel) -> None:
        """The policy's own adapter is in it only where training switched it on."""
        super().__init__()
        language = model.backbone.model.model.language_model
        config, rotary = language.config, language.rotary_emb
        self.layers, self.norm, self.lm_head = language.layers, language.norm, model.backbone.head
        adapters = [model.long.lora, model.policy_lora] if model.policy_lora.enabled else [model.long.lora]
        attentions = [layer.self_attn for layer in self.layers]
        fused = [Fused([own.q_proj, own.k_proj, own.v_proj], adapters) for own in attentions]
        self.attention = nn.ModuleList(fused)
        policy = torch.zeros(len(fused[0].down))  # whether a rank is of the policy's adapter
        policy[2 * model.long.lora.settings.rank :] = 1.0
        self.register_buffer("slope", 1 - 2 * policy)
        self.register_buffer("start", policy)
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
        switch = adapter[:, None, None] * self.slope + self.start
        x, present, read = embeddings, [], total - length
        for number, layer in enumerate(self.layers):
            fused = self.attention[number](normed(layer.input_layernorm, x), switch)
            heads = fused.reshape(batch, length, -1, self.head_dim).transpose(1, 2)
            turned, value = rotate(heads[:, : -self.kv_heads], cos, sin), heads[:, -self.kv_heads :]
            query, key = turned[:, : self.heads], turned[:, self.heads :]
            present += [key, value]
            # The queries that share a key stand below each other. So the past's keys are not copied, neither for each
            # of them nor before the new ones.
            query = query.reshape(batch, self.kv_heads, -1, self.head_dim) * self.head_dim**-0.5
            keys, values = past[2 * number], past[2 * number + 1]
            scores = torch.cat([query @ keys.transpose(-1, -2), query @ key.transpose(-1, -2)], dim=-1)
            scores = scores.reshape(batch, self.kv_heads, -1, length, total) + bias
            weights = torch.softmax(scores, dim=-1).reshape(batch, self.kv_heads, -1, total)
            mixed = weights[..., :read] @ values + weights[..., read:] @ value
            mixed = mixed.reshape(batch, self.heads, length, self.head_dim).transpose(1, 2)
            x = x + layer.self_attn.o_proj(mixed.reshape(batch, length, -1))
            x = x + layer.mlp(normed(layer.post_attention_layernorm, x))
        hidden = normed(self.norm, x)
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
        self.attention = nn.ModuleList(Fused([block.attn.qkv], [model.short.lora]) for block in self.blocks)
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
        own = list[Tensor]()
        for number, block in enumerate(self.blocks):
            fused = self.attention[number](normed(block.norm1, x), adapter)
            heads = fused.reshape(-1, 3 * self.heads, self.width // self.heads).transpose(0, 1)
            turned, value = rotate(heads[: 2 * self.heads], cos, sin), heads[2 * self.heads :]
            query, key = turned[: self.heads], turned[self.heads :]
            bias = biases[number not in self.full]
            if number in self.full:
                own += [key, value]
                if stream:
                    seen = stream[len(own) - 2 : len(own)]
                    key, value = torch.cat((seen[0], key), dim=1), torch.cat((seen[1], value), dim=1)
            scores = query @ key.transpose(-1, -2) * block.attn.scaling
            weights = torch.softmax(scores if bias is None else scores + bias, dim=-1)
            x = x + block.attn.proj((weights @ value).transpose(0, 1).reshape(-1, self.width))
            x = x + block.mlp(normed(block.norm2, x))
        return x, own

    def project(self, x: Tensor) -> Tensor:
        """The family's own projector: (T, w) to (T / g, d)."""
        tokens: Tensor = self.merger.mlp(normed(self.merger.ln_q, x).reshape(-1, self.merger.hidden_size))
        return tokens


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
        return self.project(x), embeds, stream


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
        return self.project(x[len(queries) :])


class Builder(nn.Module):
    """B (Eq. 5): the cognitive state to queries, and to the tokens that the long former appends to its sequence."""

    def __init__(self, model: VisMemModel) -> None:
        super().__init__()
        self.builder, self.long = model.builder, model.long

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """H (T, d) of one row: Q (K, d), and [Q, M_init] as the language model reads them (K + N_l, d)."""
        queries: Tensor = self.builder(state[None], torch.ones_like(state[None, :, 0], dtype=torch.bool))[0]
        return queries, torch.cat((self.long.query(queries) * self.long.query_scale, self.long.memory_init))

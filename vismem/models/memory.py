"""Query builder, short-term and long-term memory former (paper Sec. 3.3, Eq. 5-6 and 9-11)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from vismem.config import MemoryConfig
from vismem.errors import UserError
from vismem.models.backbones.base import Backbone, PatchStream, Prompt, following
from vismem.models.lora import Lora, LoraSettings

OWN = 5.0  # score of the token that a slot of a short memory takes, above all others
ALIKE = 1e-3  # difference of scores from which on one token is liked better than another
LIKE = 2.0  # by which the likeness of what is being said and a token adds to its score, before training


class BuilderLayer(nn.Module):
    """One pre-norm transformer layer: self-attention and feed-forward, each with a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """`hidden` (R, T, d), `mask` (R, 1, T, T) True where a token may be read."""
        rows, length, width = hidden.shape
        fused = self.qkv(self.norm1(hidden)).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = fused.transpose(1, 3).unbind(2)
        attended = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        hidden = hidden + self.out(attended.transpose(1, 2).reshape(rows, length, width))
        result: Tensor = hidden + self.down(nn.functional.gelu(self.up(self.norm2(hidden))))
        return result


class QueryBuilder(nn.Module):
    """B, shared by both memories: Q = B([H, Q_init])[-K:] (Eq. 5). Queries read H and each other; H reads only H."""

    def __init__(self, width: int, config: MemoryConfig) -> None:
        super().__init__()
        if width % config.builder_heads:
            raise UserError(f"memory.builder_heads {config.builder_heads} must divide the base's width, {width}")
        self.query_init = nn.Parameter(torch.randn(config.queries, width) * config.init_std)
        self.layers = nn.ModuleList(BuilderLayer(width, config.builder_heads) for _ in range(config.builder_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, state: Tensor, mask: Tensor) -> Tensor:
        """Cognitive state H (R, T, d) with `mask` (R, T) True on real entries; returns Q (R, K, d)."""
        rows, length, _ = state.shape
        count = self.query_init.shape[0]
        queries = self.query_init.expand(rows, -1, -1)
        hidden = torch.cat([state.to(queries.dtype), queries], dim=1)
        keys = torch.cat([mask, mask.new_ones(rows, count)], dim=1)
        readable = keys[:, None, None, :].repeat(1, 1, length + count, 1)
        readable[:, :, :length, length:] = False  # H never reads the queries
        readable = readable | torch.eye(length + count, dtype=torch.bool, device=mask.device)  # padding reads itself
        for layer in self.layers:
            hidden = layer(hidden, readable)
        result: Tensor = self.norm(hidden[:, length:])
        return result


class ShortFormer(nn.Module):
    """F_s: a LoRA adapter over the frozen vision encoder, then the VLM's own projector (Eq. 9-10).

    M_init has g * N_s vectors, since the projector merges g into one. With short_init 'patches' they are added to the
    patch embeddings of a look at the row's images (`look`), at those patches' positions; so an untrained short memory
    shows the images' tokens that are most like what is being said, and training moves the look. With 'random' they
    stand alone, at the identity position, as the paper writes.
    """

    def __init__(self, backbone: Backbone, config: MemoryConfig, adapter: LoraSettings) -> None:
        super().__init__()
        self.length, self.merge, self.patches = config.short_length, backbone.merge, config.short_init == "patches"
        width = backbone.vision_width
        self.query = nn.Linear(backbone.width, width)
        nn.init.normal_(self.query.weight, std=config.init_std)
        nn.init.zeros_(self.query.bias)
        random = torch.randn(self.merge * config.short_length, width) * config.init_std
        self.memory_init = nn.Parameter(torch.zeros_like(random) if self.patches else random)
        self.wanted = nn.Linear(2 * backbone.width, backbone.width, bias=False)
        nn.init.eye_(self.wanted.weight)  # of the segment, not of Q
        self.wanted.weight.data *= LIKE
        self.lora = Lora(backbone.vision_targets(), adapter)

    def forward(
        self, backbone: Backbone, queries: Tensor, segment: Tensor, stream: PatchStream, sample: Tensor
    ) -> Tensor:
        """Queries (R, K, d), `summary` of the segment (R, d), the samples' patch stream made with this adapter, rows'
        samples (R,): (R, N_s, d).
        """
        rows, count, _ = queries.shape
        memory = self.memory_init.expand(rows, -1, -1)
        positions = queries.new_full((rows, count + memory.shape[1], 2), -1.0)
        if self.patches:
            real = stream.vision.mask[:, :: self.merge]
            weight = self.look(queries, segment, stream.features[sample], real[sample])
            memory = memory + self.seen(weight, stream.embeds[sample])
            positions[:, count:] = self.seen(weight, stream.vision.positions[sample].to(weight.dtype))
        tokens = torch.cat([self.query(queries), memory], dim=1)
        with self.lora.active():
            hidden = backbone.memory_stream(tokens, positions, stream, sample)
        return backbone.project(hidden[:, count:])

    def look(self, queries: Tensor, segment: Tensor, features: Tensor, real: Tensor) -> Tensor:
        """Where the slots look: (R, N_s, T) weights over the rows' image tokens, each slot's sum 1; 0 without images.

        queries (R, K, d); segment (R, d); features (R, T, d) of the image tokens, those that are no padding marked in
        real (R, T). What a slot wants, a linear map of segment and query, is compared with the tokens' features, each
        over its own scale: at first, the segment is. Slot after slot takes the token that it likes best of those left,
        and sees little else.
        """
        features = features.to(queries.dtype)
        keys = features * torch.rsqrt(features.pow(2).mean(-1, keepdim=True) + 1e-6)
        slot = torch.arange(self.length, device=real.device)
        asked = queries[:, slot * queries.shape[1] // self.length]
        wanted = self.wanted(torch.cat([segment[:, None].expand_as(asked), asked], dim=-1))
        liked = wanted @ keys.transpose(1, 2) / wanted.shape[-1] ** 0.5
        weight: Tensor = in_turn(liked, real) * real[:, None]
        return weight

    def seen(self, weight: Tensor, patches: Tensor) -> Tensor:
        """(R, g * N_s, n) what the slots see of patches (R, g * T, n): the weighted mean of tokens of g patches."""
        rows, count, width = patches.shape
        seen = weight.to(patches.dtype) @ patches.reshape(rows, count // self.merge, self.merge * width)
        return seen.view(rows, self.length * self.merge, width)


@dataclass
class FormationInputs:
    """Everything that R rows' memories are formed from, at their invoke tokens."""

    sample: Tensor  # (R,) index of each row's prompt
    cognitive: Tensor  # (R, T, d) H: visual hidden states, then those of the current segment, right-padded
    cognitive_mask: Tensor  # (R, T)
    segment_mask: Tensor  # (R, T) the same without the visual ones
    stream: Tensor  # (R, X, d) the row's embeddings so far, right-padded (long-term memory)
    positions: Tensor  # (3, R, X)
    stream_mask: Tensor  # (R, X)
    stream_visual: Tensor  # (R, X) True at the prompt's image tokens
    patches: PatchStream | None  # of all prompts, made by `short_stream` (short-term memory)
    prefix: DynamicCache | None = None  # of all prompts, made by `long_prefix`: saves time (long-term memory)


class LongFormer(nn.Module):
    """F_l: a LoRA adapter over the frozen language model, M = F_l([X, Q, M_init])[-N_l:] (Eq. 11).

    Hidden states have another scale than embeddings: a learned projection and a learned scale (initially the ratio of
    the two) bring the memory into the embedding space. With long_init 'patches', M_init is added to pooled image tokens
    of the row, and the projection is initialised to zero; with 'random' M_init is random and the projection is
    initialised to the identity.
    """

    def __init__(self, backbone: Backbone, config: MemoryConfig, adapter: LoraSettings) -> None:
        super().__init__()
        width = backbone.width
        self.length, self.patches = config.long_length, config.long_init == "patches"
        scale = root_mean_square(backbone.embedding.weight).cpu()
        random = torch.randn(config.long_length, width) * scale
        self.memory_init = nn.Parameter(torch.zeros_like(random) if self.patches else random)
        self.query = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.query.weight)
        nn.init.zeros_(self.output.weight) if self.patches else nn.init.eye_(self.output.weight)
        self.query_scale = nn.Parameter(scale.clone())
        self.output_scale = nn.Parameter(scale.clone())
        self.lora = Lora(backbone.language_targets(), adapter)

    def prefill(self, backbone: Backbone, prompt: Prompt) -> DynamicCache:
        """Run as many first tokens as all prompts have through the language model, with this adapter."""
        length = int(prompt.mask.sum(1).min())
        cache = DynamicCache()
        with self.lora.active():
            backbone.language(
                prompt.embeds[:, :length], prompt.positions[:, :, :length], causal_mask(prompt.mask[:, :length]), cache
            )
        return cache

    def forward(self, backbone: Backbone, queries: Tensor, inputs: FormationInputs) -> Tensor:
        """Queries (R, K, d) and the rows' own embeddings: (R, N_l, d)."""
        stream, positions, mask = inputs.stream, inputs.positions, inputs.stream_mask
        rows = len(stream)
        memory = self.memory_init.expand(rows, -1, -1)
        if self.patches:
            memory = memory + pooling(inputs.stream_visual, self.length).to(stream.dtype) @ stream
        added = torch.cat([self.query(queries) * self.query_scale, memory], dim=1)
        extra = added.shape[1]
        tail = following(positions, mask)[:, None] + torch.arange(extra, device=mask.device)
        keys = torch.cat([mask, mask.new_ones(rows, extra)], dim=1)
        cache = None if inputs.prefix is None else rows_of(inputs.prefix, inputs.sample)
        cached = 0 if cache is None else cache.get_seq_length()
        with self.lora.active():
            hidden = backbone.language(
                torch.cat([stream[:, cached:], added.to(stream.dtype)], dim=1),
                torch.cat([positions, tail.expand(3, -1, -1)], dim=2)[:, :, cached:],
                causal_mask(keys, keys.shape[1] - cached),
                cache,
            )
        result = self.read_out(hidden.to(self.output.weight.dtype))
        return result + memory if self.patches else result

    def read_out(self, hidden: Tensor) -> Tensor:
        """Hidden states (R, T, d), of which the last N_l go into the embedding space (R, N_l, d)."""
        last = hidden[:, -self.length :]
        result: Tensor = self.output(last * torch.rsqrt(last.pow(2).mean(-1, keepdim=True) + 1e-6)) * self.output_scale
        return result


def rows_of(cache: DynamicCache, sample: Tensor) -> DynamicCache:
    """The rows `sample` (R,) of a cache, which stays as it is."""
    return DynamicCache((layer.keys[sample], layer.values[sample]) for layer in cache.layers)


def in_turn(liked: Tensor, real: Tensor) -> Tensor:
    """(R, N, T) shares: slot after slot takes the token that it likes best of those left, and sees little else of them.

    `liked` (R, N, T); `real` (R, T) marks the tokens; where all are taken, all are left again. Of those alike to ALIKE
    it takes the first, so that kernels which round otherwise choose the same.
    """
    if not real.shape[1]:
        return liked
    left, shares, place = real, [], torch.arange(real.shape[1], device=real.device)
    for slot in liked.unbind(1):
        scores = slot.masked_fill(~left, torch.finfo(slot.dtype).min)
        rank = (scores.detach() / ALIKE).round()
        best = place == rank.argmax(1, keepdim=True)
        shares.append((scores + OWN * best).softmax(-1))
        left = left & ~best
        left = left | (real & ~left.any(1, keepdim=True))
    return torch.stack(shares, dim=1)


def summary(states: Tensor, mask: Tensor) -> Tensor:
    """(R, d) the mean of the marked states (R, T, d), each over its root mean square, over its own; 0 of none.

    Hidden states point to the words that come next, so it is near the words of what is being said.
    """
    states = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + 1e-6)
    mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
    result: Tensor = mean * torch.rsqrt(mean.pow(2).mean(-1, keepdim=True) + 1e-6)
    return result


def pooling(visual: Tensor, slots: int) -> Tensor:
    """(R, slots, T) weights that divide the marked tokens of (R, T) evenly among slots, in order.

    A slot is the mean of its tokens; where there are fewer tokens than slots, tokens are repeated.
    """
    counts = visual.sum(1)[:, None, None]
    rank = (visual.cumsum(1) - 1)[:, None, :]  # of each marked token among them
    slot = torch.arange(slots, device=visual.device)[None, :, None]
    shared = (rank * slots // counts.clamp_min(1)) == slot
    copied = (slot * counts // slots) == rank
    weight = torch.where(counts >= slots, shared, copied) & visual[:, None, :]
    return weight / weight.sum(-1, keepdim=True).clamp_min(1)


@torch.no_grad()
def root_mean_square(table: Tensor) -> Tensor:
    """Of all numbers of a table (rows, d), in float32, of which never more than 4,096 rows are held."""
    parts = torch.split(table, 4096)
    means = torch.stack([part.float().pow(2).mean() for part in parts])
    shares = torch.tensor([len(part) / len(table) for part in parts], device=table.device)
    return (means * shares).sum().sqrt()


def causal_mask(keys: Tensor, queries: int | None = None) -> Tensor:
    """(R, T) real entries to the causal (R, 1, T, T) mask, or to its last `queries` rows.

    Every entry may read itself, so that no row is empty.
    """
    key = torch.arange(keys.shape[1], device=keys.device)
    query = key[keys.shape[1] - queries if queries else 0 :, None]
    return (keys[:, None, None, :] & (key <= query)) | (key == query)

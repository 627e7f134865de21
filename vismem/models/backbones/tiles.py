"""What InternVL and LLaVA-OneVision share: a vision encoder that sees square tiles of one size, each by itself, with
learned positions inside the patch embeddings; and a language model with one-axis positions.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vismem.models.backbones.base import Backbone, Clip, Inputs, PatchStream, VisionInput
from vismem.models.lora import LoraTarget


class TiledBackbone(Backbone):
    """See Backbone. All tiles go through the encoder as one batch; a memory reads every tile of its sample.

    Memory tokens join after the position embeddings, so their `positions` have no say.
    """

    side: int  # s, patches that the projector merges are s x s: merge = s * s
    layers_name: str  # of `blocks` in the vision encoder
    attention_name: str  # in a block
    convolution_name: str  # that embeds the patches, in the vision encoder's embeddings

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        self.merge = self.side**2
        self.tower = model.model.vision_tower
        self.convolution = self.tower.embeddings.get_submodule(self.convolution_name)
        self.patch_size: int = self.convolution.kernel_size[0]
        self.heads = int(self.settings.num_attention_heads)
        layers = model.config.vision_feature_layer
        depth = int(self.settings.num_hidden_layers)
        self.layers = [i % (depth + 1) for i in ([layers] if isinstance(layers, int) else layers)]
        self.blocks = getattr(self.tower.encoder, self.layers_name)[: max(self.layers)]

    # --- what a family says ---

    @abstractmethod
    def _tiles(self, encoded: Any, images: list[list[Any]]) -> tuple[Tensor, list[int]]:
        """The processor's pixels as (B, channels, height, width), and how many of the B tiles each sample has."""

    @abstractmethod
    def _coarse(self, encoded: Any, texts: list[str], images: list[list[Any]], pixels: int) -> Any:
        """The same prompts, encoded with fewer tiles: of each image at most `pixels`, but one tile at least."""

    @abstractmethod
    def _features(self, hidden: Tensor, encoded: Any) -> Tensor:
        """All tiles' selected states (B, n, w), in merge order, to the prompts' image features (tokens, d)."""

    @abstractmethod
    def _placed(self, embedded: Tensor) -> Tensor:
        """Embedded patches (B, n, w) in merge order, with positions and class tokens: (B, class tokens + n, w)."""

    @abstractmethod
    def _qkv(self, block: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A block's queries, keys and values (B, T, w)."""

    @abstractmethod
    def _rest(self, block: Any, hidden: Tensor, attended: Tensor) -> Tensor:
        """What a block does once attention (B, T, w) is done."""

    def _select(self, states: Mapping[int, Tensor]) -> Tensor:
        """The states that the projector takes, of those before the first block (0) and behind each one."""
        return torch.cat([states[layer] for layer in self.layers], dim=-1)

    # --- the prompt ---

    def inputs(
        self, texts: list[str], images: list[list[Any]], videos: list[list[Clip]], whole: bool = False
    ) -> Inputs:
        encoded = self._encoded(texts, images)
        shown = encoded
        if self.prompt_pixels is not None and not whole and any(images):
            shown = self._coarse(encoded, texts, images, self.prompt_pixels)
        mask = shown["attention_mask"].bool()
        positions = (mask.cumsum(1) - 1).clamp_min(0).expand(3, -1, -1)
        patches, counts, seen = self.embedding.weight.new_zeros(0, 0, 1), [0] * len(texts), None
        if any(images):
            patches, counts = self._cut(encoded, images)
            seen = patches if shown is encoded else self._cut(shown, images)[0]
        ids = shown["input_ids"]
        visual = ids == self.model.config.image_token_id
        return Inputs(ids, positions, mask, visual, self._vision_input(patches, counts), (seen, shown))

    def _cut(self, encoded: Any, images: list[list[Any]]) -> tuple[Tensor, list[int]]:
        """The patches (B, n, values) of all tiles, and how many tiles each sample has."""
        pixels, counts = self._tiles(encoded, images)
        return self._patches(pixels.to(self.embedding.weight.dtype)), counts

    def features(self, inputs: Inputs) -> Tensor | None:
        seen, shown = inputs.more
        return None if seen is None else self._features(self._run(self._embed(seen))[:, -seen.shape[1] :], shown)

    def _encoded(self, texts: list[str], images: list[list[Any]], **more: Any) -> Any:
        """What the processor makes of them, on the model's device."""
        padding = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
        return self.processor(text=texts, images=images if any(images) else None, **padding, **more).to(self.device)

    def _patches(self, pixels: Tensor) -> Tensor:
        """Tiles (B, channels, height, width) to flattened patches (B, n, values) in merge order."""
        size, side = self.patch_size, self.side
        tiles, channels = pixels.shape[:2]
        rows, columns = (length // size for length in pixels.shape[2:])
        pixels = pixels[:, :, : rows * size, : columns * size]
        split = pixels.reshape(tiles, channels, rows // side, side, size, columns // side, side, size)
        return split.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(tiles, rows * columns, channels * size**2)

    def _order(self, count: int) -> Tensor:
        """(n,) the place, row by row in its tile, of each of n patches in merge order."""
        grid = round(count**0.5)
        merged = grid // self.side
        places = torch.arange(count, device=self.device).view(merged, self.side, merged, self.side)
        return places.transpose(1, 2).flatten()

    def _vision_input(self, patches: Tensor, counts: list[int]) -> VisionInput:
        """Pack all tiles' patches (B, n, values) by sample, right-padded."""
        rows, longest = len(counts), max(counts)
        n, values = patches.shape[1:]
        tile = torch.arange(longest, device=self.device)
        present = tile < torch.tensor(counts, device=self.device)[:, None]
        packed = patches.new_zeros(rows, longest, n, values)
        packed[present] = patches
        order = self._order(n)
        grid = max(1, round(n**0.5))
        places = torch.stack([order // grid, order % grid], dim=-1)
        image = torch.where(present, tile, -1).repeat_interleave(n, dim=1)
        return VisionInput(packed.flatten(1, 2), places.repeat(rows, longest, 1), image, image)

    # --- the vision encoder ---

    def patch_stream(self, vision: VisionInput) -> PatchStream:
        samples, length, values = vision.patches.shape
        if not length:
            return self.without_patches(vision)
        tiles = int(vision.image.max()) + 1
        n = length // tiles
        present = vision.image.view(samples, tiles, n)[..., 0] >= 0
        table = (present.flatten().cumsum(0) - 1).clamp_min(0)  # (S * tiles,) each tile's place in the batch

        def by_sample(tokens: Tensor) -> Tensor:
            return tokens[table].view(samples, -1, tokens.shape[-1])

        keys_values: list[tuple[Tensor, Tensor]] = []

        def keep(*own: Tensor) -> None:
            key, value = (self._heads(by_sample(each)) for each in own)
            keys_values.append((key, value))

        embeds = self._embed(vision.patches.view(samples, tiles, n, values)[present])
        hidden = self._run(embeds, keep)
        readable = present.repeat_interleave(embeds.shape[1], dim=1)
        features = self.through(self.project, by_sample(hidden[:, -n:]))
        return PatchStream(by_sample(embeds[:, -n:]), keys_values, features, vision, readable)

    def _embed(self, patches: Tensor) -> Tensor:
        """Flattened pixels (B, n, values) in merge order to states before the first block (B, class tokens + n, w)."""
        return self._placed(nn.functional.linear(patches, self.convolution.weight.flatten(1), self.convolution.bias))

    def _run(
        self,
        hidden: Tensor,
        keep: Callable[[Tensor, Tensor], None] | None = None,
        read: Sequence[Sequence[Tensor]] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, T, w) through all blocks, to what the projector takes of their states.

        Each block's keys and values (B, T, w) are given to `keep`; `read` are those (S, heads, keys, head width) that
        it reads besides, and the rows' samples (B,), under `mask` (B, 1, T, keys + T).
        """
        states = {0: hidden}
        for number, block in enumerate(self.blocks):
            hidden, *own = self.through(self._block, block, hidden, mask, *(read[number] if read else ()))
            if keep is not None:
                keep(*own)
            if number + 1 in self.layers:
                states[number + 1] = hidden
        return self._select(states)

    def _block(self, block: Any, hidden: Tensor, mask: Tensor | None, *read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = self._qkv(block, hidden)
        query, key, value = map(self._heads, own)
        if read:
            keys, values, sample = read
            key, value = torch.cat([keys[sample], key], dim=2), torch.cat([values[sample], value], dim=2)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self._rest(block, hidden, attended.transpose(1, 2).flatten(2)), own[1], own[2]

    def memory_stream(self, tokens: Tensor, positions: Tensor, stream: PatchStream, sample: Tensor) -> Tensor:
        read = [(*kept, sample) for kept in stream.keys_values]
        mask = stream.memory_mask(sample, tokens.shape[1])
        return self._run(tokens.to(stream.embeds.dtype), read=read, mask=mask)

    def _heads(self, tokens: Tensor) -> Tensor:
        """(B, T, w) to (B, heads, T, head width)."""
        rows, length, width = tokens.shape
        return tokens.view(rows, length, self.heads, width // self.heads).transpose(1, 2)

    def project(self, hidden: Tensor) -> Tensor:
        rows, length, width = hidden.shape
        merged = hidden.reshape(rows, length // self.merge, self.merge * width)
        projected: Tensor = self.model.model.multi_modal_projector(merged)
        return projected

    def vision_targets(self) -> list[LoraTarget]:
        return [
            LoraTarget(f"{self.layers_name}.{i}.{self.attention_name}.{name}", linear, 0, linear.out_features)
            for i, block in enumerate(self.blocks)
            for name in ("q_proj", "v_proj")
            for linear in (getattr(getattr(block, self.attention_name), name),)
        ]

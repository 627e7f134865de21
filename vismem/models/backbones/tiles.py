"""What InternVL and LLaVA-OneVision share: a vision encoder that sees square tiles of one size, each by itself, with
learned positions inside the patch embeddings; and a language model with one-axis positions.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from vismem.errors import UserError
from vismem.models.backbones.base import Backbone, Clip, PatchStream, Prompt, VisionInput
from vismem.models.lora import LoraTarget


class TiledBackbone(Backbone):
    """See Backbone. All tiles go through the encoder as one batch; a memory reads every tile of its sample.

    Memory tokens join after the position embeddings, so their `positions` have no say.
    """

    side: int  # s, patches that the projector merges are s x s: merge = s * s
    layers_name: str  # of `blocks` in the vision encoder
    attention_name: str  # in a block

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        self.processor = processor
        self.settings = model.config.vision_config
        self.tower = model.model.vision_tower
        self.blocks = getattr(self.tower.encoder, self.layers_name)
        self.heads = int(self.settings.num_attention_heads)
        self.projector = model.model.multi_modal_projector
        layers = model.config.vision_feature_layer
        depth = int(self.settings.num_hidden_layers)
        self.layers = [i % (depth + 1) for i in ([layers] if isinstance(layers, int) else layers)]
        self.depth = max(self.layers)  # later blocks have no say
        if "sliding_attention" in (getattr(model.config.text_config, "layer_types", None) or ()):
            raise UserError(f"a {self.family} whose language model uses sliding-window attention is not supported")

    @property
    def merge(self) -> int:
        return self.side**2

    # --- what a family says ---

    @abstractmethod
    def _tiles(self, encoded: Any, images: list[list[Any]]) -> tuple[Tensor, list[int]]:
        """The processor's pixels as (B, channels, height, width), and how many of the B tiles each sample has."""

    @abstractmethod
    def _features(self, hidden: Tensor, encoded: Any) -> Tensor:
        """All tiles' selected states (B, n, w), in merge order, to the prompts' image features (tokens, d)."""

    @abstractmethod
    def _embed(self, patches: Tensor) -> Tensor:
        """Flattened pixels (B, n, values) in merge order to states before the first block (B, class tokens + n, w)."""

    @abstractmethod
    def _qkv(self, block: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A block's queries, keys and values (B, T, w)."""

    @abstractmethod
    def _rest(self, block: Any, hidden: Tensor, attended: Tensor) -> Tensor:
        """What a block does once attention (B, T, w) is done."""

    def _select(self, states: list[Tensor]) -> Tensor:
        """The states that the projector takes, of those before the first and after each block."""
        return torch.cat([states[layer] for layer in self.layers], dim=-1)

    # --- the prompt ---

    def prompt(self, texts: list[str], images: list[list[Any]], videos: list[list[Clip]]) -> Prompt:
        padding = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
        encoded = self.processor(text=texts, images=images if any(images) else None, **padding).to(self.device)
        mask = encoded["attention_mask"].bool()
        embeds = self.embedding(encoded["input_ids"])
        visual = encoded["input_ids"] == self.model.config.image_token_id
        positions = (mask.cumsum(1) - 1).clamp_min(0).expand(3, -1, -1)
        vision = self._vision_input(None, [0] * len(texts))
        if any(images):
            pixels, counts = self._tiles(encoded, images)
            patches = self._patches(pixels.to(embeds.dtype))
            vision = self._vision_input(patches, counts)
            states = self._run(self._embed(patches))
            features = self._features(self._select(states)[:, -patches.shape[1] :], encoded)
            embeds = embeds.masked_scatter(visual[..., None], features.to(embeds.dtype))
        return Prompt(embeds, positions, mask, visual & mask, vision)

    def _patches(self, pixels: Tensor) -> Tensor:
        """Tiles (B, channels, height, width) to flattened patches (B, n, values) in merge order."""
        size, side = self._patch_size, self.side
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

    @property
    def _patch_size(self) -> int:
        size = self.settings.patch_size
        return int(size if isinstance(size, int) else size[0])

    def _vision_input(self, patches: Tensor | None, counts: list[int]) -> VisionInput:
        """Pack all tiles' patches (B, n, values) by sample, right-padded."""
        rows, longest = len(counts), max(counts)
        if patches is None:
            values = self.settings.num_channels * self._patch_size**2
            patches = torch.zeros(0, 0, values, dtype=self.embedding.weight.dtype, device=self.device)
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
        tiles = self._tile_count(vision)
        if not tiles:
            return self.without_patches(vision, self.heads, self.depth, len(self.layers))
        n = length // tiles
        present = vision.image.view(samples, tiles, n)[..., 0] >= 0
        table = (present.flatten().cumsum(0) - 1).clamp_min(0)  # (S * tiles,) each tile's place in the batch

        def by_sample(tokens: Tensor) -> Tensor:
            return tokens[table].view(samples, -1, tokens.shape[-1])

        kept: list[tuple[Tensor, Tensor]] = []
        embeds = self._embed(vision.patches.view(samples, tiles, n, values)[present])
        states = self._run(embeds, kept)
        keys_values = [(self._heads(by_sample(key)), self._heads(by_sample(value))) for key, value in kept]
        return PatchStream(by_sample(embeds[:, -n:]), keys_values, by_sample(self._select(states)[:, -n:]), vision)

    def _run(self, hidden: Tensor, kept: list[tuple[Tensor, Tensor]] | None = None) -> list[Tensor]:
        """Tiles' states (B, T, w) before the first and after each block; keys and values go into `kept`."""
        states = [hidden]
        for block in self.blocks[: self.depth]:
            query, key, value = self._qkv(block, hidden)
            if kept is not None:
                kept.append((key, value))
            hidden = self._rest(block, hidden, self._attend(query, self._heads(key), self._heads(value)))
            states.append(hidden)
        return states

    def memory_stream(self, tokens: Tensor, positions: Tensor | None, stream: PatchStream, sample: Tensor) -> Tensor:
        rows, length, _ = tokens.shape
        patches = self._readable(stream)[sample][:, None, None, :].expand(-1, -1, length, -1)
        own = torch.ones(rows, 1, length, length, dtype=torch.bool, device=tokens.device)
        mask = torch.cat([patches, own], dim=-1)
        hidden = tokens.to(stream.embeds.dtype)
        states = [hidden]
        for block, (keys, values) in zip(self.blocks[: self.depth], stream.keys_values, strict=True):
            query, key, value = self._qkv(block, hidden)
            keys = torch.cat([keys[sample], self._heads(key)], dim=2)
            values = torch.cat([values[sample], self._heads(value)], dim=2)
            hidden = self._rest(block, hidden, self._attend(query, keys, values, mask))
            states.append(hidden)
        return self._select(states)

    @staticmethod
    def _tile_count(vision: VisionInput) -> int:
        """Tiles of the sample that has most of them."""
        return int(vision.image.max()) + 1 if vision.image.numel() else 0

    def _readable(self, stream: PatchStream) -> Tensor:
        """(S, keys) True on the keys of real tiles, class tokens among them."""
        mask, tiles = stream.vision.mask, self._tile_count(stream.vision)
        if not tiles:
            return mask
        keys = stream.keys_values[0][0].shape[2] if stream.keys_values else mask.shape[1]
        return mask[:, :: mask.shape[1] // tiles].repeat_interleave(keys // tiles, dim=1)

    def _heads(self, tokens: Tensor) -> Tensor:
        """(B, T, w) to (B, heads, T, head width)."""
        rows, length, width = tokens.shape
        return tokens.view(rows, length, self.heads, width // self.heads).transpose(1, 2)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        attended = nn.functional.scaled_dot_product_attention(self._heads(query), keys, values, attn_mask=mask)
        return attended.transpose(1, 2).flatten(2)

    def project(self, hidden: Tensor) -> Tensor:
        rows, length, width = hidden.shape
        projected: Tensor = self.projector(hidden.reshape(rows, length // self.merge, self.merge * width))
        return projected

    def vision_targets(self) -> list[LoraTarget]:
        return [
            LoraTarget(f"{self.layers_name}.{i}.{self.attention_name}.{name}", linear, 0, linear.out_features)
            for i, block in enumerate(self.blocks[: self.depth])
            for name in ("q_proj", "v_proj")
            for linear in (getattr(getattr(block, self.attention_name), name),)
        ]

    # --- the language model ---

    def language(self, embeds: Tensor, positions: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
        return self._language(embeds, positions[0], mask, cache)

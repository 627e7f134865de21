"""A frozen VLM with latent vision memory: form memories, embed and score the grown vocabulary, save and load."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache

from vismem.config import InvocationConfig, MemoryConfig
from vismem.errors import UserError, first_line
from vismem.files import read_json, write_json
from vismem.models.backbones.base import Backbone, PatchStream, Prompt, VisionInput
from vismem.models.checkpointing import checkpointed
from vismem.models.kinds import MemoryKind
from vismem.models.loading import load_base, read_weights, take_weights
from vismem.models.lora import Lora, LoraSettings
from vismem.models.memory import FormationInputs, LongFormer, QueryBuilder, ShortFormer, summary
from vismem.models.policy import PolicyWeights, TokenRows
from vismem.models.processors import differing
from vismem.models.tokens import KINDS, add_memory_tokens, delimiter_ids
from vismem.runtime.limits import MAX_NEW_TOKENS, NEW_TOKENS

FORMAT = 3  # of what `save_pretrained` writes; in 1 and 2 a short memory showed means of image tokens
SAVED = {"format", "family", "memory", "invocation", "memory_ids", "policy_lora"}  # what `vismem.json` says, always
# of a memory's settings, those that its weights do not show
FREE = ("lora_dropout", "init_std", "image_pixels", "prompt_pixels")


class VisMemModel(nn.Module):
    """The base stays outside the module's parameters: `parameters()` and `state_dict()` are what VisMem adds."""

    variant = "vismem"  # what `save_pretrained` calls it; see `vismem.models.variants`
    new_tokens = NEW_TOKENS  # the longest answer that it was trained or evaluated with, where a request does not say

    def __init__(self, backbone: Backbone, memory: MemoryConfig, invocation: InvocationConfig, seed: int = 0) -> None:
        super().__init__()
        self.backbone = backbone  # no nn.Module, so the base's weights are not registered
        self.memory_config, self.invocation_config = memory, invocation
        backbone.prompt_pixels = memory.prompt_pixels or None
        if memory.image_pixels:
            backbone.limit_pixels(memory.image_pixels)
        backbone.model.requires_grad_(False).eval()
        tokenizer = backbone.processor.tokenizer
        self.memory_ids = add_memory_tokens(tokenizer)
        self.invoke_ids = dict(zip(KINDS, self.memory_ids[:2], strict=True))
        self.end_ids = dict(zip(KINDS, self.memory_ids[2:], strict=True))
        self.delimiter_ids = delimiter_ids(tokenizer, invocation.delimiters)
        stop = backbone.model.generation_config.eos_token_id
        stop = tokenizer.eos_token_id if stop is None else stop
        self.stop_ids = tuple(stop) if isinstance(stop, list) else (stop,)
        adapter = LoraSettings(memory.lora_rank, memory.lora_alpha, memory.lora_dropout)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.tokens = TokenRows(*self._initial_rows())
            self.builder = QueryBuilder(backbone.width, memory)
            self.short = ShortFormer(backbone, memory, adapter)
            self.long = LongFormer(backbone, memory, adapter)
            self.policy_lora = Lora(backbone.language_targets(), adapter)
        self.to(backbone.device)
        self.eval()

    def _initial_rows(self) -> tuple[Tensor, Tensor]:
        """A delimiter's rows plus a small perturbation (paper Sec. 3.2)."""
        tokenizer, token = self.backbone.processor.tokenizer, self.invocation_config.init_token
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise UserError(f"invocation.init_token {token!r} must be one token of {self.backbone.family}, not {ids}")
        delimiter = torch.tensor(ids * 4)
        rows = []
        for matrix in (self.backbone.embedding.weight, self.backbone.head.weight):
            row = matrix.detach()[delimiter.to(matrix.device)].float().cpu()
            noise = torch.randn_like(row) * row.pow(2).mean().sqrt()
            rows.append(row + self.invocation_config.perturbation * noise)
        return rows[0], rows[1]

    # --- vocabulary ---

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings (..., d) of token ids (...), the four new ones included."""
        table = self.backbone.embedding
        rows = torch.cat([self.tokens.invoke, self.tokens.end]).to(table.weight.dtype)
        embeds: Tensor = table(ids.clamp_max(table.num_embeddings - 1))
        for row, token in zip(rows, self.memory_ids, strict=True):
            embeds = torch.where((ids == token)[..., None], row, embeds)
        return embeds

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (..., V + 2): the base's vocabulary, with the memory tokens barred, then the two invokes.

        The invoke tokens' scores stand in the two last columns whatever their ids (see `column_of`).
        """
        return torch.cat(self.logit_parts(hidden), dim=-1)

    def logit_parts(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The two parts of `logits`: (..., V) and (..., 2)."""
        base = self.backbone.head(hidden).to(self.tokens.head.dtype)
        barred = [token for token in self.memory_ids if token < base.shape[-1]]
        if barred:
            base = base.index_fill_(-1, torch.tensor(barred, device=base.device), -torch.inf)
        return base, hidden.to(self.tokens.head.dtype) @ self.tokens.head.T + self.tokens.bias

    @property
    def vocabulary(self) -> int:
        """V, columns of the base's head: column V is the short invoke, V + 1 the long one."""
        return int(self.backbone.head.out_features)

    def column_of(self, ids: Tensor) -> Tensor:
        """Columns of `logits` for token ids."""
        columns = ids
        for i, kind in enumerate(KINDS):
            columns = torch.where(ids == self.invoke_ids[kind], self.vocabulary + i, columns)
        return columns

    # --- formation ---

    def limit(self, asked: int | None) -> int:
        """Memories per answer at most: `asked`, but never more than the model's own `invocation.max_per_answer`."""
        own = self.invocation_config.max_per_answer
        return own if asked is None else min(asked, own)

    def length_of(self, kind: MemoryKind) -> int:
        """N_s or N_l."""
        return self.memory_config.short_length if kind is MemoryKind.SHORT else self.memory_config.long_length

    def slots_of(self, kind: MemoryKind) -> int:
        """Tokens inside the former that become a memory: g * N_s or N_l."""
        return self.length_of(kind) * (self.backbone.merge if kind is MemoryKind.SHORT else 1)

    def short_stream(self, vision: VisionInput) -> PatchStream:
        """The prompts' patches inside the short former: computed once, read by every short memory."""
        with self.policy_lora.active(False), self.short.lora.active():
            return self.backbone.patch_stream(vision)

    def long_prefix(self, prompt: Prompt) -> DynamicCache:
        """The prompts' cache inside the long former: computed once, read by every long memory."""
        with self.policy_lora.active(False):
            return self.long.prefill(self.backbone, prompt)

    def form(self, kind: MemoryKind, inputs: FormationInputs) -> Tensor:
        """Form one memory per row: (R, N_kind, d), differentiable (Eq. 5 and 9-11)."""
        queries = self.backbone.through(self.builder, inputs.cognitive, inputs.cognitive_mask)
        with self.policy_lora.active(False):
            if kind is MemoryKind.SHORT:
                assert inputs.patches is not None
                segment = summary(inputs.cognitive.to(queries.dtype), inputs.segment_mask)
                read = self.backbone, queries, segment, inputs.patches, inputs.sample
                memory = self.backbone.through(self.short, *read)
            else:
                memory = self.long(self.backbone, queries, inputs)
        result: Tensor = memory.to(self.backbone.embedding.weight.dtype)
        return result

    @contextmanager
    def checkpointed(self, on: bool = True) -> Iterator[None]:
        """Within the block, what is run keeps few activations: the backward pass recomputes them (where `on`)."""
        adapters = self.short.lora, self.long.lora, self.policy_lora
        with checkpointed(self.backbone, adapters) if on else nullcontext():
            yield

    @contextmanager
    def reference(self, start: PolicyWeights) -> Iterator[None]:
        """The reference policy within the block: the policy with the weights of `start`."""
        own = self.tokens
        self.tokens = start.tokens
        try:
            with self.policy_lora.weights(start.down, start.up):
                yield
        finally:
            self.tokens = own

    def set_policy_lora(self, settings: LoraSettings) -> None:
        """Give the policy another adapter, fresh and off."""
        self.policy_lora.enabled = False
        targets = self.backbone.language_targets(settings.every_linear)
        if settings.vision:
            targets += [replace(target, name=f"vision.{target.name}") for target in self.backbone.vision_targets()]
        adapter = Lora(targets, settings)
        self.policy_lora = adapter.to(self.backbone.device).eval()

    # --- files ---

    def save_pretrained(self, folder: Path) -> None:
        """Write what VisMem adds: `vismem.json`, `memory.safetensors`, `policy.safetensors` and the processor."""
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "format": FORMAT,
            "variant": self.variant,
            "family": self.backbone.family,
            "memory": self.memory_config.model_dump(mode="json"),
            "invocation": self.invocation_config.model_dump(mode="json"),
            "memory_ids": self.memory_ids,
            "policy_lora": self.policy_lora.enabled,
            "policy_settings": asdict(self.policy_lora.settings),
            "dtype": str(self.backbone.model.dtype).removeprefix("torch."),
            "max_new_tokens": self.new_tokens,
        }
        write_json(folder / "vismem.json", settings)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        policy = {name: value for name, value in weights.items() if name.startswith(("tokens.", "policy_lora."))}
        save_file({name: value for name, value in weights.items() if name not in policy}, folder / "memory.safetensors")
        save_file(policy, folder / "policy.safetensors")
        self.backbone.processor.tokenizer.backend_tokenizer.no_padding()  # of the last batch, not of the tokenizer
        self.backbone.processor.save_pretrained(folder)

    @classmethod
    def from_pretrained(
        cls, folder: Path, base: Path | str, dtype: str = "float32", tensor_parallel: bool = False
    ) -> Self:
        """Load a base, as `load_base` does, and lay what `save_pretrained` wrote over it."""
        backbone = load_base(base, dtype, tensor_parallel)
        settings = _read_saved(folder, backbone)
        if (variant := settings.get("variant", VisMemModel.variant)) != cls.variant:
            raise UserError(f"{folder} holds the model '{variant}', which only `vismem evaluate` decodes")
        model = cls(backbone, settings["memory"], settings["invocation"])
        model.load_weights(folder)
        model.new_tokens = settings["max_new_tokens"]
        return model

    def load_weights(self, folder: Path) -> None:
        """Take over all weights that `save_pretrained` wrote, and the policy's adapter, on or off as it was.

        UserError where they are of another family, or of a memory of other sizes, or where this base's processor makes
        other tokens or pixels of a question.
        """
        settings = _read_saved(folder, self.backbone)
        if self.memory_ids != settings["memory_ids"]:
            raise self._other("tokenizer", folder)
        own, saved = (each.model_dump(mode="json") for each in (self.memory_config, settings["memory"]))
        if other := [name for name, value in saved.items() if name not in FREE and value != own[name]]:
            values = ", ".join(f"memory.{name} {saved[name]}" for name in other)
            raise UserError(f"{folder} has another memory than params.yaml: set {values}")
        if what := differing(self.backbone.processor, folder):
            raise self._other(what, folder)
        if (policy := settings["policy_settings"]) and policy != self.policy_lora.settings:
            self.set_policy_lora(policy)
        take_weights(self, read_weights(folder / "memory.safetensors", folder / "policy.safetensors"), folder)
        self.policy_lora.enabled = settings["policy_lora"]

    def _other(self, what: str, folder: Path) -> UserError:
        base = self.backbone.model.name_or_path
        return UserError(f"'{base}' has another {what} than the one that {folder} was trained with")

    def load_policy_lora(self, folder: Path) -> None:
        """Take over the weights of the policy's adapter alone. UserError where it is another one than this model's."""
        settings = _read_saved(folder, self.backbone)
        own, other = self.policy_lora.settings, settings["policy_settings"]
        if not settings["policy_lora"] or not other or replace(other, dropout=own.dropout) != own:
            raise UserError(f"{folder} has no LoRA of this size: give a folder that the same baseline wrote")
        weights, lora = read_weights(folder / "policy.safetensors"), "policy_lora."
        kept = {name: value for name, value in self.state_dict().items() if not name.startswith(lora)}
        taken = {name: value for name, value in weights.items() if name.startswith(lora)}
        take_weights(self, kept | taken, folder)


def _read_saved(folder: Path, backbone: Backbone) -> dict[str, Any]:
    """The settings that `save_pretrained` wrote, those of memory, invocation and policy typed.

    UserError for a folder without them, or of another family, or that cannot be read.
    """
    file = Path(folder) / "vismem.json"
    settings: dict[str, Any] = read_json(file, wanted := "give a folder that stage1, stage2 or export wrote")
    if lacking := SAVED - (settings.keys() if isinstance(settings, dict) else set()):
        raise UserError(f"{file} is damaged, it lacks {', '.join(sorted(lacking))}: {wanted}")
    if settings["format"] != FORMAT:
        raise UserError(f"{folder} has format {settings['format']}, this release reads {FORMAT}: train it anew")
    if backbone.family != settings["family"]:
        raise UserError(f"{folder} was trained on {settings['family']}, but the base is {backbone.family}")
    policy = settings.get("policy_settings")
    try:
        return settings | {
            "memory": MemoryConfig(**settings["memory"]),
            "invocation": InvocationConfig(**settings["invocation"]),
            "policy_settings": policy and LoraSettings(**policy),
            "memory_ids": tuple(settings["memory_ids"]),
            "max_new_tokens": min(int(settings.get("max_new_tokens", NEW_TOKENS)), MAX_NEW_TOKENS),
        }
    except (TypeError, ValueError) as error:
        said = "; ".join(f"{fault['loc']}: {fault['msg']}" for fault in getattr(error, "errors", list)())
        raise UserError(f"{file} is damaged, or of a later release ({said or first_line(error)}): {wanted}") from None

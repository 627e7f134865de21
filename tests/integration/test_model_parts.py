"""VisMem's model: files of earlier versions, an adapter of the vision encoder, activations that are recomputed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from vismem.config import InvocationConfig, MemoryConfig
from vismem.errors import UserError
from vismem.files import read_json, write_json
from vismem.generation.engine import generate
from vismem.generation.invocation import Random
from vismem.generation.replay import prefill, score
from vismem.models.loading import load_base
from vismem.models.vismem import VisMemModel


@pytest.fixture
def model(tiny_base: Path) -> VisMemModel:
    return tiny.vismem(tiny_base)


def saved_without(model: VisMemModel, folder: Path, *keys: str) -> Path:
    """The model's folder as an earlier version wrote it."""
    model.save_pretrained(folder)
    settings = read_json(folder / "vismem.json")
    write_json(folder / "vismem.json", {name: value for name, value in settings.items() if name not in keys})
    return folder


def test_a_folder_of_an_earlier_version_is_read(model: VisMemModel, tiny_base: Path, tmp_path: Path) -> None:
    folder = saved_without(model, tmp_path, "variant", "policy_settings")
    loaded = VisMemModel.from_pretrained(folder, tiny_base)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    model.policy_lora.enabled = True
    with pytest.raises(UserError, match="has no LoRA of this size"):
        loaded.load_policy_lora(saved_without(model, tmp_path, "policy_settings"))


def test_weights_of_a_memory_of_other_sizes_are_refused_with_the_sizes(
    model: VisMemModel, tiny_base: Path, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    free = {"lora_dropout": 0.3, "init_std": 0.5, "image_pixels": 9999, "prompt_pixels": 7056}
    other = VisMemModel(
        load_base(tiny_base), MemoryConfig(**{**tiny.MEMORY.model_dump(), **free}), model.invocation_config
    )
    other.load_weights(tmp_path)
    longer = tiny.MEMORY.model_copy(update={"short_length": 5, "queries": 3})
    with pytest.raises(UserError, match=r"params\.yaml: set memory\.queries 4, memory\.short_length 4$"):
        VisMemModel(load_base(tiny_base), longer, model.invocation_config).load_weights(tmp_path)


def test_an_adapter_of_the_vision_encoder_too_has_a_pair_of_matrices_for_each_target(model: VisMemModel) -> None:
    language, vision = model.backbone.language_targets(), model.backbone.vision_targets()
    model.set_policy_lora(replace(model.policy_lora.settings, vision=True))
    names = [*model.policy_lora.down]
    assert [*model.policy_lora.up] == names
    assert len(names) == len(language) + len(vision)
    assert sum(name.startswith("vision") for name in names) == len(vision) > 0


def test_within_the_block_activations_are_recomputed_and_gradients_are_the_same(model: VisMemModel) -> None:
    samples, policy = tiny.samples()[:3], Random(probability=1.0, anywhere=0.3)
    rollouts = generate(model, samples, policy, max_new_tokens=8, temperature=1.0)
    assert {i.kind for rollout in rollouts for i in rollout.invocations} == {"short", "long"}
    calls: list[object] = []
    model.builder.register_forward_pre_hook(lambda *_: calls.append(None))

    def gradients() -> tuple[int, dict[str, Tensor]]:
        calls.clear()
        model.zero_grad()
        score(model, prefill(model, samples), rollouts, torch.arange(3)).logprobs.sum().backward()
        return len(calls), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    count, plain = gradients()
    with model.checkpointed():
        twice, again = gradients()
    assert twice == 2 * count
    assert plain.keys() == again.keys() != set()
    for name, gradient in plain.items():
        assert torch.allclose(gradient, again[name], atol=1e-5), name
    failing: Any = model.checkpointed()
    with pytest.raises(ValueError, match="within"), failing:
        raise ValueError("within")
    assert gradients()[0] == count


def test_images_are_shrunk_to_the_memorys_most_pixels_and_without_one_to_the_processors_own(tiny_base: Path) -> None:
    for pixels, expected in ((4 * 28**2, 4 * 28**2), (0, 36 * 28**2)):
        memory = tiny.MEMORY.model_copy(update={"image_pixels": pixels})
        made = VisMemModel(load_base(tiny_base), memory, InvocationConfig())
        assert made.backbone.processor.image_processor.size["longest_edge"] == expected


def test_a_tokenizer_that_puts_a_token_of_its_own_before_every_text_changes_no_initial_row(
    model: VisMemModel, tiny_base: Path
) -> None:
    base, first = load_base(tiny_base), "<|endoftext|>"
    tokenizer = base.processor.tokenizer
    named = [(first, tokenizer.convert_tokens_to_ids(first))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{first} $A", special_tokens=named)
    assert len(tokenizer("\n")["input_ids"]) == 2
    made = VisMemModel(base, tiny.MEMORY, model.invocation_config)
    assert all(map(torch.equal, made.tokens.parameters(), model.tokens.parameters()))

"""What the sizes of real models need: how many tensors are alive at once, counted on tiny ones."""

import dataclasses
import io
import tracemalloc
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tiny
import tiny_families
import torch
from alive import Alive
from PIL import Image
from tiny_stages import objective_of
from torch import Tensor

from vismem.config import Config, GrpoConfig, InvocationConfig, Stage1Config, Stage2Config, WarmStartConfig
from vismem.data.sample import Sample, write_shards
from vismem.errors import UserError
from vismem.generation import batches, token_scores
from vismem.generation.engine import generate
from vismem.generation.prompts import encode
from vismem.generation.replay import answer_states, prefill
from vismem.models.kinds import MemoryKind
from vismem.models.loading import load_base
from vismem.models.variants import StaticPrefix
from vismem.models.vismem import VisMemModel
from vismem.training import run, stage2
from vismem.training.loop import batch_at
from vismem.training.run import FORMATION, new_model, trainable
from vismem.training.stage1 import stage1

DEPTH = 12  # blocks of the vision encoder


def deepened(model: VisMemModel) -> VisMemModel:
    """The model with its vision encoder's blocks, one after the other, as often as makes it DEPTH blocks deep."""
    backbone, blocks = model.backbone, list(model.backbone.blocks)
    backbone.blocks = [blocks[index % len(blocks)] for index in range(DEPTH)]
    if model.backbone.family == "qwen2_5_vl":
        backbone.visual.fullatt_block_indexes = [DEPTH // 2, DEPTH - 1]
    else:
        backbone.layers = [DEPTH]
    return model


@lru_cache
def large(side: int) -> Sample:
    """A question about one large image."""
    one = next(sample for sample in tiny_families.samples() if len(sample.images) == 1)
    data = io.BytesIO()
    Image.effect_noise((side, side), 90).convert("RGB").save(data, "png")
    return dataclasses.replace(one, images=(data.getvalue(),))


@torch.no_grad()
def test_what_the_vision_encoder_holds_grows_as_the_number_of_patches_and_not_as_its_square(tiny_base: Path) -> None:
    backbone, counted = load_base(tiny_base), []
    processor = backbone.processor.image_processor
    processor.size = type(processor.size)(shortest_edge=processor.size.shortest_edge, longest_edge=448**2)
    for side in (224, 448):
        vision = encode(backbone, [large(side)]).vision
        with Alive() as alive:
            backbone.patch_stream(vision)
        counted.append((vision.mask.numel(), alive.largest, alive.peak))
    assert counted[1][0] == 4 * counted[0][0]
    for small, grown in zip(*counted, strict=True):
        assert grown <= 4.1 * small


def short_memory_gradients(model: VisMemModel, sample: Sample, on: bool) -> tuple[dict[str, Tensor], int]:
    """The gradients of a short memory's formation, and the most bytes that were alive while they were computed."""
    with torch.no_grad():
        context = prefill(model, [sample])
    parameters = trainable(model, FORMATION)
    for parameter in parameters.values():
        parameter.grad = None
    state = torch.randn(1, 3, model.backbone.width, generator=torch.Generator().manual_seed(0))
    real = torch.ones(1, 3, dtype=torch.bool)
    stream = context.prompt.embeds, context.prompt.positions, context.prompt.mask
    with Alive() as alive, model.checkpointed(on):
        row = torch.zeros(1, dtype=torch.long)
        memory = context.form(MemoryKind.SHORT, row, (state, real), stream)
        memory.square().sum().backward()
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}, alive.peak


@pytest.mark.parametrize("variant", ["qwen2_5_vl", "internvl", "llava_onevision"])
def test_a_short_memory_holds_the_activations_of_one_vision_block_at_a_time(variant: str, tmp_path: Path) -> None:
    """In the backward pass too; and every gradient is the same, to the bit, as without checkpointing."""
    model = deepened(tiny.vismem(tiny_families.save_base(tmp_path, variant)))
    sample = large(336)
    (plain, most), (again, least) = (short_memory_gradients(model, sample, on) for on in (False, True))
    assert least < most / 2, f"{most / least:.1f} times"
    assert plain.keys() == again.keys()
    assert any("short.lora" in name for name in plain)
    for name, gradient in plain.items():
        assert gradient.equal(again[name]), name


def test_of_the_patches_only_keys_and_values_that_memory_tokens_read_are_kept(tmp_path: Path) -> None:
    """Qwen2.5-VL's are a window of their own in all blocks but those of full attention."""
    model = deepened(tiny.vismem(tiny_families.save_base(tmp_path, "qwen2_5_vl")))
    stream = model.short_stream(encode(model.backbone, [large(112)]).vision)
    assert len(stream.keys_values) == 2


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_families.save_wide_base(tmp_path_factory.mktemp("wide"), tmp_path_factory.mktemp("small"))


def test_a_base_is_loaded_once_in_its_own_type_and_no_table_of_words_is_copied(wide: Path) -> None:
    table = tiny_families.REAL_VOCABULARY * tiny_families.WIDTH * 2
    with Alive() as alive:
        backbone = load_base(wide, "bfloat16")
    assert alive.peak < 2.5 * table, "there are two"
    assert {parameter.dtype for parameter in backbone.model.parameters()} == {torch.bfloat16}
    for kind in (VisMemModel, StaticPrefix):
        with Alive() as alive:
            kind(backbone, tiny.MEMORY, InvocationConfig())
        assert alive.peak < table / 4


def answers_fail(*_: Any, **__: Any) -> None:
    raise MemoryError


def test_what_was_trained_is_saved_before_validation_questions_are_answered(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should they take more memory than there is, the training is not lost."""
    config = Config(
        memory=tiny.MEMORY, stage1=Stage1Config(steps=1, warm_start=WarmStartConfig(steps=0)), grpo=GrpoConfig()
    )
    monkeypatch.setattr(run.Run, "train_grpo", lambda *_: monkeypatch.setattr(batches, "generate", answers_fail))
    with pytest.raises(MemoryError):
        stage1(config, {"base": tiny_base, "validate": tiny_data}, tmp_path)
    assert {"vismem.json", "memory.safetensors", "policy.safetensors"} <= {path.name for path in tmp_path.iterdir()}


def test_validation_questions_are_answered_as_many_at_a_time_as_a_backward_pass_takes(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, fit = list[int](), [8]

    def counted(model: VisMemModel, samples: Any, *policy: Any, **settings: Any) -> Any:
        if len(samples) > fit[0]:
            raise torch.OutOfMemoryError
        sizes.append(len(samples))
        return generate(model, samples, *policy, **settings)

    monkeypatch.setattr(batches, "generate", counted)
    config = Config(
        memory=tiny.MEMORY,
        grpo=GrpoConfig(micro_batch=2, batch_size=2, max_new_tokens=4),
        stage1=Stage1Config(steps=1, group_size=2, warm_start=WarmStartConfig(steps=0)),
    )
    stage1(config, {"base": tiny_base, "validate": tiny_data}, tmp_path)
    assert sizes == [8, 4] * 5, "four times as many as a backward pass has: they need no gradient"
    sizes.clear()
    fit[0] = 3  # on the GPU
    stage1(config, {"base": tiny_base, "validate": tiny_data}, tmp_path)
    assert sizes == [2] * 30


def test_a_training_holds_the_images_of_the_steps_that_it_is_at(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of the split: they are read as batches ask for them, in the order of ever."""
    bulk = 100_000
    rows = [
        dataclasses.replace(sample, id=f"{turn} {sample.id}", scene="", images=(*sample.images, bytes(bulk)))
        for turn in range(5)
        for sample in tiny.samples()
    ]
    for split in ("train", "validation"):
        write_shards(rows, tmp_path / "data" / split, rows_per_shard=5)
    monkeypatch.setattr("vismem.data.sample.CACHED_BYTES", 10 * bulk)
    inputs = {"base": tiny_base, "validate": tmp_path}
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes()
        made = run.Run("stage1", Config(memory=tiny.MEMORY), inputs, tmp_path, new_model)
        order = [made.samples[place].id for step in range(3) for place in batch_at(step, len(made.samples), 8, seed=0)]
        held = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - before
    finally:
        tracemalloc.stop()
    assert order == [rows[place].id for step in range(3) for place in batch_at(step, len(rows), 8, seed=0)]
    assert list(made.samples) == rows
    assert held < len(rows) * bulk / 2


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_logits_of_a_whole_group_are_never_held(
    stage: str, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where a group is sampled nor where it is scored; and the gradient is the same, whatever the limit."""
    objective, parameters = objective_of(stage, tiny_base, group_size=12)
    width, found = objective.model.vocabulary, []
    for tokens in (10_000, 5):
        monkeypatch.setattr(token_scores, "MAX_LOGITS", tokens * width)
        with Alive(lambda tensor: tensor.ndim > 1 and tensor.shape[-1] in (width, width + 2)) as alive:
            objective.backward(objective.collect(0))
        found.append({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})
        for parameter in parameters.values():
            parameter.grad = None
    assert alive.largest <= 5 * (width + 2)
    assert alive.peak <= 16 * 5 * (width + 2) * 4, "a few copies of a piece, some in double precision"
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-6)


def test_the_head_is_fitted_to_answers_without_all_their_logits(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.vismem(tiny_base)
    width = model.vocabulary
    answers = generate(model, tiny.samples()[:4], stage2.ANSWERED, max_new_tokens=10, temperature=1.0)
    monkeypatch.setattr(token_scores, "MAX_LOGITS", 5 * width)
    with Alive(lambda tensor: tensor.shape[-1:] == (width,) and tensor.ndim > 1) as alive:
        found = stage2.decisions(model, tiny.samples()[:4], answers, 32)
        stage2.fit_invocation(model, *found, Stage2Config(), 1.0)
    assert 0 < alive.largest <= 5 * (width + 2)


def test_the_head_is_fitted_to_answers_without_a_double_precision_copy_of_their_states(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And without what the replay of earlier batches held beside the states."""
    replayed: list[weakref.ref[Any]] = []

    def once(*arguments: Any) -> Tensor:
        assert all(earlier() is None for earlier in replayed)
        states = answer_states(*arguments)
        replayed.append(weakref.ref(states.untyped_storage()))
        return states

    monkeypatch.setattr(stage2, "answer_states", once)
    model, rows = tiny.vismem(tiny_base), []
    samples = tiny.samples(40)
    answers = generate(model, samples, stage2.ANSWERED, max_new_tokens=10, temperature=1.0)
    states, places = stage2.decisions(model, samples, answers, 32)
    assert len(replayed) == 2
    for together in (10_000, 7):
        monkeypatch.setattr(token_scores, "MAX_LOGITS", together * model.backbone.width)
        with Alive(lambda tensor: tensor.dtype == torch.double and tensor.ndim > 1) as alive:
            stage2.fit_invocation(model, states, places, Stage2Config(), 1.0)
        rows.append((model.tokens.head.clone(), model.tokens.bias.clone()))
    assert 0 < alive.largest <= max(7 * model.backbone.width, model.vocabulary + 2) < states.numel()
    for whole, in_pieces in zip(*rows, strict=True):
        torch.testing.assert_close(in_pieces, whole, rtol=0, atol=1e-3)  # 200 steps over logits in single precision


def test_a_wide_base_whose_invoke_rows_would_take_the_tiny_ones_steps_is_refused(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"base": tiny_base, "validate": tiny_data, "stage1": tmp_path / "stage1"}
    tiny.vismem(tiny_base).save_pretrained(inputs["stage1"])
    monkeypatch.setattr(run, "SMALL_WIDTH", 1)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"stage2.whitened_learning_rate 0.03 is for the tiny VLM.*docs/models.md"):
        stage2.stage2(Config(), inputs, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())

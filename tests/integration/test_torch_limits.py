"""What one question may take of the torch executor: counted before any image is decoded, in every family."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_families as families
import tiny_stages
import torch

from vismem.generation.context import Context
from vismem.generation.invocation import NONE, Learned
from vismem.generation.loop import Asked, DecodeLoop, Request
from vismem.generation.onnx_executor import _drawn
from vismem.generation.prompts import inputs_of
from vismem.generation.torch_executor import TorchExecutor
from vismem.models.vismem import VisMemModel
from vismem.runtime.chat import one_turn
from vismem.runtime.limits import RequestError

SAMPLES = [sample for sample in families.samples() if sample.images]


@pytest.fixture(scope="module", params=families.VARIANTS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VisMemModel:
    return tiny_stages.eager_model(families.save_base(tmp_path_factory.mktemp("base"), request.param))


def prepare(executor: TorchExecutor, sample: Any, tokens: int = 4) -> Any:
    return executor.prepare(families.pictures(sample), one_turn(sample.question, len(sample.images)), tokens)


def test_patches_are_counted_as_they_are_cut_and_beyond_the_limit_refused(model: VisMemModel) -> None:
    for sample in SAMPLES:
        inputs = inputs_of(model.backbone, [sample])
        cut = int(model.backbone.placed(inputs, model.backbone.features(inputs)).vision.mask.sum())
        sizes = [picture.size for picture in families.pictures(sample)]
        assert sum(model.backbone.patch_counts(sizes)) == cut > 0
        prepare(TorchExecutor(model, max_patches=max(cut, int(inputs.mask.sum()))), sample)
        with pytest.raises(RequestError, match=f"the images make {cut} patches: the limit is {cut - 1}"):
            prepare(TorchExecutor(model, max_patches=cut - 1), sample)


def test_a_prompt_has_no_more_tokens_than_images_may_have_patches(model: VisMemModel) -> None:
    sample = replace(SAMPLES[0], question="how many? " * 200)
    tokens = int(inputs_of(model.backbone, [sample]).mask.sum())
    prepare(TorchExecutor(model, max_patches=tokens), sample)
    with pytest.raises(RequestError, match=f"make {tokens} tokens: the limit is {tokens - 1}; send less"):
        prepare(TorchExecutor(model, max_patches=tokens - 1), sample)


def test_an_answer_that_would_need_more_positions_than_there_are_is_refused(model: VisMemModel) -> None:
    executor, sample = TorchExecutor(model), SAMPLES[0]
    held = model.backbone.model.config.text_config.max_position_embeddings
    prompt = int(inputs_of(model.backbone, [sample]).positions.max()) + 1
    memories = model.limit(None) * (max(model.memory_config.short_length, model.memory_config.long_length) + 2)
    prepare(executor, sample, held - prompt - memories)
    with pytest.raises(RequestError, match=f"need {held + 1} positions, the model has {held}"):
        prepare(executor, sample, held - prompt - memories + 1)


def test_what_was_read_of_one_question_serves_it_again_and_no_other(model: VisMemModel) -> None:
    executor = TorchExecutor(model, cache_bytes=10**9)
    questions = [(sample, text) for text in ("which is it?", "how many are there?") for sample in SAMPLES[:2]]
    answers = []
    for kept in (TorchExecutor(model), executor, executor):
        for sample, text in questions:
            chat, loop = one_turn(text, len(sample.images)), DecodeLoop(kept)
            with kept.running():
                (row,) = loop.join(Request([kept.prepare(families.pictures(sample), chat, 4)], Learned(), 4))
                while loop.step():
                    pass
            answers.append([token for token, _, _ in row.tokens])
    assert answers == answers[:4] * 3
    kept_contexts = [(read, size) for read, size in executor.cache.kept.values() if isinstance(read, Context)]
    assert len(kept_contexts) == len(questions)
    for read, size in kept_contexts:
        held = [read.prompt.embeds, read.prompt.vision.patches, read.visual, *read.cache.keys, *read.cache.values]
        assert size == sum(tensor.element_size() * tensor.numel() for tensor in held)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_no_numbers_choose_a_word_and_leave_other_rows_alone(
    model: VisMemModel, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """A word, although the memory tokens are barred: a forward pass that overflows is no way to form a memory."""
    scores = torch.zeros(2, model.vocabulary + 2)
    scores[0] = torch.nan
    monkeypatch.setattr(model, "logits", lambda last: scores.clone())
    both, barred = np.full(2, 0.5), np.ones((2, 2), bool)
    asked = Asked(both * 2 * temperature, both, barred, np.zeros(2, bool), np.zeros((2, 2), int), np.full(2, NONE))
    tokens, _ = TorchExecutor(model).choose(asked)
    assert tokens[0] == 0
    assert tokens[1] < model.vocabulary
    assert bool(tokens[1]) == bool(temperature)
    assert _drawn(np.full(7, np.nan), end=7, uniform=0.5) == 0

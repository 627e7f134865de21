"""The record of an answer: its text, its marks, how long it is and whether it ended by itself."""

import io
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from vismem.generation import torch_executor
from vismem.generation.controls import Relook, Shuffled
from vismem.generation.engine import generate, rollout_of, stream
from vismem.generation.invocation import Learned, Off, Random
from vismem.generation.loop import DecodeLoop, Prefilled, Request
from vismem.generation.prompts import encode, shown_again
from vismem.generation.replay import prefill, score
from vismem.generation.torch_executor import TorchExecutor, _column_at
from vismem.generation.types import LATENT, Rollout
from vismem.models.kinds import MemoryKind
from vismem.models.tokens import MEMORY_TOKENS
from vismem.models.vismem import VisMemModel

MARKS = dict(zip(MemoryKind, MEMORY_TOKENS[:2], strict=True))


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> VisMemModel:
    """A model that likes to invoke."""
    return tiny.eager(tiny_base)


@pytest.fixture  # of each test its own: mutmut takes what a fixture calls for a call of the test that it is made for
def rollouts(model: VisMemModel) -> list[Rollout]:
    return generate(model, tiny.samples(), Learned(), max_new_tokens=40, temperature=1.0)


def test_the_marked_text_is_the_text_with_a_mark_where_a_memory_was_invoked(
    model: VisMemModel, rollouts: list[Rollout]
) -> None:
    tokenizer = model.backbone.processor.tokenizer
    for rollout in rollouts:
        said, kinds = rollout.marked_text, [invocation.kind for invocation in rollout.invocations]
        places = sorted((place, kind) for kind in MARKS for place in _places(said, MARKS[kind]))
        assert [kind for _, kind in places] == kinds
        assert not any(token in said for token in (*MEMORY_TOKENS[2:], tokenizer.eos_token))
        for token in (*MARKS.values(), *tokenizer.all_special_tokens):
            said = said.replace(token, "")
        assert said == rollout.text
    assert any(rollout.invocations for rollout in rollouts)


def _places(text: str, mark: str) -> list[int]:
    return [place for place in range(len(text)) if text.startswith(mark, place)]


def test_its_length_counts_words_and_it_is_finished_where_the_last_one_ends_it(
    model: VisMemModel, rollouts: list[Rollout]
) -> None:
    visual = encode(model.backbone, tiny.samples()).visual.sum(1).tolist()
    for rollout, seen in zip(rollouts, visual, strict=True):
        words = [token for token in rollout.token_ids if token != LATENT and token not in model.memory_ids]
        assert (rollout.answer_length, rollout.visual_tokens) == (len(words), seen)
        assert rollout.finished == (words[-1] in model.stop_ids)
    assert {rollout.finished for rollout in rollouts} == {True, False}


def test_a_stream_gives_the_tokens_of_the_answer_and_returns_its_record(
    model: VisMemModel, rollouts: list[Rollout]
) -> None:
    hidden = {LATENT, *model.end_ids.values()}
    for sample, expected in zip(tiny.samples()[:4], rollouts, strict=False):
        pieces, records = stream(model, sample, Learned(), max_new_tokens=40, temperature=1.0), list[Rollout]()
        came = [*_kept(pieces, records)]
        assert came == [token for token in expected.token_ids if token not in hidden]
        assert records[0].logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        assert replace(records[0], logprobs=expected.logprobs) == expected


def _kept(pieces: Generator[int, None, Rollout], records: list[Rollout]) -> Iterator[int]:
    records.append((yield from pieces))


def formed(model: VisMemModel, request: Request) -> list[tuple[MemoryKind, int, torch.Tensor]]:
    """Every memory that a request's rows are given, with its kind and its sample's place."""
    executor, kept = TorchExecutor(model), list[tuple[MemoryKind, int, torch.Tensor]]()
    original = executor.form

    def form(kind: MemoryKind, rows: Sequence[int]) -> torch.Tensor:
        memory = original(kind, rows)
        kept.extend((kind, int(executor.state.sample[row]), own) for row, own in zip(rows, memory, strict=True))
        return memory

    executor.form = form  # type: ignore[method-assign]
    with executor.running():
        loop = DecodeLoop(executor)
        loop.join(request)
        while loop.step():
            pass
    return kept


def test_a_shuffled_memory_is_the_one_that_the_other_question_forms_at_its_answers_start(model: VisMemModel) -> None:
    samples = tiny.samples()[:5]
    donors = Shuffled().donors(samples)
    assert donors is not None
    given = formed(model, Request(samples, Shuffled(), max_new_tokens=16, temperature=1.0, group_size=2))
    assert {kind for kind, _, _ in given} == {*MemoryKind}
    own = {
        (kind, place): formed(model, Request([sample], Random(limit=1, probability=1.0, kinds=(kind,)), 1))[0][2]
        for kind in MemoryKind
        for place, sample in enumerate(samples)
    }
    for kind, place, memory in given:
        assert torch.allclose(memory, own[kind, donors[place]], atol=1e-5)


def test_a_number_draws_the_first_column_whose_cumulative_probability_exceeds_it_or_the_last() -> None:
    cumulative = torch.tensor([[0.25, 0.25, 0.75, 1.0]], dtype=torch.double).repeat(5, 1)
    at = torch.tensor([0.0, 0.25, 0.5, 0.999, 1.0], dtype=torch.double)  # rounding may reach the end
    assert _column_at(cumulative, at).tolist() == [0, 2, 2, 3, 3]


def test_tokens_are_chosen_a_few_rows_at_a_time_with_log_probabilities_in_the_models_type(
    model: VisMemModel, rollouts: list[Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_executor, "together", lambda vocabulary: 5)
    found = generate(model, tiny.samples(), Learned(), max_new_tokens=40, temperature=1.0)
    for rollout, expected in zip(found, rollouts, strict=True):
        assert rollout.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        assert replace(rollout, logprobs=expected.logprobs) == expected
        assert torch.tensor(rollout.logprobs).tolist() == [*rollout.logprobs]


def test_images_shown_again_open_the_answer_and_count_as_its_latents(model: VisMemModel) -> None:
    samples, executor = tiny.samples()[:3], TorchExecutor(model)
    prompt = encode(model.backbone, samples)
    opened = shown_again(prompt, prompt, model.backbone.image_markers)
    with executor.running():
        rows = DecodeLoop(executor).join(Request(samples, Relook(), 3))
    for place, row in enumerate(rows):
        length, before = int(opened.mask[place].sum()), int(prompt.mask[place].sum())
        assert row.prompt == Prefilled(length, 2 * int(prompt.visual[place].sum()), length - before)
    again, behind = (
        generate(model, samples, policy, max_new_tokens=6, temperature=1.0, prompt=given)
        for policy, given in ((Relook(), None), (Off(), opened))
    )
    for row, found, expected in zip(rows, again, behind, strict=True):
        assert found.token_ids == (LATENT,) * row.prompt.added + expected.token_ids
        assert found.logprobs[row.prompt.added :] == expected.logprobs


@pytest.fixture
def adapted(tiny_base: Path) -> VisMemModel:
    """A model whose policy has an adapter that changes every answer."""
    model, generator = tiny.eager(tiny_base), torch.Generator().manual_seed(0)
    for up in model.policy_lora.up.values():
        up.normal_(0, 0.5, generator=generator)
    model.policy_lora.enabled = True
    return model


def test_a_prompt_that_was_read_with_the_adapter_does_not_serve_the_bare_base(adapted: VisMemModel) -> None:
    sample, executor = tiny.samples()[0], TorchExecutor(adapted, cache_bytes=10**9)
    found = []
    for policy in (Learned(limit=0), Off(base=True)):
        answers = []
        for by in (TorchExecutor(adapted), executor, executor):
            images = [Image.open(io.BytesIO(data)) for data in sample.images]
            with by.running():
                loop = DecodeLoop(by)
                (row,) = loop.join(Request([by.prepare(images, sample.turns(), 6)], policy, 6))
                while loop.step():
                    pass
            answers.append(row.tokens)
        assert answers[1:] == answers[:1] * 2
        found.append(answers[0])
    assert found[0] != found[1]


def test_rows_of_the_policys_adapter_and_of_the_bare_base_are_decoded_beside_each_other(adapted: VisMemModel) -> None:
    model, samples = adapted, tiny.samples()
    asked = Request(samples[:3], Learned(), 10, 1.0, seed=1), Request(samples[3:6], Off(base=True), 10, 1.0, seed=2)
    executor = TorchExecutor(model)
    with executor.running():
        loop = DecodeLoop(executor)
        rows = [loop.join(request) for request in asked]
        while loop.step():
            pass
    for request, found in zip(asked, rows, strict=True):
        options = {"max_new_tokens": 10, "temperature": 1.0, "seed": request.seed}
        for row, expected in zip(found, generate(model, request.samples, request.policy, **options), strict=True):
            assert rollout_of(model, row).logprobs == pytest.approx(expected.logprobs, abs=1e-4)
            assert replace(rollout_of(model, row), logprobs=expected.logprobs) == expected
    assert any(row.invocations for row in rows[0])
    rollouts = [rollout_of(model, row) for row in rows[0]]
    scores = score(model, prefill(model, samples[:3]), rollouts, torch.arange(3), Learned())
    for row, logprobs, sampled in zip(rows[0], scores.logprobs, scores.mask, strict=True):
        drawn = [logprob for _, loss, logprob in row.tokens if loss]
        assert logprobs[sampled].tolist() == pytest.approx(drawn, abs=1e-4)
    model.policy_lora.enabled = False
    bare = generate(model, samples[:3], Learned(), max_new_tokens=10, temperature=1.0, seed=1)
    assert [rollout.token_ids for rollout in bare] != [tuple(t for t, _, _ in row.tokens) for row in rows[0]]

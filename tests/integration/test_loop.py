"""The decode loop: rows of many requests come and go, and each is decoded as it is alone."""

import io
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from vismem.data.sample import Sample
from vismem.generation import decode_state
from vismem.generation.controls import Noise, Swapped
from vismem.generation.decode_state import grown
from vismem.generation.engine import generate, rollout_of
from vismem.generation.invocation import InvocationPolicy, Learned, Off, Random, Replay, row_key
from vismem.generation.loop import Asked, DecodeLoop, Request, Row
from vismem.generation.prompts import inputs_of
from vismem.generation.torch_executor import TorchExecutor
from vismem.generation.types import Rollout
from vismem.models.kinds import MemoryKind
from vismem.models.vismem import VisMemModel
from vismem.runtime.chat import one_turn
from vismem.runtime.limits import RequestError

SAMPLES = tiny.samples()
RANDOM = Random(probability=0.5, anywhere=0.5)
REQUESTS = (  # each with settings of its own
    Request(SAMPLES[:3], Learned(), max_new_tokens=12, seed=3),
    Request(SAMPLES[3:4], Off(), max_new_tokens=5, temperature=0.7, seed=3),
    Request(SAMPLES[4:6], RANDOM, max_new_tokens=9, temperature=1.0, seed=2, group_size=3),
    Request(SAMPLES[4:6], RANDOM, max_new_tokens=11, seed=4),
    Request(SAMPLES[:2], Learned(sampled=(MemoryKind.LONG,)), max_new_tokens=14, temperature=1.0, seed=7),
    Request(SAMPLES[6:8], Swapped(limit=1), max_new_tokens=8),
    Request(SAMPLES[8:9], Noise(), max_new_tokens=16, temperature=1.3, seed=5, group_size=2),
)


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> VisMemModel:
    """A model that likes to invoke."""
    return tiny.eager(tiny_base)


def alone(model: VisMemModel, request: Request) -> list[Rollout]:
    options = {name: getattr(request, name) for name in ("max_new_tokens", "temperature", "seed", "group_size")}
    return generate(model, request.samples, request.policy, **options)


def check(model: VisMemModel, rows: Sequence[Row], request: Request) -> None:
    for row, expected in zip(rows, alone(model, request), strict=True):
        found = rollout_of(model, row)
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        assert replace(found, logprobs=expected.logprobs) == expected


@pytest.mark.parametrize("every", [0, 1, 3, 7])
@torch.inference_mode()
def test_a_request_s_answers_are_the_same_alone_and_among_others_that_come_and_go(
    model: VisMemModel, every: int
) -> None:
    """One joins `every` so many steps; the last when others have long finished."""
    loop, joined, shared = DecodeLoop(TorchExecutor(model)), [], 0
    for request in REQUESTS:
        joined.append(loop.join(request))
        for _ in range(every):
            shared += len({id(row.request) for row, _ in loop.step()}) > 1
    while loop.step():
        shared += 1
    assert shared > 3, "rows of several requests should be decoded together"
    assert sum(len(row.invocations) for rows in joined for row in rows) > 10
    for rows, request in zip(joined, REQUESTS, strict=True):
        check(model, rows, request)
    assert loop.rows == []


@pytest.mark.parametrize("policy", [Learned(), Random(probability=1.0, anywhere=1.0), Off()])
@torch.inference_mode()
def test_a_row_s_record_says_what_was_sampled_and_what_was_not(model: VisMemModel, policy: InvocationPolicy) -> None:
    loop = DecodeLoop(TorchExecutor(model))
    rows = loop.join(Request(SAMPLES, policy, max_new_tokens=5, temperature=1.0))
    while loop.step():
        pass
    for row in rows:
        words = [token for token, sampled, _ in row.tokens if sampled and token not in model.memory_ids]
        assert row.answer_length == len(words)
        assert row.answer_length == 5 or words[-1] in model.stop_ids
        assert all(logprob < 0 if sampled else logprob == 0 for _, sampled, logprob in row.tokens)
        assert row.decisions == len(words) + len(row.invocations)
        forced = isinstance(policy, Random)
        for invocation in row.invocations:
            assert invocation.forced is forced
            assert row.tokens[invocation.position][:2] == (model.invoke_ids[invocation.kind], not forced)
    if not isinstance(policy, Off):
        assert max(len(row.invocations) for row in rows) == 3, "the model's own limit"


@torch.inference_mode()
def test_every_decision_has_a_random_number_of_its_own_that_hangs_on_seed_and_name_alone(
    model: VisMemModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, asked = TorchExecutor(model), list[Asked]()
    monkeypatch.setattr(executor, "choose", lambda given: asked.append(given) or TorchExecutor.choose(executor, given))
    always = Replay(recorded={row_key("a", 0): [(at, MemoryKind.SHORT) for at in range(0, 6, 2)]})
    loop = DecodeLoop(executor)
    (row,) = loop.join(Request([replace(SAMPLES[0], id="a")], always, max_new_tokens=3, temperature=1.0, seed=9))
    monkeypatch.setattr(executor, "stops", frozenset())
    while loop.step():
        pass
    assert row.decisions == 6, "three words and as many memories"
    drawn = np.random.default_rng((9, zlib.crc32(b"a#0"), zlib.crc32(b"sample"))).random(6)
    assert [float(given.uniform[0]) for given in asked] == drawn.tolist()
    assert all(given.declines.tolist() == [True] for given in asked)


@torch.inference_mode()
def test_segments_of_other_lengths_are_read_together(model: VisMemModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row's first segment is long, the other's second one begins so late that as many slots would not be there."""
    late = {row_key(SAMPLES[0].id, 0): [(19, MemoryKind.SHORT)]}
    late[row_key(SAMPLES[1].id, 0)] = [(16, MemoryKind.SHORT), (19, MemoryKind.SHORT)]
    request = Request(SAMPLES[:2], Replay(recorded=late, limit=2), max_new_tokens=20)
    executor = TorchExecutor(model)
    monkeypatch.setattr(executor, "stops", frozenset())
    loop = DecodeLoop(executor)
    rows = loop.join(request)
    while loop.step():
        pass
    for row, sample in zip(rows, SAMPLES[:2], strict=True):
        (lone,) = loop.join(replace(request, samples=[sample]))
        while loop.step():
            pass
        assert [token for token, _, _ in row.tokens] == [token for token, _, _ in lone.tokens]
        assert [invocation.position for invocation in row.invocations][-1] >= 19


@torch.inference_mode()
def test_a_row_may_leave_before_its_first_token(model: VisMemModel) -> None:
    loop = DecodeLoop(TorchExecutor(model))
    rows = loop.join(REQUESTS[0])
    loop.leave(rows[0])
    late = loop.join(REQUESTS[3])
    while loop.step():
        pass
    assert rows[0].tokens == []
    check(model, late, REQUESTS[3])
    expected = alone(model, REQUESTS[0])[1:]
    assert [rollout_of(model, row).token_ids for row in rows[1:]] == [e.token_ids for e in expected]


@torch.inference_mode()
def test_a_row_that_leaves_is_decoded_no_further_and_the_others_as_before(model: VisMemModel) -> None:
    loop = DecodeLoop(TorchExecutor(model))
    rows = loop.join(REQUESTS[0])
    before = [token for row, token in [*loop.step(), *loop.step()] if row is rows[1]]
    loop.leave(rows[1])
    while decided := loop.step():
        assert rows[1] not in [row for row, _ in decided]
    assert rollout_of(model, rows[1]).token_ids[:1] == tuple(before[:1])
    assert rows[1].decisions == len(before) == 2
    expected = alone(model, REQUESTS[0])
    assert [rollout_of(model, row).token_ids for row in rows[::2]] == [e.token_ids for e in expected[::2]]


@torch.inference_mode()
def test_rows_that_join_take_the_places_of_those_that_ended(model: VisMemModel) -> None:
    """However many come one after another, no more is allocated than for those that are there together."""
    executor = TorchExecutor(model)
    loop = DecodeLoop(executor)
    loop.join(Request(SAMPLES[4:5], RANDOM, max_new_tokens=40))
    for _ in range(4):
        rows = loop.join(Request(SAMPLES[:3], RANDOM, max_new_tokens=6))
        loop.step()
        loop.leave(rows[0])
        (late,) = loop.join(Request(SAMPLES[5:6], Learned(), max_new_tokens=6))
        assert loop.rows[1:] == [*rows[1:], late]
        while not all(row.finished for row in loop.rows[1:]):
            loop.step()
    assert {len(held) for held in (*executor.state.cache.keys, executor.state.embeds)} == {4}
    while loop.step():
        pass
    assert executor.state.cache.keys == []


@pytest.mark.parametrize("left", [False, True])
@torch.inference_mode()
def test_a_row_that_ended_is_not_decoded_beyond_its_room(
    model: VisMemModel, left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that joined late go on after it, too many of them for it to go at once."""
    executor = TorchExecutor(model)
    monkeypatch.setattr(executor, "stops", frozenset())
    longest = max(SAMPLES, key=lambda sample: inputs_of(model.backbone, [sample]).ids.shape[1])
    loop = DecodeLoop(executor)
    (first,) = loop.join(Request([longest], Off(), max_new_tokens=6))
    for _ in range(4):
        loop.step()
    others = loop.join(Request(SAMPLES[:2], Off(), max_new_tokens=6))
    if left:
        loop.leave(first)
    while loop.step():
        pass
    assert first.answer_length == (4 if left else 6)
    for row, sample in zip(others, SAMPLES, strict=False):
        (lone,) = loop.join(Request([sample], Off(), max_new_tokens=6))
        while loop.step():
            pass
        assert [token for token, _, _ in row.tokens] == [token for token, _, _ in lone.tokens]


@pytest.mark.parametrize("allocation", [1, 4, 6, 7])
@pytest.mark.parametrize("first", [0, 1])
@torch.inference_mode()
def test_rows_for_which_there_is_no_memory_harm_no_others(
    model: VisMemModel, first: int, allocation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, left = DecodeLoop(TorchExecutor(model)), [True] * (allocation - 1)
    rows = loop.join(REQUESTS[first])
    loop.step()
    with monkeypatch.context() as patch:
        patch.setattr(decode_state, "grown", lambda *given, **more: grown(*given, **more) if left.pop() else None)
        with pytest.raises(IndexError):
            loop.join(REQUESTS[3])
    others = loop.join(REQUESTS[3])
    while loop.step():
        pass
    check(model, rows, REQUESTS[first])
    check(model, others, REQUESTS[3])


def test_tokens_are_drawn_by_inverse_transform_and_a_declined_invoke_gives_a_word(
    model: VisMemModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the rows decline invoke tokens: the same number, rescaled within the invokes' share, draws a word."""
    count, words = 400, model.vocabulary
    logits = 2 * torch.randn(count, words + 2, generator=torch.Generator().manual_seed(1))
    logits[:, words - 1 :] += 4  # so that many invoke tokens are drawn, and the last word
    monkeypatch.setattr(model, "logits", lambda last: logits.clone())
    uniform, declines = (np.arange(count) + 0.5) / count, np.arange(count) % 2 == 1
    temperature = np.where(np.arange(count) % 4 < 2, 0.8, 0.0)
    none, standing = np.zeros((count, 2), bool), np.tile([0, 1], (count, 1))
    forced = np.where(np.arange(count) % 50 == 7, 1, -1)
    asked = Asked(temperature, uniform, none, declines, standing, forced)
    tokens, logprobs = TorchExecutor(model).choose(asked)
    for row in range(count):
        scaled = (logits[row] / (0.8 if temperature[row] else 1.0)).log_softmax(-1)
        mass = scaled.double().exp().cumsum(0).numpy()
        at, end = uniform[row] * mass[-1], words if declines[row] else words + 2
        column = int(np.searchsorted(mass, at, side="right")) if temperature[row] else int(scaled[:end].argmax())
        if column >= end:
            share = (at - mass[words - 1]) / (mass[-1] - mass[words - 1])
            column = int(np.searchsorted(mass[:words], share * mass[words - 1], side="right"))
        column = words + 1 if forced[row] == 1 else column
        expected = model.invoke_ids[tuple(MemoryKind)[column - words]] if column >= words else column
        assert (tokens[row], logprobs[row]) == (expected, pytest.approx(float(scaled[column]), abs=1e-6)), row


def test_a_question_is_prepared_for_the_thread_that_decodes(model: VisMemModel) -> None:
    executor, sample = TorchExecutor(model), SAMPLES[0]
    images = [Image.open(io.BytesIO(data)) for data in sample.images]
    prepared = executor.prepare(images, sample.turns(), 5)
    assert prepared.id == ""
    assert prepared.inputs.ids.equal(inputs_of(model.backbone, [sample]).ids)
    found = generate(model, [prepared], Off(), max_new_tokens=5)  # type: ignore[list-item]  # as a runtime hands it on
    assert found == generate(model, [replace(sample, id="")], Off(), max_new_tokens=5)
    with pytest.raises(RequestError, match="PROMPT holds <m_I\\^s>"):
        executor.prepare(images, one_turn("what is <m_I^s>?", len(images)), 5)


@torch.inference_mode()
def test_a_loop_without_rows_decides_nothing(model: VisMemModel) -> None:
    executor = TorchExecutor(model)
    loop = DecodeLoop(executor)
    assert loop.step() == []
    (row,) = loop.join(Request(SAMPLES[:1], Off(), max_new_tokens=1))
    assert [found for found, _ in loop.step()] == [row]
    assert row.finished
    assert len(executor.state.embeds) == 0, "nothing is kept for memories that cannot come"
    assert loop.step() == []


def test_samples_of_one_name_are_drawn_alike(model: VisMemModel) -> None:
    """Random numbers hang on the name alone: a server names all its questions alike, so an answer can be repeated."""
    twin: Sample = replace(SAMPLES[0], id="")
    first, second = generate(model, [twin, twin], Learned(), max_new_tokens=10, temperature=1.0, seed=4)
    assert first.token_ids == second.token_ids

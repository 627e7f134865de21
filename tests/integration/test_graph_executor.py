"""The executor over a bundle's graphs, the graphs being the modules from which they are exported: torch decodes alike.

`exported/` asks the same of real graphs, which take half a minute to export.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import tiny
import torch
import torch.utils._pytree
from numpy.typing import NDArray
from tokenizers import Tokenizer

from vismem.export.onnx import Graph, graphs_of, runtime_settings
from vismem.export.parity import check_parity, prepared
from vismem.generation.engine import generate, rollout_of
from vismem.generation.invocation import InvocationPolicy, Learned, Off, Random, Replay, row_key
from vismem.generation.loop import DecodeLoop, Request, Row, greedy_columns
from vismem.generation.onnx_executor import STEP, OnnxExecutor, _grown, shares
from vismem.models.kinds import MemoryKind
from vismem.models.memory import pooling
from vismem.models.tokens import delimiter_ids
from vismem.models.vismem import VisMemModel
from vismem.runtime.bundle import Bundle
from vismem.runtime.limits import RequestError, Room

SHORT, LONG = MemoryKind
SAMPLES = tuple(replace(sample, id="") for sample in tiny.samples())  # a question from outside has no id
EVERYWHERE = Random(probability=0.5, anywhere=1.0)
ELSEWHERE = Replay(recorded={row_key("", 0): [(1, LONG), (4, SHORT)]}, swap=True)
ASKED: tuple[tuple[InvocationPolicy, int, float], ...] = (  # with tokens and temperature, each for a sample of its own
    (Learned(), 12, 0.0),
    (Off(), 5, 0.7),
    (EVERYWHERE, 9, 1.0),
    (Learned(sampled=(LONG,)), 14, 1.0),
    (Learned(limit=1), 8, 1.3),
    (ELSEWHERE, 10, 1.0),
    (ELSEWHERE, 10, 0.0),
    (Learned(), 7, 1.0),
)


class Computed:
    """A graph before its export, called as `bundle.Graph` is; how often it was. It takes inputs of its types alone."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.inputs, self.calls = graph, graph.inputs, 0
        self.types = [tensor.dtype for tensor in torch.utils._pytree.tree_leaves(graph.arguments)]

    @torch.no_grad()
    def __call__(self, **values: NDArray[Any]) -> dict[str, NDArray[Any]]:
        self.calls += 1
        given: list[Any] = [torch.from_numpy(np.ascontiguousarray(values[name])) for name in self.inputs]
        assert [tensor.dtype for tensor in given] == self.types, self.graph.name
        named = len(self.graph.arguments) - 1
        if isinstance(self.graph.arguments[-1], list):
            given = [*given[:named], given[named:]]
        found, _ = torch.utils._pytree.tree_flatten(self.graph.module(*given))
        return {name: tensor.numpy() for name, tensor in zip(self.graph.outputs, found, strict=True)}


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> VisMemModel:
    """A model that likes to invoke, with learned first tokens: they start at zero where they are added to others."""
    model = tiny.eager(tiny_base)
    for former in (model.short, model.long):
        former.memory_init.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def bundle(model: VisMemModel) -> Bundle:
    return opened(model)


def opened(model: VisMemModel) -> Bundle:
    rows = torch.cat([model.tokens.invoke, model.tokens.end])
    tokenizer = Tokenizer.from_str(model.backbone.processor.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_padding()
    graphs = SimpleNamespace(
        new_tokens=120,
        settings=runtime_settings(model),
        embedding=model.backbone.embedding.weight.detach().numpy(),
        memory_rows=rows.detach().numpy(),
        tokenizer=tokenizer,
        **{graph.name: Computed(graph) for graph in graphs_of(model)},
    )
    return cast(Bundle, graphs)


def test_answers_and_memories_are_torchs(model: VisMemModel, bundle: Bundle) -> None:
    parity = check_parity(model, OnnxExecutor(bundle), SAMPLES[:4], max_new_tokens=12, tolerance=1e-4)
    assert (parity.passed, parity.greedy_equal, parity.differences) == (True, 4, ())
    assert parity.memories > 2 * 4
    assert parity.max_memory_difference < 1e-4


def test_long_prompts_are_read_one_after_the_other_and_short_ones_together(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, inside, seen = OnnxExecutor(bundle), list[int](), list[int]()

    def read(*_: Any) -> None:
        inside.append(1)
        time.sleep(0.1)
        seen.append(len(inside))
        inside.pop()

    monkeypatch.setattr(executor, "_read", read)
    question = prepared(executor, SAMPLES[0], 4)
    for whole, together in ((1, 1), (10**9, 4)):
        executor.attending = Room(whole)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: executor.read(question, memory=False), range(4)))
        assert max(seen) == together
        seen.clear()


def test_equal_answers_with_memories_beyond_the_tolerance_do_not_pass(
    model: VisMemModel, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vismem.export.parity.memory_difference", lambda *_: 2e-4)
    parity = check_parity(model, OnnxExecutor(bundle), SAMPLES[:2], max_new_tokens=6, tolerance=1e-4)
    assert (parity.passed, parity.greedy_equal, parity.max_memory_difference) == (False, 2, 2e-4)


def test_invoke_rows_that_stage_two_left_equal_are_the_short_one_in_every_runtime(tiny_base: Path) -> None:
    model = tiny.eager(tiny_base)
    for rows in (model.tokens.head, model.tokens.bias):
        rows[1] = rows[0]
    parity = check_parity(model, OnnxExecutor(opened(model)), SAMPLES, max_new_tokens=12, tolerance=1e-4)
    assert (parity.greedy_equal, parity.differences) == (len(SAMPLES), ())
    answers = [generate(model, [sample], Learned(), max_new_tokens=12)[0] for sample in SAMPLES]
    assert {place.kind for answer in answers for place in answer.invocations} == {SHORT}


@pytest.mark.parametrize("array", [np.array, torch.tensor])
@pytest.mark.parametrize(
    ("short", "long", "best"),
    [(1.0, 1.0, 1), (1.0, 1.00001, 1), (1.0, 1.001, 2), (1.001, 1.0, 1), (-np.inf, 1.0, 2), (-np.inf, -np.inf, 0)],
)
def test_of_two_invoke_tokens_that_differ_by_rounding_the_short_one_is_best(
    array: Any, short: float, long: float, best: int
) -> None:
    assert greedy_columns(array([[0.0, short, long], [2.0, short, long]])).tolist() == [best, 0]


def test_memories_whose_first_tokens_stand_alone_are_torchs_too(tiny_base: Path) -> None:
    memory = tiny.MEMORY.model_copy(update={"short_init": "random", "long_init": "random"})
    model = tiny.vismem(tiny_base, memory).requires_grad_(False)
    parity = check_parity(model, OnnxExecutor(opened(model)), SAMPLES[:2], max_new_tokens=4, tolerance=1e-4)
    assert (parity.passed, parity.differences, parity.memories) == (True, (), 2 * 2)


@pytest.mark.parametrize(("anywhere", "step"), [(True, 64), (False, 3)])
def test_rows_that_join_and_leave_at_any_time_are_each_as_torch_decodes_it_alone(
    model: VisMemModel, anywhere: bool, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vismem.generation.onnx_executor.STEP", step)
    invocation = model.invocation_config.model_copy(update={"anywhere": anywhere})
    monkeypatch.setattr(model, "invocation_config", invocation)
    spoken = delimiter_ids(model.backbone.processor.tokenizer, tuple("aeiou"))
    monkeypatch.setattr(model, "delimiter_ids", spoken)
    executor = OnnxExecutor(opened(model))
    loop, rows = DecodeLoop(executor), list[Row]()
    for number, (policy, tokens, temperature) in enumerate(ASKED):
        question = prepared(executor, SAMPLES[number], tokens)
        rows += loop.join(Request([question], policy, tokens, temperature, seed=number))
        loop.step()
        loop.step()
    while loop.step():
        pass
    for number, (row, (policy, tokens, temperature)) in enumerate(zip(rows, ASKED, strict=True)):
        (expected,) = generate(
            model, [SAMPLES[number]], policy, max_new_tokens=tokens, temperature=temperature, seed=number
        )
        found = rollout_of(model, row)
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4), number
        assert replace(found, logprobs=expected.logprobs) == expected, number
    assert {kind for row in rows for kind in (i.kind for i in row.invocations)} == {SHORT, LONG}
    assert (executor.questions, executor.logits, len(executor.hidden)) == ([], [], 0), "nothing stays allocated"


def test_the_decoder_reads_keys_where_they_lie_and_no_slots_of_a_longer_row_that_has_left(bundle: Bundle) -> None:
    executor, given, decoder = OnnxExecutor(bundle), list[NDArray[Any]](), bundle.decoder

    def read(**values: Any) -> Any:
        given.append(values["past_key_0"])
        return decoder(**values)

    bundle.decoder, loop = cast(Any, read), DecodeLoop(executor)
    (long,) = loop.join(Request([prepared(executor, replace(SAMPLES[0], question="a" * 600), 4)], Off(), 4))
    for sample in SAMPLES[1:3]:
        loop.join(Request([prepared(executor, sample, 4)], Off(), 4))
    assert long.prompt.length > 4 * STEP
    loop.step()
    loop.step()
    assert given[-1].shape == executor.past["past_key_0"][:3].shape
    assert np.shares_memory(given[-1], executor.past["past_key_0"])
    loop.leave(long)
    loop.settle()
    assert given[-1].shape[::2] == (2, STEP)


def test_what_was_read_of_images_and_prompts_is_kept_within_the_bytes_that_are_given(bundle: Bundle) -> None:
    graphs: Any = bundle
    for size, again in ((10**9, (0, 0)), (0, (2, 1))):
        executor = OnnxExecutor(bundle, cache_bytes=size)
        first, second = (prepared(executor, SAMPLES[0], 4) for _ in range(2))
        executor.read(first, memory=True)
        before = graphs.vision.calls, graphs.decoder.calls
        executor.read(second, memory=True)
        assert (graphs.vision.calls - before[0], graphs.decoder.calls - before[1]) == again
        assert np.array_equal(first.read["hidden"], second.read["hidden"])
        assert all(np.array_equal(first.stream[name], second.stream[name]) for name in first.stream)
        for sample in SAMPLES[1:3]:
            other, alone = (prepared(by, sample, 4) for by in (executor, OnnxExecutor(bundle)))
            executor.read(other, memory=True)
            OnnxExecutor(bundle).read(alone, memory=True)
            for name, values in (alone.stream | alone.read).items():
                assert np.array_equal((other.stream | other.read)[name], values), name


def test_a_prompt_joins_without_what_short_memories_read_of_its_images(bundle: Bundle) -> None:
    graphs: Any = bundle
    executor = OnnxExecutor(bundle)
    executor.join(Request([prepared(executor, SAMPLES[0], 4)], Learned(), 4), limit=2)
    assert (graphs.vision.calls, graphs.decoder.calls) == (1, 1)


def test_memory_tokens_may_lie_beyond_the_table_of_embeddings(model: VisMemModel, bundle: Bundle) -> None:
    executor, ids = OnnxExecutor(bundle), np.array([5, *model.memory_ids, 0])
    expected = model.embed(torch.from_numpy(ids)).numpy()
    assert np.array_equal(executor._embed(ids), expected)
    bundle.embedding = bundle.embedding[: min(model.memory_ids)]
    assert np.array_equal(executor._embed(ids), expected)


def test_limits_are_the_models_own_and_a_question_over_them_is_refused(
    model: VisMemModel, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = OnnxExecutor(bundle, max_patches=10)
    assert [executor.limit(asked) for asked in (None, 0, 1, 99)] == [model.limit(asked) for asked in (None, 0, 1, 99)]
    with pytest.raises(RequestError, match="patches: the limit is 10"):
        prepared(executor, SAMPLES[0], 4)
    held, most = bundle.settings["decoder"]["max_positions"], executor.limit(None)
    long = replace(SAMPLES[0], question="how many? " * 200)
    executor.max_patches = tokens = len(prepared(OnnxExecutor(bundle), long, 4).prompt.ids)
    prepared(executor, long, 4)
    executor.max_patches -= 1
    monkeypatch.setattr("vismem.runtime.question.decoded", None)  # no image is decoded before
    with pytest.raises(RequestError, match=f"make {tokens} tokens: the limit is {tokens - 1}; send less"):
        prepared(executor, long, 4)
    monkeypatch.undo()
    executor.max_patches = None
    read = int(prepared(executor, SAMPLES[0], 4).prompt.positions.max()) + 1
    fits = held - read - most * (max(executor.lengths.values()) + 2)
    prepared(executor, SAMPLES[0], fits)
    with pytest.raises(RequestError, match="positions"):
        prepared(executor, SAMPLES[0], fits + 1)


def test_what_is_allocated_stays_where_fewer_rows_are_needed_and_doubles_where_more_are() -> None:
    held = np.ones((5, 2, 3, 1), np.float32)
    assert _grown(held, 3, 2, slots=2) is held
    assert _grown(held, 3, 4, slots=2).shape == (5, 2, 4, 1)
    more = _grown(held, 6, 3, slots=2)
    assert more.shape == (10, 2, 3, 1), "many rows that join one by one are not copied each time"
    assert (more[:5] == 1).all()
    assert not more[5:].any()


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9, 12])
def test_image_tokens_are_shared_out_as_torch_shares_them(count: int) -> None:
    visual = torch.ones(1, count, dtype=torch.bool)
    np.testing.assert_allclose(shares(4, count), pooling(visual, 4)[0].numpy(), atol=1e-7)

"""The rollout engine against Hugging Face, against one full pass, and against itself in other company."""

import dataclasses
import io
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from transformers import DynamicCache
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

from vismem.data.collate import prompt_messages
from vismem.generation import replay, token_scores
from vismem.generation.engine import generate
from vismem.generation.invocation import InvocationPolicy, Learned, Off, Random, Replay, row_key
from vismem.generation.replay import decisions_of, prefill, score, without_memory
from vismem.generation.types import LATENT
from vismem.models.kinds import MemoryKind
from vismem.models.memory import causal_mask
from vismem.models.vismem import VisMemModel


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> VisMemModel:
    return tiny.vismem(tiny_base)


@pytest.fixture(scope="module")
def eager(tiny_base: Path) -> VisMemModel:
    return tiny.eager(tiny_base)


RANDOM = Random(probability=0.5, anywhere=0.5)


def test_with_invocation_off_the_text_equals_hugging_face_generate(model: VisMemModel) -> None:
    processor, base = model.backbone.processor, model.backbone.model
    rollouts = generate(model, tiny.samples(), Off(), max_new_tokens=20)
    for sample, rollout in zip(tiny.samples(), rollouts, strict=True):
        text = processor.apply_chat_template(prompt_messages(sample), tokenize=False, add_generation_prompt=True)
        images = [Image.open(io.BytesIO(data)).convert("RGB") for data in sample.images]
        inputs = processor(text=[text], images=images, return_tensors="pt")
        output = base.generate(**inputs, max_new_tokens=20, do_sample=False)
        expected = output[0, inputs["input_ids"].shape[1] :].tolist()
        assert list(rollout.token_ids) == expected[: len(rollout.token_ids)]
        assert rollout.text == processor.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("policy", [Off(), RANDOM, Learned(), Learned(sampled=(MemoryKind.LONG,))])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_is_the_same_alone_and_among_others(eager: VisMemModel, policy: object, temperature: float) -> None:
    together = generate(eager, tiny.samples(), policy, max_new_tokens=16, temperature=temperature, seed=3)  # type: ignore[arg-type]
    if not isinstance(policy, Off):
        assert len({r.invocations for r in together}) > 1, "rows should invoke at different places"
    for sample, expected in zip(tiny.samples(), together, strict=True):
        alone = generate(eager, [sample], policy, max_new_tokens=16, temperature=temperature, seed=3)[0]  # type: ignore[arg-type]
        assert alone.token_ids == expected.token_ids
        assert alone.invocations == expected.invocations
        assert alone.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


@pytest.mark.parametrize(
    ("policy", "most"),
    [(RANDOM, 3), (Learned(), 3), (Learned(limit=2), 2), (Learned(limit=1), 1), (Learned(limit=0), 0)],
)
def test_replay_scores_what_decoding_scored(eager: VisMemModel, policy: InvocationPolicy, most: int) -> None:
    """Latents, cache and positions of the update pass equal those of sampling, and so does what was barred."""
    rollouts = generate(eager, tiny.samples(), policy, max_new_tokens=16, temperature=1.0, seed=5, group_size=2)
    assert max(len(r.invocations) for r in rollouts) == most
    context = prefill(eager, tiny.samples())
    sample = torch.arange(len(tiny.samples())).repeat_interleave(2)
    scores = score(eager, context, rollouts, sample, policy)
    for row, rollout in enumerate(rollouts):
        for index, (sampled, expected) in enumerate(zip(rollout.loss_mask, rollout.logprobs, strict=True)):
            assert bool(scores.mask[row, index]) == sampled
            if sampled:
                assert float(scores.logprobs[row, index]) == pytest.approx(expected, abs=1e-4)


def test_scores_do_not_depend_on_how_many_logits_are_held(
    eager: VisMemModel, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, found = tiny.vismem(tiny_base, seed=1), []
    model.tokens.load_state_dict(eager.tokens.state_dict())
    rollouts = generate(eager, tiny.samples(), Learned(), max_new_tokens=16, temperature=0.7, seed=5)
    for logits in (token_scores.MAX_LOGITS, 7 * model.vocabulary):
        monkeypatch.setattr(token_scores, "MAX_LOGITS", logits)
        model.zero_grad()
        context, sample = prefill(model, tiny.samples()), torch.arange(len(rollouts))
        scores = score(model, context, rollouts, sample, Learned(), temperature=0.7)
        scores.logprobs.sum().backward()
        found.append((scores, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (whole, gradients), (pieces, again) = found
    for name in ("logprobs", "entropy"):
        assert torch.allclose(getattr(whole, name), getattr(pieces, name), atol=1e-5), name
    assert gradients.keys() == again.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, again[name], atol=1e-4, rtol=1e-3), name


def test_entropy_and_word_scores_are_those_of_the_distributions(eager: VisMemModel) -> None:
    rollouts = generate(eager, tiny.samples(), Learned(), max_new_tokens=8, temperature=0.7, seed=3)
    context, sample = prefill(eager, tiny.samples()), torch.arange(len(rollouts))
    scores = score(eager, context, rollouts, sample, Learned(), temperature=0.7)
    first = eager.logits(context.last) / 0.7
    expected = torch.distributions.Categorical(logits=first).entropy()
    assert torch.allclose(scores.entropy[:, 0], expected, atol=1e-4)
    words = first[:, : eager.vocabulary].log_softmax(-1)
    among_words = score(eager, context, rollouts, sample, temperature=0.7).logprobs
    spoken = [row for row, rollout in enumerate(rollouts) if rollout.token_ids[0] not in eager.memory_ids]
    assert spoken
    for row in spoken:
        assert float(among_words[row, 0]) == pytest.approx(float(words[row, rollouts[row].token_ids[0]]), abs=1e-4)


def test_a_long_memory_is_the_same_whether_the_prompts_were_read_before(eager: VisMemModel) -> None:
    """Prompts of several lengths: what all have of them is read once, the rest with each memory."""
    policy = Random(probability=1.0, anywhere=0.5, kinds=(MemoryKind.LONG,))
    rollouts = generate(eager, tiny.samples(), policy, max_new_tokens=10, temperature=1.0, seed=5, group_size=2)
    context, sample = prefill(eager, tiny.samples()), torch.arange(len(rollouts)) // 2
    assert len(set(context.prompt.mask.sum(1).tolist())) > 1
    found = []
    for prefix in (eager.long_prefix(context.prompt), DynamicCache()):  # the latter caches nothing
        with tiny.formed(eager) as memories:
            score(eager, dataclasses.replace(context, prefix=prefix), rollouts, sample)
        found.append(torch.cat([memory.flatten() for memory in memories]))
    assert torch.allclose(found[0], found[1], atol=1e-5)


def test_scores_do_not_depend_on_which_answers_go_together(eager: VisMemModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts = generate(eager, tiny.samples(), Learned(), max_new_tokens=16, temperature=1.0, seed=5)
    sample, found = torch.arange(len(rollouts)), []
    for rows in (replay.ROWS_TOGETHER, 3):
        monkeypatch.setattr(replay, "ROWS_TOGETHER", rows)
        found.append(score(eager, prefill(eager, tiny.samples()), rollouts, sample))
    for name in ("logprobs", "entropy", "mask"):
        assert torch.allclose(getattr(found[0], name).double(), getattr(found[1], name).double(), atol=1e-5), name


def test_cached_decoding_equals_one_full_pass_over_the_same_embeddings(eager: VisMemModel) -> None:
    sample = tiny.samples()[0]
    rollout = generate(eager, [sample], RANDOM, max_new_tokens=16, temperature=1.0, seed=7)[0]
    assert rollout.invocations
    context = prefill(eager, [sample])
    with tiny.formed(eager) as memories:
        score(eager, context, [rollout], torch.zeros(1, dtype=torch.long))
    latents = torch.cat([memory[0] for memory in _in_order(memories, rollout.invocations)])
    ids = torch.tensor(rollout.token_ids)
    answer = eager.embed(ids.clamp_min(0))
    answer[ids == LATENT] = latents
    prompt = context.prompt
    length = prompt.embeds.shape[1]
    embeds = torch.cat([prompt.embeds, answer[None]], dim=1)
    tail = prompt.next_position()[:, None] + torch.arange(len(ids))
    positions = torch.cat([prompt.positions, tail.expand(3, -1, -1)], dim=2)
    hidden = eager.backbone.language(embeds, positions, causal_mask(torch.ones(1, length + len(ids), dtype=torch.bool)))
    logits = eager.logits(hidden[:, length - 1 : -1])
    logits[..., eager.vocabulary :] = -torch.inf  # a random policy samples no invocation
    expected = logits.log_softmax(-1)[0].gather(1, eager.column_of(ids).clamp(0, eager.vocabulary - 1)[:, None])[:, 0]
    for index, sampled in enumerate(rollout.loss_mask):
        if sampled:
            assert rollout.logprobs[index] == pytest.approx(float(expected[index]), abs=1e-4)


def _in_order(latents: list[torch.Tensor], invocations: tuple) -> list[torch.Tensor]:  # type: ignore[type-arg]
    """One row's memories stand in the order of its invocations: one a chunk."""
    assert [m.shape[1] for m in latents] == [4 if i.kind is MemoryKind.SHORT else 6 for i in invocations]
    return latents


def test_nothing_changes_before_the_first_invocation(eager: VisMemModel) -> None:
    plain = generate(eager, tiny.samples(), Off(), max_new_tokens=16)
    forced = generate(eager, tiny.samples(), Random(probability=0.3, anywhere=0.5), max_new_tokens=16)
    invoked = [r for r in forced if r.invocations]
    assert invoked
    for before, after in zip(plain, forced, strict=True):
        first = after.invocations[0].position if after.invocations else len(after.token_ids)
        assert after.token_ids[:first] == before.token_ids[:first]


def test_a_memory_is_followed_by_its_own_end_token_and_ends_are_never_sampled(eager: VisMemModel) -> None:
    for rollout in generate(eager, tiny.samples(), Learned(), max_new_tokens=16, temperature=1.0):
        expected_ends = []
        for invocation in rollout.invocations:
            end = invocation.position + eager.length_of(invocation.kind) + 1
            inside = rollout.token_ids[invocation.position + 1 : end]
            assert set(inside) == {LATENT}
            assert rollout.token_ids[end] == eager.end_ids[invocation.kind]
            expected_ends.append(end)
        ends = [i for i, token in enumerate(rollout.token_ids) if token in eager.end_ids.values()]
        assert ends == expected_ends
        assert len(rollout.invocations) <= 3
        followers = {rollout.token_ids[end + 1] for end in ends if end + 1 < len(rollout.token_ids)}
        assert not followers & set(eager.memory_ids), "a word comes first after every memory"


def test_every_delimiter_gets_a_memory_within_the_limit(eager: VisMemModel, monkeypatch: pytest.MonkeyPatch) -> None:
    words = sorted({*range(eager.vocabulary)} - {*eager.memory_ids})
    monkeypatch.setattr(eager, "delimiter_ids", tuple(words[::3]))
    rollouts = generate(eager, tiny.samples(), Random(probability=1.0), max_new_tokens=12, temperature=1.0)
    most = eager.invocation_config.max_per_answer
    for rollout in rollouts:
        last = len(rollout.token_ids) - 1
        due = [0, *(i + 1 for i, t in enumerate(rollout.token_ids) if t in eager.delimiter_ids and i < last)]
        assert [i.position for i in rollout.invocations] == due[:most]
    assert max(len(r.invocations) for r in rollouts) == most


EVERYWHERE = Random(probability=1.0, anywhere=1.0)


@pytest.mark.parametrize("policy", [EVERYWHERE, Learned(), *(Learned(sampled=(kind,)) for kind in MemoryKind)])
def test_an_answer_gets_no_more_memories_than_the_limit(eager: VisMemModel, policy: InvocationPolicy) -> None:
    own = eager.invocation_config.max_per_answer
    for limit, most in ((None, own), (own + 5, own), (1, 1), (0, 0)):
        chosen = dataclasses.replace(policy, limit=limit)
        rollouts = generate(eager, tiny.samples(), chosen, max_new_tokens=12, temperature=1.0)
        found = max(len(r.invocations) for r in rollouts)
        assert found == most if policy == EVERYWHERE else min(most, 1) <= found <= most
        if isinstance(policy, Learned):
            assert all(i.kind in policy.sampled for r in rollouts for i in r.invocations)


def test_swapping_keeps_the_answer_up_to_the_first_invocation(eager: VisMemModel) -> None:
    rollouts = generate(eager, tiny.samples(), Learned(), max_new_tokens=16, temperature=1.0, seed=2)
    recorded = {row_key(r.sample_id, 0): decisions_of(eager, r) for r in rollouts}
    same = generate(eager, tiny.samples(), Replay(recorded=recorded), max_new_tokens=16, temperature=1.0, seed=2)
    swapped = generate(
        eager, tiny.samples(), Replay(recorded=recorded, swap=True), max_new_tokens=16, temperature=1.0, seed=2
    )
    for first, again, other in zip(rollouts, same, swapped, strict=True):
        if not first.invocations:
            continue
        start = first.invocations[0].position
        assert other.token_ids[:start] == first.token_ids[:start]
        assert other.invocations[0].kind is first.invocations[0].kind.other
        assert again.invocations[0].kind is first.invocations[0].kind


def test_leaving_memories_out_leaves_the_words(eager: VisMemModel) -> None:
    for rollout in generate(eager, tiny.samples(), Learned(), max_new_tokens=16, temperature=1.0):
        bare = without_memory(rollout)
        words = [t for t in rollout.token_ids if t != LATENT and t not in eager.memory_ids]
        assert list(bare.token_ids) == words
        assert len(bare.loss_mask) == len(bare.logprobs) == len(words)
        assert (bare.invocations, bare.marked_text) == ((), rollout.text)


def _exact_norm(self: Qwen2_5_VLRMSNorm, hidden: torch.Tensor) -> torch.Tensor:
    return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def test_the_gradient_through_a_memory_equals_a_numerical_one(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Qwen2_5_VLRMSNorm, "forward", _exact_norm)  # Hugging Face's computes in float32
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # so do its rotary positions
    model = tiny.vismem(tiny_base)
    model.backbone.model.double()
    model.double()
    sample = tiny.samples()[1]
    rollout = generate(model, [sample], Random(probability=1.0, anywhere=0.6), max_new_tokens=10, temperature=1.0)[0]
    assert len(rollout.invocations) > 1

    def loss() -> torch.Tensor:
        scores = score(model, prefill(model, [sample]), [rollout], torch.zeros(1, dtype=torch.long))
        return scores.logprobs.sum()

    loss().backward()
    kinds = {i.kind for i in rollout.invocations}
    names = ["builder.query_init"] + (["short.memory_init"] if MemoryKind.SHORT in kinds else ["long.memory_init"])
    parameters = dict(model.named_parameters())
    for name in names:
        parameter = parameters[name]
        assert parameter.grad is not None
        direction = torch.randn(parameter.shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))
        step = 1e-4
        with torch.no_grad():
            parameter += step * direction
            up = loss()
            parameter -= 2 * step * direction
            down = loss()
            parameter += step * direction
        numerical = float((up - down) / (2 * step))
        assert float((parameter.grad * direction).sum()) == pytest.approx(numerical, rel=1e-3)


def test_a_saved_model_answers_as_before(eager: VisMemModel, tiny_base: Path, tmp_path: Path) -> None:
    eager.save_pretrained(tmp_path / "model")
    again = VisMemModel.from_pretrained(tmp_path / "model", tiny_base)
    first = generate(eager, tiny.samples(), Learned(), max_new_tokens=16)
    second = generate(again, tiny.samples(), Learned(), max_new_tokens=16)
    assert [dataclasses.asdict(r) for r in first] == [dataclasses.asdict(r) for r in second]

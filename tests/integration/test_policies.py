"""The controls (swapped, noise, shuffled, relook) on every family: where they insert, and exactly what."""

from typing import Any

import numpy as np
import pytest
import tiny
import tiny_families as families
import torch
from torch import Tensor

from vismem.data.collate import prompt_messages
from vismem.data.sample import Sample
from vismem.errors import UserError
from vismem.evaluation.arms import ARMS, find_arm
from vismem.export.parity import recorded_memories
from vismem.generation.controls import Noise, OfKind, Relook, Shuffled, Swapped
from vismem.generation.engine import generate
from vismem.generation.invocation import InvocationPolicy, Learned, Off, Replay, StepView, row_key
from vismem.generation.prompts import encode
from vismem.generation.replay import answer_states, decisions_of, prefill
from vismem.generation.types import LATENT, Rollout
from vismem.models.backbones.base import Backbone
from vismem.models.kinds import MemoryKind
from vismem.models.memory import causal_mask
from vismem.models.vismem import VisMemModel
from vismem.records import VISMEM

TOKENS = 8
MARKERS = {  # the tokens that open and close an image in a prompt
    "qwen2_5_vl": ("<|vision_start|>", "<|vision_end|>"),
    "internvl": ("<img>", "</img>"),
    "llava_onevision": ("<image>", "<image>"),
}


@pytest.fixture(scope="module", params=tuple(MARKERS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VisMemModel:
    """A model that invokes both kinds in its greedy answers, and in some of its sampled answers none."""
    model = tiny.vismem(families.save_base(tmp_path_factory.mktemp(request.param), request.param))
    plain = generate(model, families.samples(), Off(), max_new_tokens=TOKENS)
    with torch.no_grad():
        context = prefill(model, families.samples())
        states = answer_states(model, context, plain, torch.arange(len(plain))).flatten(0, 1)
        for seed in range(50):
            model.tokens.head.copy_(torch.randn(model.tokens.head.shape, generator=torch.Generator().manual_seed(seed)))
            words, invokes = model.logit_parts(states)
            model.tokens.bias.copy_((words.amax(1, keepdim=True) - invokes).quantile(1 / 8, dim=0))
            greedy, sampled = answers(model, Learned()), answers(model, Learned(), temperature=1.0, group_size=4)
            kinds, some = ({i.kind for r in rs for i in r.invocations} for rs in (greedy, sampled))
            if kinds == some == set(MemoryKind) and not all(r.invocations for r in sampled):
                return model.requires_grad_(False)
    pytest.fail("no such model was drawn")


def answers(model: VisMemModel, policy: InvocationPolicy, samples: Any = None, **more: Any) -> list[Rollout]:
    chosen = families.samples() if samples is None else samples
    return generate(model, chosen, policy, **{"max_new_tokens": TOKENS, "seed": 3, **more})


def full_pass(model: VisMemModel, sample: Sample, rollout: Rollout, latents: Tensor) -> Tensor:
    """(T,) log-probabilities, invocations barred, of the answer's tokens in one pass with `latents` (N, d) in place."""
    prompt, ids = encode(model.backbone, [sample]), torch.tensor(rollout.token_ids)
    answer = model.embed(ids.clamp_min(0))
    answer[ids == LATENT] = latents
    length = prompt.embeds.shape[1]
    tail = prompt.next_position()[:, None] + torch.arange(len(ids))
    hidden = model.backbone.language(
        torch.cat([prompt.embeds, answer[None]], dim=1),
        torch.cat([prompt.positions, tail.expand(3, -1, -1)], dim=2),
        causal_mask(torch.ones(1, length + len(ids), dtype=torch.bool)),
    )
    logits = model.logits(hidden[0, length - 1 : -1])[:, : model.vocabulary]
    return logits.log_softmax(-1).gather(1, ids.clamp(0, model.vocabulary - 1)[:, None])[:, 0]


def words_behind_the_memory(rollout: Rollout, values: Any) -> list[float]:
    """The values at the words that follow an answer's only memory: no other invocation could be sampled there."""
    start = rollout.invocations[0].position + 1
    return [float(v) for v, sampled in list(zip(values, rollout.loss_mask, strict=True))[start:] if sampled]


# --- swapped, noise, shuffled ---


@pytest.mark.parametrize("policy", [Swapped(), Noise(), Shuffled()])
def test_a_control_invokes_first_where_the_model_would_and_leaves_other_answers_alone(
    model: VisMemModel, policy: InvocationPolicy
) -> None:
    learned, controlled = (answers(model, p, temperature=1.0, group_size=4) for p in (Learned(), policy))
    assert {bool(r.invocations) for r in learned} == {True, False}, "some answers should invoke, others not"
    for expected, rollout in zip(learned, controlled, strict=True):
        if not expected.invocations:
            assert rollout.token_ids == expected.token_ids
            continue
        first, place = rollout.invocations[0], expected.invocations[0].position
        assert first.position == place
        assert rollout.token_ids[:place] == expected.token_ids[:place]
        assert (first.kind is expected.invocations[0].kind) != isinstance(policy, Swapped)


@pytest.mark.parametrize("policy", [Swapped(), Noise(), Relook()])
def test_a_row_is_the_same_alone_and_among_others(model: VisMemModel, policy: InvocationPolicy) -> None:
    together = answers(model, policy, temperature=1.0)
    for sample, expected in zip(families.samples(), together, strict=True):
        alone = answers(model, policy, [sample], temperature=1.0)[0]
        assert alone.token_ids == expected.token_ids
        assert alone.invocations == expected.invocations
        assert alone.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_swapped_forms_the_other_kind_at_the_places_of_the_models_own_choice(model: VisMemModel) -> None:
    rollouts = answers(model, Swapped())
    assert {i.kind for r in rollouts for i in r.invocations} == set(MemoryKind)
    assert all(i.forced and not r.loss_mask[i.position] for r in rollouts for i in r.invocations)
    asked = {row_key(r.sample_id, 0): [(place, kind.other) for place, kind in decisions_of(model, r)] for r in rollouts}
    again = answers(model, Replay(recorded=asked, swap=True))
    assert [r.token_ids for r in again] == [r.token_ids for r in rollouts]
    for kind in MemoryKind:
        rollouts = answers(model, OfKind(kind=kind))
        assert {(i.kind, i.forced) for r in rollouts for i in r.invocations} == {(kind, True)}, "not the model's choice"


def test_noise_stands_where_the_memory_would_with_its_mean_and_spread(model: VisMemModel) -> None:
    checked = 0
    for sample in families.samples():
        with recorded_memories(model) as memories:
            rollout = answers(model, Noise(limit=1), [sample])[0]
        if not rollout.invocations:
            continue
        memory = torch.from_numpy(memories[0])[None]
        decided = rollout.invocations[0].position + 1
        view = StepView((row_key(sample.id, 0),), np.array([decided]), np.array([False]))
        noise = Noise().latents(memory, view, seed=3)
        assert float(noise.mean()) == pytest.approx(float(memory.mean()), abs=1e-6)
        assert float(noise.std()) == pytest.approx(float(memory.std()), rel=1e-4)
        assert float((noise - memory).abs().mean()) > float(memory.std()) / 2
        expected = words_behind_the_memory(rollout, full_pass(model, sample, rollout, noise[0]))
        assert words_behind_the_memory(rollout, rollout.logprobs) == pytest.approx(expected, abs=1e-4)
        checked += len(expected)
    assert checked > TOKENS


def test_shuffled_inserts_what_the_next_sample_forms_at_its_own_start(model: VisMemModel) -> None:
    samples = families.samples()
    memories: dict[tuple[str, MemoryKind], Tensor] = {}
    for row, rollout in enumerate(answers(model, Shuffled(limit=1), temperature=1.0, group_size=4)):
        if not rollout.invocations:
            continue
        kind, own, donor = rollout.invocations[0].kind, samples[row // 4], samples[(row // 4 + 1) % len(samples)]
        if (donor.id, kind) not in memories:
            with recorded_memories(model) as formed:
                answers(model, Replay(recorded={row_key(donor.id, 0): [(0, kind)]}), [donor], max_new_tokens=1)
            memories[donor.id, kind] = torch.from_numpy(formed[0])
        expected = words_behind_the_memory(rollout, full_pass(model, own, rollout, memories[donor.id, kind]))
        assert words_behind_the_memory(rollout, rollout.logprobs) == pytest.approx(expected, abs=1e-4)
    assert {kind for _, kind in memories} == set(MemoryKind)


def test_shuffled_repeats_and_needs_two_samples(model: VisMemModel) -> None:
    assert answers(model, Shuffled()) == answers(model, Shuffled())
    with pytest.raises(UserError, match="only one"):
        answers(model, Shuffled(), families.samples()[:1])


# --- kinds and limits ---


@pytest.mark.parametrize("kind", MemoryKind)
def test_forced_arms_form_their_kind_at_the_start_and_at_every_delimiter(
    model: VisMemModel, kind: MemoryKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = sorted({*range(model.vocabulary)} - {*model.memory_ids})
    monkeypatch.setattr(model, "delimiter_ids", tuple(words[::2]))
    most = model.invocation_config.max_per_answer
    counts = set()
    for name, limit in ((f"forced_{kind}", most), (f"forced_{kind}@2", 2), (f"start_{kind}", 1)):
        for rollout in answers(model, policy_of(name), temperature=1.0):
            last = len(rollout.token_ids) - 1
            due = [0, *(i + 1 for i, t in enumerate(rollout.token_ids) if t in model.delimiter_ids and i < last)]
            assert [i.position for i in rollout.invocations] == due[:limit]
            assert {(i.kind, i.forced) for i in rollout.invocations} == {(kind, True)}
            counts.add(len(rollout.invocations))
    assert counts == {*range(1, most + 1)}


@pytest.mark.parametrize("kind", MemoryKind)
def test_as_a_kind_forms_that_kind_at_the_place_where_the_model_first_asks(
    model: VisMemModel, kind: MemoryKind
) -> None:
    learned, all_one = (
        answers(model, policy_of(name), group_size=4, temperature=1.0) for name in (VISMEM, f"as_{kind}")
    )
    assert {i.kind for r in learned for i in r.invocations} == set(MemoryKind)
    assert {i.kind for r in all_one for i in r.invocations} == {kind}
    for expected, rollout in zip(learned, all_one, strict=True):
        if {i.kind for i in expected.invocations} <= {kind}:
            assert rollout.token_ids == expected.token_ids
        else:
            place = next(n for n, i in enumerate(expected.invocations) if i.kind is not kind)
            start = expected.invocations[place].position
            assert rollout.invocations[place].position == start
            assert rollout.token_ids[:start] == expected.token_ids[:start]


def test_no_answer_of_any_arm_has_more_memories_than_the_limit(
    model: VisMemModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal budgets: whatever the placement, and whatever limit an arm's name asks for."""
    monkeypatch.setattr(model, "delimiter_ids", tuple(range(model.vocabulary)))
    own, reached = model.invocation_config.max_per_answer, 0
    for name, arm in ARMS.items():
        limits = {"": own} | ({} if arm.policy.limit is not None else {"@1": 1, f"@{own + 2}": own})
        for at, most in limits.items():
            many = max(len(r.invocations) for r in answers(model, policy_of(name + at), temperature=1.0))
            assert many <= most, name + at
            reached += many == own
    assert reached > len(ARMS) // 3


def policy_of(name: str) -> InvocationPolicy:
    arm = find_arm(name)
    assert arm, name
    return arm.policy


# --- relook ---


def by_hand(backbone: Backbone, sample: Sample) -> tuple[dict[str, Tensor], int]:
    """What Hugging Face's model takes for the prompt with its images once more behind it; tokens added."""
    processor = backbone.processor
    text = processor.apply_chat_template(prompt_messages(sample), tokenize=False, add_generation_prompt=True)
    images: Any = families.pictures(sample)
    if backbone.family != "qwen2_5_vl":
        images = [images]
    inputs = dict(processor(text=[text], images=images if sample.images else None, return_tensors="pt"))
    ids = inputs["input_ids"]
    markers = torch.tensor(processor.tokenizer.convert_tokens_to_ids(list(MARKERS[backbone.family])))
    places = torch.isin(ids[0], markers).nonzero()[:, 0].tolist()
    block = slice(places[0], places[-1] + 1) if sample.images else slice(0, 0)
    for name, value in inputs.items():
        along_text = value.shape == ids.shape and name != "pixel_values"
        inputs[name] = torch.cat([value, value[:, block]], dim=1) if along_text else torch.cat([value, value])
    if "batch_num_images" in inputs:  # the second look is cut into tiles as the first
        inputs["batch_num_images"] = torch.tensor([len(sample.images)] * 2)
    return inputs, ids[0, block].numel()


def test_relook_equals_hugging_face_with_the_images_inserted_again(model: VisMemModel) -> None:
    theirs = model.backbone.model
    for sample, rollout in zip(families.samples(), answers(model, Relook()), strict=True):
        inputs, added = by_hand(model.backbone, sample)
        assert bool(added) == bool(sample.images)
        assert rollout.token_ids[:added] == (LATENT,) * added
        words = list(rollout.token_ids[added:])
        assert LATENT not in words
        output = theirs.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        assert words == output[0, inputs["input_ids"].shape[1] :][: len(words)].tolist()


def test_relook_equals_one_full_pass_of_hugging_face_over_the_same_tokens(model: VisMemModel) -> None:
    for sample, rollout in zip(families.samples(), answers(model, Relook(), temperature=1.0), strict=True):
        inputs, added = by_hand(model.backbone, sample)
        words, shape = torch.tensor([rollout.token_ids[added:]]), inputs["input_ids"].shape
        for name, value in inputs.items():
            if value.shape == shape and name != "input_ids":
                fill = 1 if name == "attention_mask" else 0
                inputs[name] = torch.cat([value, torch.full_like(words, fill)], dim=1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], words], dim=1)
        logits = model.backbone.model(**inputs).logits[0, -words.shape[1] - 1 : -1]
        logits[:, [token for token in model.memory_ids if token < logits.shape[1]]] = -torch.inf
        expected = logits.log_softmax(-1).gather(1, words.T)[:, 0]
        assert rollout.logprobs[added:] == pytest.approx(expected.tolist(), abs=1e-4)
        assert rollout.loss_mask == (False,) * added + (True,) * words.shape[1]
        assert rollout.answer_length == words.shape[1]
        assert not rollout.invocations


def test_relook_needs_nothing_that_was_trained(model: VisMemModel) -> None:
    expected = [r.token_ids for r in answers(model, Relook())]
    assert expected != [r.token_ids for r in answers(model, Off())]
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    try:
        with model.policy_lora.active(False):
            assert [r.token_ids for r in answers(model, Relook())] == expected
    finally:
        model.load_state_dict(saved)

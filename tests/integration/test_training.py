"""Both stages on a tiny model: what they write, and what their gradients do and do not depend on.

What each stage changes: `test_invariants`. Kills and seeds: `test_resume`. Micro-batches, the first ratio:
`test_published_defects`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_families
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny_stages import objective_of

from vismem.config import (
    BaseConfig,
    Config,
    GrpoConfig,
    GrpoStageConfig,
    MemoryConfig,
    Stage1Config,
    Stage2Config,
    WarmStartConfig,
)
from vismem.data.sample import Sample, read_samples
from vismem.errors import UserError
from vismem.generation.engine import generate
from vismem.generation.invocation import Random
from vismem.generation.replay import prefill, score
from vismem.generation.types import Invocation as Invoked
from vismem.generation.types import Rollout
from vismem.models.kinds import MemoryKind
from vismem.models.loading import load_base
from vismem.models.vismem import VisMemModel
from vismem.training import run
from vismem.training.base import base
from vismem.training.run import FORMATION, INVOCATION, POLICY_LORA, trainable
from vismem.training.stage1 import Formation, stage1
from vismem.training.stage2 import Invocation, stage2

GRPO = GrpoConfig(batch_size=2, max_new_tokens=10)
STAGE1 = Stage1Config(
    steps=4, group_size=4, learning_rate=1e-2, warm_start=WarmStartConfig(steps=3, batch_size=4)
)  # fmt: skip
STAGE2 = Stage2Config(steps=4, group_size=4, learning_rate=1e-2)
CONFIG = Config(memory=tiny.MEMORY, grpo=GRPO, stage1=STAGE1, stage2=STAGE2)
pytestmark = pytest.mark.usefixtures("scores_differ")


@pytest.fixture(scope="module")
def stages(
    tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory, scores_differ: None
) -> dict[str, Path]:
    inputs = {"base": tiny_base, "validate": tiny_data}
    for name, step in (("stage1", stage1), ("stage2", stage2)):
        inputs[name] = tmp_path_factory.mktemp(name)
        step(CONFIG, inputs, inputs[name])
    return inputs


def test_a_curve_can_be_followed_while_it_grows(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it holds at any step is the beginning of what it holds at the end."""
    seen: list[str] = []
    collect = Formation.collect

    def look(self: Formation, step: int) -> Any:
        seen.append(curve.read_text() if curve.is_file() else "")
        return collect(self, step)

    curve = tmp_path / "stage1.csv"
    monkeypatch.setattr(Formation, "collect", look)
    stage1(CONFIG, {"base": tiny_base, "validate": tiny_data}, tmp_path)
    assert [len(text.splitlines()) for text in seen] == [0, 2, 3, 4]
    assert all(curve.read_text().startswith(text) for text in seen)


@pytest.mark.parametrize("changed", ["stage1.invoke_probability", "invocation.max_per_answer"])
def test_a_stage_that_would_form_no_memory_is_refused_before_it_trains(
    changed: str, tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    section, name = changed.split(".")
    settings = getattr(CONFIG, section).model_copy(update={name: 0})
    with pytest.raises(UserError, match=f"would form no memory.*{changed}"):
        stage1(CONFIG.model_copy(update={section: settings}), {"base": tiny_base, "validate": tiny_data}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_large_base_that_would_see_next_to_nothing_of_an_image_is_refused(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vismem.training.run.SMALL_WIDTH", 1)
    memory = CONFIG.memory.model_copy(update={"prompt_pixels": MemoryConfig().prompt_pixels})
    with pytest.raises(UserError, match=r"memory.prompt_pixels 7056 is for the tiny VLM.*docs/models.md"):
        stage1(CONFIG.model_copy(update={"memory": memory}), {"base": tiny_base, "validate": tiny_data}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_base_is_loaded_and_saved_in_silence(
    tiny_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base(Config(base=BaseConfig(model=str(tiny_base))), {}, tmp_path)
    load_base(tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_a_stage_keeps_a_group_of_answers_every_few_steps(name: str, stages: dict[str, Path]) -> None:
    lines = (stages[name] / "samples" / "000000.jsonl").read_text().splitlines()
    assert len(lines) == STAGE1.group_size
    assert json.loads(lines[0]).keys() == {"question", "reference", "answer", "reward"}


@pytest.mark.parametrize(("name", "samples", "rollouts"), [("stage1", 3 * 4 + 4 * 2, 4 * 2 * 4), ("stage2", 8, 32)])
def test_a_stage_says_what_its_training_took(name: str, samples: int, rollouts: int, stages: dict[str, Path]) -> None:
    figures = json.loads((stages[name] / "metrics.json").read_text())
    assert (figures["train_samples"], figures["train_rollouts"]) == (samples, rollouts)
    assert figures["train_seconds"] > 0
    held = load_file(stages[name] / "memory.safetensors") | load_file(stages[name] / "policy.safetensors")
    trained = FORMATION + POLICY_LORA if name == "stage1" else INVOCATION
    assert figures["trainable_parameters"] == sum(w.numel() for n, w in held.items() if n.startswith(trained))


@pytest.mark.parametrize(("name", "both"), [("stage1", {"random_50"}), ("stage2", {"vismem", "vismem_sampled"})])
def test_a_stage_keeps_the_scores_of_the_same_questions_from_before_grpo_and_after(
    name: str, both: set[str], stages: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What GRPO itself changed is the difference of the two, question by question."""
    steps: list[int] = []
    collect = run.GrpoObjective.collect

    def count(self: Any, step: int) -> Any:
        steps.append(step)
        return collect(self, step)

    monkeypatch.setattr(run.GrpoObjective, "collect", count)
    monkeypatch.setattr(run, "score", lambda *_: float(len(steps)))
    {"stage1": stage1, "stage2": stage2}[name](CONFIG, stages, tmp_path)
    checks, figures = (json.loads((tmp_path / file).read_text()) for file in ("checks.json", "metrics.json"))
    assert set(checks["before"]) == both
    assert all(scores == [0.0] * figures["n"] for scores in checks["before"].values())
    assert both <= set(checks["after"])
    assert all(scores == [4.0] * figures["n"] for scores in checks["after"].values())


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_scores_kept_are_those_that_metrics_sum_up(name: str, stages: dict[str, Path]) -> None:
    checks, figures = (json.loads((stages[name] / file).read_text()) for file in ("checks.json", "metrics.json"))
    for arm, found in figures["validation"].items():
        assert 100 * sum(checks["after"][arm]) / figures["n"] == pytest.approx(found["score"])


def test_stage2_leaves_the_policy_s_adapter_where_it_is_not_asked_for(stages: dict[str, Path]) -> None:
    before, after = (load_file(stages[name] / "policy.safetensors") for name in ("stage1", "stage2"))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {"tokens.head", "tokens.bias"} <= changed <= {"tokens.head", "tokens.bias", "tokens.invoke", "tokens.end"}


@pytest.mark.parametrize("variant", tiny_families.VARIANTS[:4])
def test_gradient_checkpointing_leaves_every_gradient_of_formation(
    variant: str, tiny_data: Path, tmp_path: Path
) -> None:
    """The adapters are on while a memory is formed, and off again when the backward pass runs the layers once more."""
    _compare_checkpointing(tiny_families.save_base(tmp_path, variant), tiny_data, Formation, STAGE1, FORMATION)


def test_gradient_checkpointing_leaves_every_gradient_of_invocation(tiny_base: Path, tiny_data: Path) -> None:
    stage = STAGE2.model_copy(update={"policy_lora": True})
    _compare_checkpointing(tiny_base, tiny_data, Invocation, stage, ("tokens.", "policy_lora."))


def _compare_checkpointing(
    base: Path, data: Path, kind: type, stage: GrpoStageConfig, trained: tuple[str, ...]
) -> None:
    samples, found = read_samples(data / "data/train"), []
    for on in (False, True):
        model = tiny.vismem(base)
        with torch.no_grad():
            model.tokens.head.copy_(torch.randn(model.tokens.head.shape, generator=torch.Generator().manual_seed(0)))
        parameters = trainable(model, trained)
        model.policy_lora.enabled = "policy_lora." in trained
        grpo = GRPO.model_copy(update={"gradient_checkpointing": on})
        objective = kind(model, samples, grpo, stage, 0, Accelerator(cpu=True))
        objective.prompts_need_gradient = model.policy_lora.enabled
        batch = objective.collect(0)
        assert any(r.invocations for r in batch.rollouts)
        objective.backward(batch)
        found.append({name: p.grad for name, p in parameters.items() if p.grad is not None})
        assert "forward" not in vars(model.backbone.model.model.language_model.layers[0])
    assert found[0].keys() == found[1].keys()
    assert any(".lora." in name or "policy_lora." in name for name in found[0])
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-6, rtol=1e-4), name


def test_gradient_checkpointing_keeps_fewer_activations(tiny_base: Path) -> None:
    model, samples = tiny.vismem(tiny_base), tiny.samples()[:2]
    rollouts = generate(model, samples, Random(probability=0.5, anywhere=0.5), max_new_tokens=10, temperature=1.0)
    held = []
    for on in (False, True):
        numbers: list[int] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x, n=numbers: n.append(x.numel()) or x, lambda x: x)
        with model.checkpointed(on), hooks:
            score(model, prefill(model, samples), rollouts, torch.arange(2))
        held.append(sum(numbers))
    assert held[1] < held[0] / 2


# --- penalties (Eq. 14-15) -----------------------------------------------------------------------------------------


def paid(
    rewards: Sequence[float], swapped: Sequence[float], invoking: Sequence[bool], base: Path, penalty: float
) -> list[float]:
    """What one group's trajectories are paid after the penalties, in points of score."""
    with pytest.MonkeyPatch.context() as patch:
        objective, _ = objective_of("stage2", base, group_size=len(rewards), penalty=penalty)
        sample = objective.samples[0]
        rollouts = [plain_or_invoking(objective.model, sample.id, invokes) for invokes in invoking]
        patch.setattr(objective, "sample", lambda *_: rollouts)
        patch.setattr("vismem.training.stage2.rewards_of", lambda *_: torch.tensor([swapped]))
        result: list[float] = objective.shaped(torch.tensor([rewards]), [sample], rollouts, 0)[0].tolist()
        return result


def test_the_counterfactual_has_the_random_numbers_of_the_answers_that_it_judges(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, _ = objective_of("stage2", tiny_base, group_size=24, penalty=0.5)
    sample, drawn = objective.sample, []

    def recorded(*arguments: Any) -> list[Rollout]:
        drawn.append(sample(*arguments))
        return drawn[-1]

    monkeypatch.setattr(objective, "sample", recorded)
    objective.collect(3)
    answers, swapped = drawn
    before = [min((i.position for i in ours.invocations), default=len(ours.token_ids)) for ours in answers]
    assert sum(before) > 20, "or nothing is compared"
    for ours, theirs, end in zip(answers, swapped, before, strict=True):
        assert theirs.token_ids[:end] == ours.token_ids[:end]
        assert [i.kind.other for i in theirs.invocations][:1] == [i.kind for i in ours.invocations][:1]


def plain_or_invoking(model: VisMemModel, sample: str, invokes: bool) -> Rollout:
    kind = MemoryKind.SHORT
    start = (model.invoke_ids[kind], *[-1] * model.length_of(kind), model.end_ids[kind]) if invokes else ()
    ids = (*start, 5, 6)
    events = (Invoked(0, kind, False),) if invokes else ()
    return Rollout(sample, ids, (True,) * len(ids), (0.0,) * len(ids), events, "", "", True, 2)


def test_invoking_and_plain_trajectories_of_one_score_pay_the_same(tiny_base: Path) -> None:
    rewards, invoking = [1.0, 1.0, 0.0, 0.0], [True, False, True, False]
    after = paid(rewards, rewards, invoking, tiny_base, penalty=0.3)
    assert after == pytest.approx([1.0, 1.0, -0.15, -0.15]), "p_neg is how far a score is below its group's mean"


def test_the_wrong_kind_is_punished_only_where_its_swap_would_have_scored_higher(tiny_base: Path) -> None:
    """And only where there was a memory to swap, whatever the replay of a plain answer scored."""
    rewards = [0.5, 0.5, 0.5, 0.5]
    after = paid(rewards, [1.0, 0.5, 0.0, 1.0], [True, True, True, False], tiny_base, penalty=0.3)
    assert after == pytest.approx([0.5 - 0.3 * 0.5, 0.5, 0.5, 0.5])


def test_only_prompts_with_an_answer_that_is_not_right_are_decoded_in_reverse(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with its own rollouts, and to the same scores as with the others beside it."""
    objective, _ = objective_of("stage2", tiny_base, group_size=4, penalty=0.3)
    batch, sample, asked = objective.samples[:3], objective.sample, []
    rollouts = sample(batch, objective.policy(0), 0)
    assert all(any(r.invocations for r in rollouts[at : at + 4]) for at in (0, 4, 8))

    def recorded(prompts: Sequence[Sample], *rest: Any) -> list[Rollout]:
        asked.append([prompt.id for prompt in prompts])
        return sample(prompts, *rest)

    monkeypatch.setattr(objective, "sample", recorded)
    monkeypatch.setattr("vismem.training.stage2.rewards_of", lambda prompts, _: torch.ones(len(prompts), 4))
    rewards = torch.tensor([[1.0] * 4, [0.0] * 4, [1.0] * 4])
    paid = objective.shaped(rewards, batch, rollouts, 0)
    assert asked == [[batch[1].id]]
    assert torch.equal(paid[0], rewards[0])
    assert paid[1].tolist() == pytest.approx([-0.3 * bool(r.invocations) for r in rollouts[4:8]])


def test_penalties_never_pay_and_grow_with_their_intensity(tiny_base: Path) -> None:
    rewards, swapped, invoking = [1.0, 0.0, 0.5, 0.25], [0.0, 1.0, 0.5, 1.0], [True] * 4
    mild, harsh = (paid(rewards, swapped, invoking, tiny_base, penalty=alpha) for alpha in (0.1, 0.4))
    for reward, mildly, harshly in zip(rewards, mild, harsh, strict=True):
        assert harshly <= mildly <= reward
        assert reward - harshly == pytest.approx(4 * (reward - mildly), abs=1e-6)

"""Defects that published trainers of latent memory were found with, in behaviour: each test names one.

What the source alone shows is in `tests/unit/test_habits.py`; that one row's invocation moves no other row, in
`test_invariants.py`; settings that are read under a wrong key, in `test_settings.py`.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from project import PARITY, PROFILE, VALIDATION, scores
from safetensors.torch import load_file
from tiny_stages import GRPO, STAGE, STAGES, objective_of

from vismem.config import Config, Stage2Config
from vismem.errors import UserError
from vismem.files import write_json
from vismem.generation.replay import without_memory
from vismem.models.kinds import MemoryKind
from vismem.provenance import write_manifest
from vismem.steps import BY_NAME, run_step

pytestmark = pytest.mark.usefixtures("scores_differ")


# --- log-probabilities of text from which the invocations were stripped ----------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_log_probabilities_are_of_the_stream_with_its_memories_so_the_first_ratio_is_one(
    stage: str, tiny_base: Path
) -> None:
    settings = {"clip_low": 1e-3, "clip_high": 1e-3, "kl_coefficient": 0.0, "loss_type": "grpo"}
    objective, _ = objective_of(stage, tiny_base, **settings)
    batch = objective.collect(0)
    kinds = {invocation.kind for rollout in batch.rollouts for invocation in rollout.invocations}
    assert kinds == set(MemoryKind)
    metrics = objective.backward(batch)
    assert metrics["clip_fraction"] == 0
    assert metrics["update_kl"] == pytest.approx(0, abs=1e-7)
    assert metrics["loss"] == pytest.approx(0, abs=1e-4), "advantages of a group add up to zero, as do their means"
    likelier = [dataclasses.replace(r, logprobs=tuple(p + 2 for p in r.logprobs)) for r in batch.rollouts]
    metrics = objective.backward(dataclasses.replace(batch, rollouts=tuple(likelier)))
    assert metrics["update_kl"] == pytest.approx(np.exp(-2) + 2 - 1, rel=1e-4), "k3, of what sampled, to what is"
    bare = dataclasses.replace(batch, rollouts=tuple(without_memory(rollout) for rollout in batch.rollouts))
    assert objective.backward(bare)["clip_fraction"] > 0.25, "without the memories the ratio would be another"


def test_the_loss_counts_what_was_sampled_and_nothing_that_was_inserted(tiny_base: Path) -> None:
    for stage, invokes_are_sampled in (("stage1", False), ("stage2", True)):
        objective, _ = objective_of(stage, tiny_base)
        for rollout in objective.collect(0).rollouts:
            inserted = set()
            for invocation in rollout.invocations:
                length = objective.model.length_of(invocation.kind)
                inserted |= set(range(invocation.position + invokes_are_sampled, invocation.position + length + 2))
            assert {i for i, sampled in enumerate(rollout.loss_mask) if not sampled} == inserted


# --- micro-batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_small_micro_batches_equal_one_of_all(stage: str, tiny_base: Path) -> None:
    """Of single rollouts, three and then one of each prompt's four, and three prompts and then the fourth."""
    gradients = []
    for micro in (1, 3, 12, 16):
        objective, trained = objective_of(stage, tiny_base, batch_size=4, group_size=4, micro_batch=micro)
        batch = objective.collect(0)
        assert len({tuple(i.position for i in r.invocations) for r in batch.rollouts}) > 4
        objective.backward(batch)
        gradients.append(torch.cat([p.grad.flatten() for p in trained.values() if p.grad is not None]))
    assert float(gradients[0].norm()) > 0
    for gradient in gradients[:-1]:
        torch.testing.assert_close(gradient, gradients[-1], atol=1e-5, rtol=1e-3)


# --- failures that are swallowed -------------------------------------------------------------------------------------


def test_an_answer_that_cannot_be_scored_ends_the_step_instead_of_counting_as_wrong(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(sample: object, text: str) -> float:
        raise ZeroDivisionError

    monkeypatch.setattr("vismem.training.rewards.score", fault)
    with pytest.raises(ZeroDivisionError):
        objective_of("stage1", tiny_base)[0].collect(0)


# --- stages and promotion that take what lies nearest ----------------------------------------------------------------


def test_stage2_takes_the_stage1_of_its_name_and_not_the_newest_files(tiny_base: Path, tmp_path: Path) -> None:
    config = Config(memory=tiny.MEMORY, grpo=GRPO, stage2=Stage2Config(**{**STAGE, "steps": 1}))
    artifacts = tmp_path / "artifacts"
    tiny.save_data(artifacts / "validate", count=3)
    (artifacts / "base").symlink_to(tiny_base)
    named, newer = tiny.vismem(tiny_base, seed=1), tiny.vismem(tiny_base, seed=2)
    named.save_pretrained(artifacts / "stage1")
    for place in ("stage1.partial", "stage1.old", "stage1_b", "zz", "stage1/backup"):
        newer.save_pretrained(artifacts / place)
        for file in (artifacts / place).rglob("*"):
            os.utime(file, (4e9, 4e9))
    run_step("stage2", config, artifacts)
    weights = load_file(artifacts / "stage2" / "memory.safetensors")
    assert weights
    assert all(torch.equal(weight, named.state_dict()[name]) for name, weight in weights.items())


@pytest.mark.parametrize("missing", ["export", "evaluate", "validate"])
def test_nothing_is_judged_before_all_that_it_is_judged_by(missing: str, tmp_path: Path) -> None:
    for name in BY_NAME["register"].inputs:
        if name != missing:
            (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"run `vismem {missing}`"):
        run_step("register", Config(), tmp_path)
    assert BY_NAME["promote"].inputs == ("register",), "what is promoted was judged"
    with pytest.raises(UserError, match="run `vismem register`"):
        run_step("promote", Config(), tmp_path)


def test_a_bundle_is_not_judged_by_the_scores_of_the_model_before_it(tmp_path: Path) -> None:
    """Stage II trained and exported anew, and not evaluated anew."""
    inputs = {name: tmp_path / name for name in BY_NAME["register"].inputs}
    scores(stage2_sha256="before").write(inputs["evaluate"])
    VALIDATION.write(inputs["validate"])
    PROFILE.write(inputs["validate"])
    PARITY.write(inputs["export"])
    write_json(inputs["export"] / "lineage.json", {"inputs_sha256": {"stage2": "after"}})
    write_manifest(inputs["export"])
    with pytest.raises(UserError, match="scores of another model"):
        BY_NAME["register"].load()(Config(), inputs, tmp_path)

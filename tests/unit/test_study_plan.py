"""The study's jobs: what is trained on what, from where, and what needs what."""

from pathlib import Path

import pytest
import yaml

from recipes.study.__main__ import main
from recipes.study.claims import EQUAL_SECONDS, TRANSFER, of_arms
from recipes.study.plan import Settings, plan, stage_tasks, trained_half
from vismem.config import Config, EasyVqaSource, ScenesSource, parse_config
from vismem.data.tasks import NEEDS

PLAN = parse_config({"seed": 5, "prepare": {"sources": [{"kind": "scenes"}, {"kind": "easy_vqa"}]}})
TOY = Settings(
    seeds=2,
    transfer_seeds=1,
    stage_seeds=0,
    long_seeds=0,
    arms=("vanilla", "vismem", "sft_lora"),
    transfer_arms=("vanilla", "vismem"),
)


def test_the_plan_has_every_step_of_every_seed_and_transfer_shares_the_base(tmp_path: Path) -> None:
    jobs = {job.name: job for job in plan(PLAN, TOY, tmp_path)}
    steps = ("prepare", "validate", "base", "stage1", "stage2", "sft_lora", "evaluate")
    wanted = {f"seed-{seed}/{step}" for seed in (5, 6) for step in steps}
    wanted |= {f"transfer-5/{step}" for step in steps if step != "sft_lora"}
    assert set(jobs) == wanted
    assert jobs["seed-6/evaluate"].needs == tuple(f"seed-6/{n}" for n in ("base", "stage2", "validate", "sft_lora"))
    assert {name for name, job in jobs.items() if job.timed} == {name for name in jobs if name.endswith("/evaluate")}
    longer = {job.name for job in plan(PLAN, TOY.model_copy(update={"long_seeds": 1}), tmp_path)}
    assert longer - wanted == {"seed-5/sft_lora_long", "seed-5/grpo_lora_long"}


def test_every_repetition_has_its_parameters_written_out(tmp_path: Path) -> None:
    plan(PLAN, TOY, tmp_path)
    six, moved = (read_params(tmp_path / name) for name in ("seed-6", "transfer-5"))
    assert (six.seed, six.evaluate.arms) == (6, ("vanilla", "vismem", "sft_lora"))
    assert six.prepare == PLAN.prepare
    (source,) = moved.prepare.sources
    assert isinstance(source, ScenesSource)
    assert (source.train_tasks, source.tasks) == (trained_half(ScenesSource()), ScenesSource().tasks)
    assert moved.evaluate.arms == ("vanilla", "vismem")
    assert six.base == moved.base == PLAN.base


@pytest.mark.parametrize("source", [ScenesSource(), ScenesSource(tasks=())])
def test_both_halves_of_the_tasks_have_all_needs(source: ScenesSource) -> None:
    half = set(trained_half(source))
    for need in set(NEEDS.values()):
        inside = [task in half for task in source.tasks or NEEDS if NEEDS[task] == need]
        assert inside.count(False) > 0
        assert inside.count(True) - inside.count(False) in (0, 1)
    assert trained_half(ScenesSource(tasks=("count", "texture", "alone"))) == ("count", "alone", "texture")
    assert trained_half(EasyVqaSource()) == ()


def test_stages_follow_each_other_on_other_tasks_and_are_asked_about_the_first_ones(tmp_path: Path) -> None:
    settings = TOY.model_copy(
        update={"seeds": 1, "transfer_seeds": 0, "stage_seeds": 1, "stage_arms": ("vanilla", "vismem", "sft_lora")}
    )
    steps = {"stage1": {"warm_start": {"steps": 100}}, "stage2": {"steps": 10}}
    config = parse_config({"seed": 5, "prepare": {"sources": [{"kind": "scenes"}]}, **steps})
    jobs = {job.name: job for job in plan(config, settings, tmp_path)}
    groups = stage_tasks(ScenesSource())
    assert sorted(task for group in groups for task in group) == sorted(ScenesSource().tasks)
    for stage, group in enumerate(groups, 1):
        assert {NEEDS[task] for task in group} == set(NEEDS.values())
        params = read_params(tmp_path / f"stages-5-{stage}")
        (source,) = params.prepare.sources
        assert (params.stage1.warm_start.steps, params.stage2.steps) == (25, 3), "a quarter of 100, and of 10"
        assert isinstance(source, ScenesSource)
        assert (source.tasks, source.train_tasks) == (groups[0], group)
        for step, start in (("stage1", "stage2"), ("sft_lora", "sft_lora")):
            job, earlier = jobs[f"stages-5-{stage}/{step}"], f"stages-5-{stage - 1}/{start}"
            section = "stage1" if step == "stage1" else "baselines"
            assert (earlier in job.needs) == (stage > 1)
            assert (f"{section}.start_from={tmp_path / earlier}" in job.command) == (stage > 1)
        assert "--set" not in jobs[f"stages-5-{stage}/stage2"].command


def test_claims_compare_what_the_plan_says() -> None:
    vismem = {
        "M1": "short_only long_only", "M7": "vanilla", "M8": "no_memory", "M9": "shuffled noise swapped",
        "M10": "static_prefix continuous", "F1": "sft_lora", "F2": "sft_lora_matched", "F3": "sft_lora_vision",
        "F4": "grpo_lora grpo_lora_vision",
    }  # fmt: skip
    wanted = {(id_, "vismem", arm, None) for id_, arms in vismem.items() for arm in arms.split()}
    wanted |= {
        ("G1", "relook", "vanilla", "detail"),
        ("M2", "short_only", "random_25", None),
        ("M2", "long_only", "random_25", None),
        ("M3", "random_25", "vanilla", None),
        ("M5", "forced_short", "forced_long", "detail"),
        ("M6", "forced_long", "forced_short", "compute"),
    }
    claims = of_arms("random_25")
    assert {(claim.id, claim.above, claim.below, claim.need) for claim in claims} == wanted
    assert len(claims) == len(wanted)
    assert {claim.id: claim.margin for claim in claims if claim.margin} == {"G1": 15.0, "M7": 15.0}
    assert [(claim.id, claim.above, claim.below) for claim in (*EQUAL_SECONDS, *TRANSFER)] == [
        ("F5", "vismem", "sft_lora_long"), ("F5", "vismem", "grpo_lora_long"),
        ("T1", "vismem", "vanilla"), ("T2", "vismem", "sft_lora"),
    ]  # fmt: skip


def test_an_unknown_arm_is_named_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--arms", "vanilla", "vismen", "--out", str(tmp_path / "study")]) == 1
    assert "unknown arm 'vismen' (did you mean 'vismem'?)" in capsys.readouterr().err
    assert main(["--stage-arms", "vanilla", "vismen", "--out", str(tmp_path / "study")]) == 1
    assert "unknown arm 'vismen'" in capsys.readouterr().err
    assert main(["--stage-arms", "vanilla", "sft_lora", "--out", str(tmp_path / "study")]) == 1
    assert "--stage-arms: 'vismem' is missing" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def read_params(folder: Path) -> Config:
    return parse_config(yaml.safe_load((folder / "params.yaml").read_text()))

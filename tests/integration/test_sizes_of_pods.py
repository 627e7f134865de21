"""What a profile needs is held to what there is: by preflight in its pod, by `configure`, and by a training step."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from vismem.config import Config, load_config, resolve
from vismem.errors import UserError
from vismem.kubeflow.parameters import configure
from vismem.launch import LaunchConfig, launch_step
from vismem.plan import host_memory, plan
from vismem.plan.machine import CARDS, Machine, memory_limit
from vismem.preflight import check_sizes, checks

ROOT = Path(__file__).parents[2]
LARGE = "qwen2_5_vl_7b"
IMAGE = "84x84"  # smaller than a real plan's: quicker


@pytest.fixture
def config(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The toy profile with GPUs asked for, and a machine that seems to have two H100 and much memory."""
    card = SimpleNamespace(total_memory=CARDS["H100"][0], name="H100")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: card.name)
    monkeypatch.setattr("vismem.plan.machine.CGROUP_LIMITS", ())
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=10**12))
    monkeypatch.setattr("vismem.preflight.IMAGE", IMAGE)
    small = {"base.model": str(tiny_base), "preflight.gpus": 2, "grpo.max_new_tokens": 4, "evaluate.max_new_tokens": 4}
    return load_config(ROOT / "params.yaml", "smoke", {**small, "evaluate.arms": ["vanilla", "vismem"]})


def test_sizes_are_those_of_the_plan_for_this_machine(config: Config) -> None:
    found, planned = check_sizes(config), plan(config, "2xH100", IMAGE)
    assert found.ok, found
    for step in planned.steps:
        assert f"{step.name} {step.bytes / 2**30:.1f}" in found.seen
    assert f"{max(planned.host.values()) / 1e9:.0f} GB of 1000 of memory" in found.seen
    assert Machine.here(2).usable == planned.machine.usable


def test_a_gpu_that_is_too_small_is_refused_with_what_to_change(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = max(step.bytes for step in plan(config, "2xH100", IMAGE).steps)
    monkeypatch.setattr(Machine, "usable", 0.7 * largest)
    found = check_sizes(config)
    assert not found.ok
    assert "does not fit: " in found.remedy


def test_a_pod_s_own_limit_counts_and_not_the_memory_of_its_node(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("vismem.plan.machine.CGROUP_LIMITS", (limit, tmp_path / "not-there"))
    needed = max(host_memory(config, 2).values())
    for text, ok in (("max\n", True), (f"{needed:.0f}\n", True), (f"{needed - 1e6:.0f}\n", False)):
        limit.write_text(text)
        found = check_sizes(config)
        assert found.ok == ok
        assert ("training_memory" in found.remedy) != ok
    assert memory_limit() == int(limit.read_text())


def test_sizes_are_looked_at_where_gpus_are_asked_for_and_there(config: Config) -> None:
    assert [check_sizes in [check.func for check in checks(each, ROOT)] for each in (resolve(), config)] == [
        False,
        True,
    ]
    more = config.model_copy(update={"preflight": config.preflight.model_copy(update={"gpus": 3})})
    assert (check_sizes(more).ok, check_sizes(more).seen) == (False, "not computed")


# --- no training on the CPU by mistake ---


def test_a_cluster_s_run_with_less_gpus_than_its_profile_asks_for_ends_at_its_first_task(tmp_path: Path) -> None:
    def configured(gpus: int, image: str = "train:1", launches: bool = False, **overrides: Any) -> int:
        given = {"prepare.sources": [{"kind": "scenes"}], **overrides}
        tasks = configure(LARGE, given, str(tmp_path / "params.yaml"), image, gpus, launches)
        found: int = tasks[0]["preflight"]["gpus"]
        return found

    with pytest.raises(UserError, match=r"ask for 1 GPUs.* gpu_count is 0"):
        configured(0)
    assert configured(8) == 8
    assert configured(0, launches=True) == 0, "its nodes have the GPUs"
    assert configured(0, **{"preflight.gpus": 0}) == 0  # type: ignore[arg-type]
    assert configured(0, image="") == 1, "of this machine"


@pytest.mark.parametrize(
    ("settings", "given"), [({"preflight.gpus": 1}, ""), ({}, "GPU-8a1c"), ({}, "MIG-8a1c")], ids=str
)
def test_a_step_that_was_to_have_a_gpu_does_not_train_without(
    settings: dict[str, Any], given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a pod the device plugin says which it gave; parameters of a task do not hold `preflight`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("NVIDIA_VISIBLE_DEVICES", given)
    for launch in (LaunchConfig(), LaunchConfig("torchrun", 2)):
        with pytest.raises(UserError, match="stage1 would run on the CPU"):
            launch_step("stage1", resolve("smoke", settings), tmp_path, launch=launch)
    assert list(tmp_path.iterdir()) == []
    for harmless in ("", "all", "void"):  # images of NVIDIA's say `all`, whatever there is
        monkeypatch.setenv("NVIDIA_VISIBLE_DEVICES", harmless)
        with pytest.raises(UserError, match="run `vismem"):
            launch_step("stage1", resolve("smoke"), tmp_path)


def test_no_two_profiles_release_under_one_name() -> None:
    """Or a nightly toy run displaces the champion of the real one, in the registry that a cluster shares."""
    files = sorted((ROOT / "deploy" / "profiles").glob("*.yaml"))
    names = [resolve(path.stem).registry.model_name for path in files] + [resolve().registry.model_name]
    assert len(set(names)) == len(files) + 1
    for path in files:
        assert "registry" in yaml.safe_load(path.read_text())

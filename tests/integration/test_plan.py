"""What `vismem plan` counts on shapes is what the same steps hold when they run."""

from pathlib import Path
from typing import Any

import published
import pytest
import tiny
import tiny_families
import torch

from vismem.config import Config, parse_config
from vismem.generation.invocation import Learned
from vismem.generation.loop import DecodeLoop, Request
from vismem.generation.torch_executor import TorchExecutor
from vismem.models.backbones.base import Backbone
from vismem.models.vismem import VisMemModel, load_base
from vismem.plan.machine import Machine
from vismem.plan.model import hollow_base, parameters, questions
from vismem.plan.rehearsal import ADDED, BASE, GRADIENTS, LABELS, STATES, Rehearsal, StepPlan
from vismem.plan.shapes import Shapes
from vismem.plan.steps import rehearse

MACHINE, IMAGE = Machine.named("1x80"), (84, 84)
SMALL = {"batch": 1, "words": 12, "limit": 2}
LARGE = {"batch": 2, "words": 40, "limit": 3}


@pytest.fixture(scope="module", params=tiny_families.VARIANTS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_families.save_base(tmp_path_factory.mktemp(request.param), request.param)


def config_of(base: Path, size: dict[str, int], **grpo: Any) -> Config:
    group = {"group_size": 2, "steps": 1}
    return parse_config(
        {
            "base": {"model": str(base)},
            "memory": tiny.MEMORY.model_dump(),
            "invocation": {"max_per_answer": size["limit"]},
            "grpo": {"batch_size": size["batch"], "max_new_tokens": size["words"], "micro_batch": 4, **grpo},
            "stage1": {**group, "warm_start": {"steps": 1, "batch_size": 2}},
            "stage2": group,
            "baselines": {"supervised": {"batch_size": 2}, "grpo": group},
            "evaluate": {"batch_size": 3, "max_new_tokens": size["words"]},
        }
    )


class Measured(Rehearsal):
    """The same phases on real tensors of a loaded model."""

    def __init__(self, name: str, config: Config, only: str | None = None) -> None:
        super().__init__(name, config, MACHINE, IMAGE, only)
        self.shapes = Shapes(LABELS, hollow=False)

    def base(self) -> Backbone:
        backbone = load_base(self.config.base.model, self.config.base.dtype)
        for tensor in (*backbone.model.parameters(), *backbone.model.buffers()):
            self.shapes.count(tensor)
        return backbone


def planned_and_measured(name: str, config: Config) -> tuple[StepPlan, StepPlan]:
    return rehearse(Rehearsal(name, config, MACHINE, IMAGE)), rehearse(Measured(name, config))


def test_parameters_and_bytes_are_those_of_the_loaded_model(base: Path) -> None:
    config = config_of(base, SMALL)
    with Shapes(LABELS) as shapes, shapes.part(BASE):
        hollow = hollow_base(config.base)
    with Shapes(LABELS):
        planned, added = parameters(VisMemModel(hollow, config.memory, config.invocation))
    model = VisMemModel(load_base(base), config.memory, config.invocation)
    loaded = model.backbone.model
    assert sum(planned.values()) == loaded.num_parameters()
    assert all(planned.values())
    assert sum(added.values()) == sum(weight.numel() for weight in model.parameters())
    tensors = *loaded.parameters(), *loaded.buffers()
    assert shapes.live[BASE] == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("name", published.PARAMETERS)
def test_a_published_configuration_has_the_published_number_of_parameters(name: str, tmp_path: Path) -> None:
    config = config_of(published.save_published(tmp_path, name), SMALL)
    with Shapes({}):
        planned, _ = parameters(VisMemModel(hollow_base(config.base), config.memory, config.invocation))
    assert sum(planned.values()) == published.PARAMETERS[name]


@pytest.mark.parametrize("rows", [1, 5])
@torch.inference_mode()
def test_the_cache_is_what_a_decode_state_allocates(base: Path, rows: int) -> None:
    config = config_of(base, LARGE)
    request = Request(questions(2, IMAGE), Learned(), 30, temperature=1.0, group_size=rows)
    with Shapes(LABELS) as shapes:
        loop = DecodeLoop(TorchExecutor(VisMemModel(hollow_base(config.base), config.memory, config.invocation)))
        loop.join(request)
        planned = shapes.live["KV cache"]
    executor = TorchExecutor(VisMemModel(load_base(base), config.memory, config.invocation))
    DecodeLoop(executor).join(request)
    cache = executor.state.cache
    assert planned == sum(tensor.nbytes for tensor in (*cache.keys, *cache.values)) > 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("step", ["stage1", "stage2"])
def test_a_stage_holds_what_is_planned(base: Path, step: str, size: dict[str, int], checkpointing: bool) -> None:
    plan, real = planned_and_measured(step, config_of(base, size, gradient_checkpointing=checkpointing))
    assert [phase.name for phase in plan.phases] == [phase.name for phase in real.phases]
    for planned, measured in zip(plan.phases, real.phases, strict=True):
        for part in (BASE, GRADIENTS, STATES):
            assert planned.parts.get(part) == measured.parts.get(part), part
        assert planned.bytes == pytest.approx(measured.bytes, rel=0.01), planned.name


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("step", ["stage1", "stage2"])
def test_activations_are_what_autograd_saves_in_a_real_step(base: Path, step: str, size: dict[str, int]) -> None:
    """The peak lies above what is saved, by what is alive beside it for a moment."""
    config, saved = config_of(base, size), dict[int, Any]()
    real = Measured(step, config, "backward")

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()  # kept, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rehearse(real)
    (plan,) = (p for p in rehearse(Rehearsal(step, config, MACHINE, IMAGE, "backward")).phases if p.name == "backward")
    fixed = sum(plan.parts.get(part, 0) for part in (BASE, ADDED, GRADIENTS, STATES))
    held = sum(storage.nbytes() for storage in saved.values())
    print(held, plan.bytes - fixed, (plan.bytes-fixed)/held)

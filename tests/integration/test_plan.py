"""What `vismem plan` counts on shapes is what the same steps hold when they run."""

import json
from pathlib import Path
from typing import Any

import published
import pytest
import tiny
import tiny_families
import torch

from vismem.cli import main
from vismem.config import Config, load_config, parse_config
from vismem.generation.invocation import Learned
from vismem.generation.loop import DecodeLoop, Request
from vismem.generation.torch_executor import TorchExecutor
from vismem.models.backbones.base import Backbone
from vismem.models.vismem import VisMemModel, load_base
from vismem.plan.machine import Machine
from vismem.plan.model import hollow_base, parameters, questions
from vismem.plan.rehearsal import BASE, GRADIENTS, LABELS, STATES, Rehearsal, StepPlan
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


def saved_bytes(stage: Rehearsal) -> int:
    """What autograd keeps for the backward passes of a stage, weights included."""
    saved: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()  # kept, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rehearse(stage)
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("step", ["stage1", "stage2"])
def test_activations_are_what_autograd_saves_in_a_real_step(base: Path, step: str, size: dict[str, int]) -> None:
    """The planned peak holds them, and little beside them."""
    config = config_of(base, size)
    held = saved_bytes(Measured(step, config, "backward"))
    stage = Rehearsal(step, config, MACHINE, IMAGE, "backward")
    assert saved_bytes(stage) == pytest.approx(held, rel=0.01)
    peak = next(phase for phase in rehearse(Rehearsal(step, config, MACHINE, IMAGE)).phases if phase.name == "backward")
    assert held < peak.bytes - peak.parts.get(GRADIENTS, 0) - peak.parts.get(STATES, 0) < 1.5 * held


@pytest.mark.parametrize("name", ["full", "sft_lora_vision", "grpo_lora", "continuous", "evaluate"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_baselines_and_evaluation_hold_what_is_planned(tiny_base: Path, name: str, dtype: str) -> None:
    config = config_of(tiny_base, LARGE, gradient_checkpointing=True)
    config = config.model_copy(update={"base": config.base.model_copy(update={"dtype": dtype})})
    plan, real = planned_and_measured(name, config)
    assert plan.trained == real.trained
    for planned, measured in zip(plan.phases, real.phases, strict=True):
        assert planned.bytes == pytest.approx(measured.bytes, rel=0.02), planned.name


def test_what_is_replaced_for_a_plan_is_put_back(tiny_base: Path) -> None:
    config, query = config_of(tiny_base, SMALL), torch.randn(1, 1, 2, 8)
    whole = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    tensor, tolist = torch.tensor, torch.Tensor.tolist
    rehearse(Rehearsal("evaluate", config, MACHINE, IMAGE))
    assert (torch.tensor, torch.Tensor.tolist) == (tensor, tolist)
    assert torch.equal(torch.nn.functional.scaled_dot_product_attention(query, query, query), whole)
    assert torch.nn.functional.scaled_dot_product_attention(*[query.to("meta")] * 3).is_meta


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["plan", "--params", "params.yaml", *arguments])
    return status, *capsys.readouterr()


def test_a_plan_that_fits_is_a_table_of_eighty_columns(tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smoke = ("--profile", "smoke", "--set", f"base.model={tiny_base}", "--image", "84x84")
    status, out, err = run(capsys, *smoke, "--gpus", "1x80")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    for step in ("stage1", "stage2", "evaluate"):
        assert f"\n{step}, per GPU" in out
    status, out, _ = run(capsys, *smoke, "--gpus", "2x80", "--json", "full")
    found = json.loads(out)
    assert (status, found["fits"]) == (0, True)
    assert [step["name"] for step in found["steps"]] == ["full"]
    assert sum(found["parameters"].values()) == load_base(tiny_base).model.num_parameters()


def test_a_plan_that_cannot_fit_is_refused_with_what_fits(
    tiny_base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU between what two sizes need, the value that is named fits and the next does not."""
    settings = {"base.model": str(tiny_base), "grpo.max_new_tokens": 60, "grpo.micro_batch": 8, "grpo.batch_size": 2}

    def bytes_with(micro_batch: int) -> int:
        config = load_config(
            Path("params.yaml"), "smoke", settings | {k.replace("__", "."): v for k, v in changed.items()}
        )
        return rehearse(Rehearsal("stage1", config, MACHINE, IMAGE, "backward")).phases[-1].bytes

    limit = (bytes_with(grpo__micro_batch=5) + bytes_with(grpo__micro_batch=6)) / 2
    monkeypatch.setattr(Machine, "usable", limit)
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    status, _, err = run(capsys, "--profile", "smoke", *given, "--gpus", "1x80", "--image", "84x84", "stage1")
    assert status == 1
    print(err)


def test_wrong_requests_are_said_so(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ("--set", f"base.model={tiny_base}")
    for arguments, said in (
        ((*base, "--gpus", "80"), "COUNTxGB"),
        ((*base, "--gpus", "1x81"), "40, 80, 141"),
        ((*base, "--gpus", "3x80"), "grpo.batch_size 8 must be a multiple of the 3 GPUs"),
        ((*base, "--gpus", "1x80", "--image", "84"), "WIDTHxHEIGHT"),
        ((*base, "--gpus", "1x80", "deploy"), "no plan of 'deploy'"),
        (("--set", f"base.model={tmp_path}", "--gpus", "1x80"), "config.json"),
    ):
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (1, "")
        assert said in err
        assert err.count("\n") == 1

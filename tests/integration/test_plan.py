"""What `vismem plan` counts on shapes is what the same steps hold when they run."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import published
import pytest
import tiny
import tiny_families
import torch
from torch.profiler import ProfilerActivity, profile

from vismem.cli import main
from vismem.config import Config, load_config, parse_config
from vismem.files import read_json, write_json
from vismem.generation.invocation import Learned
from vismem.generation.loop import DecodeLoop, Request
from vismem.generation.torch_executor import TorchExecutor
from vismem.models.backbones.base import Backbone
from vismem.models.loading import load_base
from vismem.models.vismem import VisMemModel
from vismem.plan.machine import CARDS, CONTEXT, Machine
from vismem.plan.model import Questions, hollow_base, parameters, questions
from vismem.plan.rehearsal import BASE, GRADIENTS, STATES, Rehearsal, StepPlan
from vismem.plan.shapes import LABELS, Shapes, beside_dispatch

MACHINE, ASKED = Machine.named("1xH100"), Questions((84, 84))
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
            "invocation": {"max_per_answer": size["limit"], "anywhere": True},
            "grpo": {"batch_size": size["batch"], "max_new_tokens": size["words"], "micro_batch": 4, **grpo},
            "stage1": {**group, "warm_start": {"steps": 1, "batch_size": 2}},
            "stage2": group,
            "baselines": {"supervised": {"batch_size": 2}, "grpo": group},
            "evaluate": {"batch_size": 3, "max_new_tokens": size["words"]},
        }
    )


class Measured(Rehearsal):
    """The same phases on real tensors of a loaded model."""

    def __init__(self, name: str, config: Config, asked: Questions = ASKED) -> None:
        super().__init__(name, config, MACHINE, asked)
        self.shapes = Shapes(hollow=False)

    def _base(self, *_: object) -> Backbone:
        with self.shapes.part(BASE):
            backbone = load_base(self.config.base.model, self.config.base.dtype)
            for tensor in (*backbone.model.parameters(), *backbone.model.buffers()):
                self.shapes.count(tensor)
        return backbone


def planned_and_measured(name: str, config: Config, asked: Questions = ASKED) -> tuple[StepPlan, StepPlan]:
    return Rehearsal(name, config, MACHINE, asked).rehearse(), Measured(name, config, asked).rehearse()


def sums(plan: StepPlan) -> dict[str, int]:
    return {name: sum(parts.values()) for name, parts in plan.phases.items()}


def test_parameters_and_bytes_are_those_of_the_loaded_model(base: Path) -> None:
    config = config_of(base, SMALL)
    with beside_dispatch(), Shapes() as shapes, shapes.part(BASE):
        hollow = hollow_base(config.base)
    with beside_dispatch(), Shapes():
        planned = VisMemModel(hollow, config.memory, config.invocation)
    model = VisMemModel(load_base(base), config.memory, config.invocation)
    loaded = model.backbone.model
    assert sum(parameters(hollow.model).values()) == loaded.num_parameters()
    assert parameters(planned) == parameters(model)
    tensors = *loaded.parameters(), *loaded.buffers()
    assert shapes.live[BASE] == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("name", published.PARAMETERS)
def test_a_published_configuration_has_the_published_number_of_parameters(name: str, tmp_path: Path) -> None:
    config = config_of(published.save_published(tmp_path, name), SMALL)
    with beside_dispatch(), Shapes():
        assert sum(parameters(hollow_base(config.base).model).values()) == published.PARAMETERS[name]


@pytest.mark.parametrize("name", published.PARAMETERS)
def test_where_only_the_text_s_settings_say_so_a_head_is_tied_or_not(name: str, tmp_path: Path) -> None:
    """So transformers 4 wrote them. The head of InternVL would be tied by default, 0.6 billion parameters fewer."""
    config = config_of(published.save_published(tmp_path, name), SMALL)
    written = read_json(tmp_path / "config.json")
    assert written["text_config"]["tie_word_embeddings"] == written.pop("tie_word_embeddings")
    write_json(tmp_path / "config.json", written)
    with beside_dispatch(), Shapes():
        assert sum(parameters(hollow_base(config.base).model).values()) == published.PARAMETERS[name]


@pytest.mark.parametrize("rows", [1, 5])
@torch.inference_mode()
def test_the_cache_is_what_a_decode_state_allocates(base: Path, rows: int) -> None:
    config = config_of(base, LARGE)
    request = Request(questions(2, ASKED), Learned(), 30, temperature=1.0, group_size=rows)
    with beside_dispatch(), Shapes() as shapes:
        loop = DecodeLoop(TorchExecutor(VisMemModel(hollow_base(config.base), config.memory, config.invocation)))
        loop.join(request)
        planned = shapes.live["KV cache"]
    executor = TorchExecutor(VisMemModel(load_base(base), config.memory, config.invocation))
    DecodeLoop(executor).join(request)
    cache = executor.state.cache
    assert planned == sum(tensor.nbytes for tensor in (*cache.keys, *cache.values)) > 0


@pytest.mark.parametrize(("size", "checkpointing"), [(SMALL, True), (LARGE, False)], ids=["small", "large"])
@pytest.mark.parametrize("step", ["stage1", "stage2"])
def test_a_stage_holds_what_is_planned(base: Path, step: str, size: dict[str, int], checkpointing: bool) -> None:
    plan, real = planned_and_measured(step, config_of(base, size, gradient_checkpointing=checkpointing))
    assert plan.phases.keys() == real.phases.keys()
    for name, planned in plan.phases.items():
        for part in (BASE, GRADIENTS, STATES):
            assert planned.get(part) == real.phases[name].get(part), part
    assert sums(plan) == pytest.approx(sums(real), rel=0.01)


class Profiled(Measured):
    """Beside it, torch's profiler says what the CPU's allocator gave out at the peak of the backward pass."""

    peak = 0

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        held = self.shapes.total
        with super()._phase(name), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield
        if name == "backward":
            events = (each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]")
            sizes = (each.nbytes() for each in sorted(events, key=lambda each: each.start_ns()))
            self.peak = max(accumulate(sizes, initial=held))


@pytest.mark.parametrize("step", ["stage1", "grpo_lora"])
def test_the_peak_is_what_the_allocator_gives_out(base: Path, step: str) -> None:
    """The profiler now and then loses an event: a run that differs is measured again."""
    config, peaks = config_of(base, LARGE), list[int]()
    planned = pytest.approx(sums(Rehearsal(step, config, MACHINE, ASKED).rehearse())["backward"], rel=0.05)
    while planned not in peaks and len(peaks) < 4:
        profiled = Profiled(step, config)
        profiled.rehearse()
        peaks.append(profiled.peak)
    assert planned in peaks


class Whole(Measured):
    """A whole step of training: real rollouts of random answers, and all of their micro-batches."""

    def _train(self, objective: Any, trained: Any, settings: Any, batch_size: int) -> int:
        objective.samples, objective.out = questions(batch_size, ASKED), None
        with self._optimised(trained, settings.matrix_learning_rate), self._phase(settings.name):
            objective.backward(objective.collect(0))
        return 0


def test_a_whole_training_step_holds_what_is_planned_and_no_more(tiny_base: Path) -> None:
    """With a memory at each answer's start and no other, random answers have as many as the plan counts."""
    config = config_of(tiny_base, LARGE | {"limit": 1}, batch_size=4)
    config = config.model_copy(update={"stage1": config.stage1.model_copy(update={"invoke_probability": 1.0})})
    planned = sums(Rehearsal("stage1", config, MACHINE, ASKED).rehearse())
    largest = max(planned["rollouts"], planned["backward"])
    torch.manual_seed(0)  # how long answers are depends on the weights
    assert 0.9 * largest < sums(Whole("stage1", config).rehearse())["stage1"] <= largest


@pytest.mark.parametrize("name", ["full", "sft_lora_vision", "grpo_lora", "continuous", "evaluate"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_baselines_and_evaluation_hold_what_is_planned(tiny_base: Path, name: str, dtype: str) -> None:
    config = config_of(tiny_base, LARGE, gradient_checkpointing=True)
    config = config.model_copy(update={"base": config.base.model_copy(update={"dtype": dtype})})
    plan, real = planned_and_measured(name, config)
    assert plan.trained == real.trained
    assert sums(plan) == pytest.approx(sums(real), rel=0.02)


@pytest.mark.parametrize(("words", "limit"), [(1, 3), (4, 1)])
def test_an_answer_with_room_for_one_memory_holds_what_is_planned(tiny_base: Path, words: int, limit: int) -> None:
    plan, real = planned_and_measured("evaluate", config_of(tiny_base, {"batch": 1, "words": words, "limit": limit}))
    assert sums(plan) == pytest.approx(sums(real), rel=0.02)


def test_what_is_replaced_for_a_plan_is_put_back(tiny_base: Path) -> None:
    config, query = config_of(tiny_base, SMALL), torch.randn(1, 1, 2, 8)
    whole = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    tensor, tolist = torch.tensor, torch.Tensor.tolist
    Rehearsal("evaluate", config, MACHINE, ASKED).rehearse()
    assert (torch.tensor, torch.Tensor.tolist) == (tensor, tolist)
    assert torch.equal(torch.nn.functional.scaled_dot_product_attention(query, query, query), whole)
    assert torch.nn.functional.scaled_dot_product_attention(*[query.to("meta")] * 3).is_meta


def test_every_label_is_of_a_function_that_allocates(tiny_base: Path) -> None:
    config = config_of(tiny_base, LARGE, gradient_checkpointing=True)
    plans = [Rehearsal(name, config, MACHINE, ASKED).rehearse() for name in ("stage1", "stage2", "evaluate")]
    assert {part for plan in plans for parts in plan.phases.values() for part in parts} >= set(LABELS.values())


def run(capsys: pytest.CaptureFixture[str], base: Path, *arguments: str) -> tuple[int, str, str]:
    given = ("--params", "params.yaml", "--profile", "smoke", "--set", f"base.model={base}", "--image", "84x84")
    status = main(["plan", *given, *arguments])
    return status, *capsys.readouterr()


def test_a_plan_that_fits_is_a_table_of_eighty_columns(tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, tiny_base, "--gpus", "2xH100")
    assert status == 0
    assert "does not fit" not in err
    assert max(map(len, out.splitlines()[1:])) <= 80, "the first one names the base, however long that is"
    for step in ("stage1", "stage2", "evaluate"):
        assert f"\n{step}, per GPU" in out
    assert f"{load_base(tiny_base).model.num_parameters() / 1e6:.2f}\n\nadded by VisMem" in out


@pytest.mark.parametrize("step", ["stage1", "evaluate"])
def test_a_step_that_does_not_fit_is_refused_with_a_remedy_that_does(
    tiny_base: Path, step: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"base.model": str(tiny_base)}
    needed = Rehearsal(step, load_config(Path("params.yaml"), "smoke", settings), MACHINE, ASKED).rehearse()
    monkeypatch.setattr(Machine, "usable", 0.7 * needed.bytes)
    status, out, err = run(capsys, tiny_base, "--gpus", "1xH100", step)
    assert status == 1
    assert f"\n{step}, per GPU" in out
    assert f"{step} does not fit: '{needed.largest}'" in err
    remedy = [word for part in re.findall(r"--set \S+", err) for word in part.split()]
    assert remedy
    assert run(capsys, tiny_base, "--gpus", "1xH100", step, *remedy)[0] == 0


@pytest.mark.parametrize("gpus", [1, 3])
def test_a_base_that_neither_a_gpu_nor_all_together_can_hold_is_refused_by_that(
    tiny_base: Path, gpus: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three cannot share two heads."""
    weights = sum(weight.nbytes for weight in load_base(tiny_base).model.parameters())
    cards = {"small": (CONTEXT + weights, 1e12, 1e12, 1e12), "large": CARDS["H100"]}
    batch = "--set", "grpo.batch_size=6", "--set", "stage1.warm_start.batch_size=6"
    other = "with base.tensor_parallel on more GPUs or with a smaller base.model\n"
    for known, said in ((cards, f"on large or {other}"), ({"small": cards["small"]}, other)):
        monkeypatch.setattr("vismem.plan.machine.CARDS", known)
        monkeypatch.setattr("vismem.plan.report.CARDS", known)
        status, _, err = run(capsys, tiny_base, "--gpus", f"{gpus}xsmall", "stage1", *batch)
        assert status == 1
        assert err.endswith(f"; it fits {said}")
    monkeypatch.setattr(Machine, "usable", 1.1 * weights)  # enough for the base, too little for what is computed
    status, _, err = run(capsys, tiny_base, "--gpus", f"{gpus}xsmall", "stage1", *batch)
    assert status == 1
    assert err.endswith("; it fits no card known here\n")


@pytest.mark.parametrize(("gpus", "card"), [("2x80", "H100"), ("8x141", "H200")])
def test_gigabytes_name_the_card_that_has_them(gpus: str, card: str) -> None:
    count = int(gpus[0])
    assert Machine.named(gpus) == Machine.named(f"{count}x{card}") == Machine(count, card, *CARDS[card])


def test_wrong_requests_are_said_so(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = ("--gpus", "2xH100", "--set")
    for base, arguments, said in (
        (tiny_base, ("--gpus", "80"), "COUNTxCARD"),
        (tiny_base, ("--gpus", "1xH10"), "L40S, A100, H100, H200"),
        (tiny_base, ("--gpus", "1x40"), "H200, or its memory in GB: 80 (H100) or 141 (H200)"),
        (tiny_base, ("--gpus", "3xH100"), "must be a multiple of the 3 GPUs"),
        (tiny_base, (*two, "stage1.warm_start.batch_size=3"), "warm_start: a batch_size of 3 must be a multiple"),
        (tiny_base, (*two, "baselines.supervised.batch_size=3", "sft_lora"), "sft_lora: a batch_size of 3 must"),
        (tiny_base, ("--gpus", "1xH100", "--image", "84"), "WIDTHxHEIGHT"),
        (tiny_base, ("--gpus", "1xH100", "--images", "0"), "--images 0 --questions 0: there must be some"),
        (tiny_base, ("--gpus", "1xH100", "--image", "100000x100000"), "sets such images apart"),
        (tiny_base, ("--gpus", "1xH100", "--image", "4000x40"), "validate.max_aspect 50)"),
        (tiny_base, ("--gpus", "1xH100", "--image", "27x100"), "validate.min_pixels 28"),
        (tiny_base, ("--gpus", "1xH100", "stage3"), "did you mean 'stage"),
        (tmp_path, ("--gpus", "1xH100"), "config.json"),
    ):
        status, out, err = run(capsys, base, *arguments)
        assert (status, out) == (1, "")
        assert said in err
        assert err.count("\n") == 1

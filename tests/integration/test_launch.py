"""Several processes share a step: they make what one makes, and a failure of one of them leaves nothing half made."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import tiny
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from trainer_api import cluster

from vismem.cli import main
from vismem.config import Config, GrpoConfig, Stage1Config, Stage2Config, WarmStartConfig
from vismem.data.sample import Sample, read_samples
from vismem.errors import UserError
from vismem.generation.types import Rollout
from vismem.launch import LaunchConfig, launch_step
from vismem.launch import trainer as adapter
from vismem.launch.torchrun import run_processes
from vismem.params_file import render_params
from vismem.ranks import join_ranks
from vismem.steps import run_step
from vismem.training.loop import shard_batch
from vismem.training.rollout import GrpoObjective
from vismem.training.run import FORMATION, trainable
from vismem.training.stage1 import Formation
from vismem.training.stage2 import Invocation
from vismem.training.supervised import Supervised, answer_with_memory

GRPO = GrpoConfig(batch_size=4, micro_batch=8, max_new_tokens=8, checkpoint_every=2, sample_every=2)
STAGE: dict[str, Any] = {"steps": 3, "group_size": 4, "learning_rate": 1e-4}
WARM = WarmStartConfig(steps=2, batch_size=4, learning_rate=1e-4, matrix_learning_rate=1e-4)
STAGE1 = Stage1Config(**STAGE, warm_start=WARM)
CONFIG = Config(memory=tiny.MEMORY, grpo=GRPO, stage1=STAGE1, stage2=Stage2Config(**STAGE))
TORCHRUN, TRAINER = (LaunchConfig(backend, num_processes=2) for backend in ("torchrun", "trainer"))


# A random model is never right. Answers score by their letters instead, also in processes that tests launch: Python
# imports a module of this name when it starts.
SCORES = """
import os
import sys
if "RANK" in os.environ or "--multiprocessing-fork" in sys.orig_argv:
    import vismem.training.rewards
    vismem.training.rewards.score = lambda sample, text: float(sum(map(ord, text)) % 2)
"""


@pytest.fixture(scope="module", autouse=True)
def _scores_differ(tmp_path_factory: pytest.TempPathFactory, scores_differ: None) -> Iterator[None]:
    """One process samples as two do: for other numbers of rows, rounding would decide one draw in some 100,000."""

    def sample_as_two(objective: GrpoObjective, batch: Sequence[Sample], *settings: Any) -> list[Rollout]:
        group, halves = objective.stage.group_size, [sample(objective, batch[rank::2], *settings) for rank in (0, 1)]
        return [rollout for at in range(len(batch)) for rollout in halves[at % 2][at // 2 * group :][:group]]

    folder, sample = tmp_path_factory.mktemp("scores"), GrpoObjective.sample
    (folder / "sitecustomize.py").write_text(SCORES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GrpoObjective, "sample", sample_as_two)
        patch.setenv("PYTHONPATH", os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", ""))))
        yield


@pytest.fixture(scope="module")
def one(tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The inputs, and both stages as one process makes them."""
    artifacts = tmp_path_factory.mktemp("one")
    folders = {"base": tiny_base, "validate": tiny_data}
    for name in ("stage1", "stage2"):
        run_step(name, CONFIG, artifacts, folders)
        folders[name] = artifacts / name
        curve = pd.read_csv(folders[name] / f"{name}.csv")
        assert curve["zero_variance_groups"].max() < 1, "every step has something to learn"
    return folders


def assert_same(name: str, one: Path, several: Path) -> None:
    """The same figures and weights, but for what another order of summation leaves (float32).

    Where a gradient is all but zero, AdamW and Muon follow its rounding: by less than a step's 1e-4, and at few places.
    """
    first, second = (pd.read_csv(folder / f"{name}.csv") for folder in (one, several))
    pd.testing.assert_frame_equal(first, second, rtol=1e-4, atol=1e-5)
    figures = [json.loads((folder / "metrics.json").read_text()) for folder in (one, several)]
    assert figures[0]["validation"] == figures[1]["validation"]
    assert figures[0]["train_rollouts"] == figures[1]["train_rollouts"]
    assert sorted(p.name for p in one.rglob("*")) == sorted(p.name for p in several.rglob("*"))
    expected, found = (
        load_file(folder / "memory.safetensors") | load_file(folder / "policy.safetensors") for folder in (one, several)
    )
    apart = torch.cat([(value - found[key]).abs().flatten() for key, value in expected.items()])
    assert apart.max() < 1e-4
    assert apart.mean() < 1e-6


def test_two_processes_on_one_machine_make_what_one_makes_though_one_was_killed(
    one: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first launch is killed behind a checkpoint; the second, by the command line, goes on from there."""
    artifacts, params = tmp_path / "artifacts", tmp_path / "params.yaml"
    params.write_text(render_params(CONFIG))
    artifacts.mkdir()
    for name in ("base", "validate"):
        (artifacts / name).symlink_to(one[name])
    group = artifacts / "stage1.partial" / "samples" / "000002.jsonl"
    with ThreadPoolExecutor(1) as pool:
        launched = pool.submit(launch_step, "stage1", CONFIG, artifacts, None, TRAINER)
        while not group.parents[1].is_dir():
            time.sleep(0.01)
        group.parent.mkdir()
        os.mkfifo(group)  # who would write it waits for a reader that never comes
        while not (group.parents[1] / "stage1.checkpoint").is_file() and not launched.done():
            time.sleep(0.05)
        workers = {process.environ().get("RANK"): process for process in psutil.Process().children(recursive=True)}
        workers["1"].send_signal(signal.SIGKILL)
        with pytest.raises(UserError, match="stage1: a process was killed by signal 9"):
            launched.result()
    assert not (artifacts / "stage1").exists()
    group.unlink()
    assert main(["stage1", "--params", str(params), "--artifacts", str(artifacts), "--processes", "2"]) == 0
    assert "stage1: 3 GRPO steps" in capsys.readouterr().out
    assert_same("stage1", one["stage1"], artifacts / "stage1")
    assert sorted(path.name for path in artifacts.iterdir()) == ["base", "stage1", "validate"]


def test_two_nodes_of_a_cluster_make_what_one_process_makes(
    one: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the SDK and an API that runs each node's command; everything passes through the shared volume."""
    shared, artifacts = tmp_path / "shared", tmp_path / "artifacts"
    shared.mkdir()
    monkeypatch.setattr(adapter, "POLL", 0.1)
    launch = LaunchConfig("trainer", num_nodes=2, image="vismem-train", shared=shared)
    with cluster(tmp_path) as (stand_in, kubeconfig):
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig))
        launch_step("stage2", CONFIG, artifacts, one, launch)
        assert len(stand_in.jobs) == 1
    assert_same("stage2", one["stage2"], artifacts / "stage2")
    assert {path.name for path in shared.glob("*/*")} == {"lock", "params.yaml", "stage2.run-"}


def test_a_killed_task_goes_on_elsewhere_from_the_checkpoints_in_its_work_folder(
    one: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a pod does that is started anew: its own folder is gone, the work folder is not."""
    work, collect, steps = tmp_path / "work", GrpoObjective.collect, []

    def collect_until_killed(objective: GrpoObjective, step: int) -> Any:
        steps.append(step)
        if steps == [0, 1, 2]:
            with pytest.raises(UserError, match="is in use"):  # by this launch
                launch_step("stage2", CONFIG, tmp_path / "beside", one, work=work)
            raise KeyboardInterrupt
        return collect(objective, step)

    monkeypatch.setattr(GrpoObjective, "collect", collect_until_killed)
    monkeypatch.setattr("vismem.launch.PATIENCE", 0.0)
    with pytest.raises(KeyboardInterrupt):
        launch_step("stage2", CONFIG, tmp_path / "first", one, work=work)
    launch_step("stage2", CONFIG, tmp_path / "second", one, work=work)
    assert steps == [0, 1, 2, 2], "behind the checkpoint of step 1"
    for name in ("policy.safetensors", "stage2.csv", "samples.jsonl"):
        assert (tmp_path / "second" / "stage2" / name).read_bytes() == (one["stage2"] / name).read_bytes(), name
    assert {path.name for path in work.glob("*/*")} == {"lock", "stage2.run-"}, "its checkpoints are gone"


def test_a_failing_process_makes_the_launch_fail_with_its_reason_and_no_output_appears(
    one: dict[str, Path], tmp_path: Path
) -> None:
    odd = CONFIG.model_copy(update={"grpo": GRPO.model_copy(update={"batch_size": 3})})
    with pytest.raises(UserError, match="stage1: a batch of 3 questions cannot be shared equally among 2 processes"):
        launch_step("stage1", odd, tmp_path, one, TORCHRUN)
    assert not (tmp_path / "stage1").exists()


def test_a_step_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'prepare' runs in one process"):
        launch_step("prepare", CONFIG, tmp_path, launch=TORCHRUN)
    with pytest.raises(UserError, match="'prepare' runs in one process, not under torchrun"):
        run_processes(2, run_step, "prepare", CONFIG, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_the_shared_volume_a_cluster_is_not_asked(one: dict[str, Path], tmp_path: Path) -> None:
    launch = LaunchConfig("trainer", num_nodes=2, image="vismem-train", shared=tmp_path / "absent")
    with pytest.raises(UserError, match="no shared volume at"):
        launch_step("stage1", CONFIG, tmp_path, one, launch)


def test_fewer_processes_than_were_started_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    given, alone = dict[str, Any](), type("Alone", (), {"num_processes": 1})
    monkeypatch.setattr("accelerate.PartialState", lambda **options: (given.update(options), alone)[1])
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match="2 processes were started, and 1 run together"):
        join_ranks()
    assert given["timeout"] > timedelta(hours=1), "the others wait while the first one hashes, saves and asks a judge"


def sleep_as_rank(folder: Path) -> str:
    """Join the others, leave a file, and be as deaf to Ctrl-C as a process in native code."""
    join_ranks()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    (folder / str(os.getpid())).touch()
    os.read(os.pipe()[0], 1)
    return "never"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_their_launcher_however_it_dies(how: signal.Signals, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    program = tmp_path / "launcher.py"
    program.write_text(
        f"import sys; sys.path[:0] = {[str(Path(__file__).parents[1]), str(Path(__file__).parent)]!r}\n"
        "from pathlib import Path\nfrom test_launch import run_processes, sleep_as_rank\n"
        f"if __name__ == '__main__': run_processes(2, sleep_as_rank, Path({str(here)!r}))"
    )
    launcher = subprocess.Popen([sys.executable, str(program)], stderr=subprocess.DEVNULL)
    while len(list(here.iterdir())) < 2:
        assert launcher.poll() is None
        time.sleep(0.05)
    ranks = [psutil.Process(int(file.name)) for file in here.iterdir()]
    launcher.send_signal(how)
    assert psutil.wait_procs(ranks, timeout=60)[1] == []
    assert launcher.wait(60) != 0


# --- how a batch is shared -------------------------------------------------------------------------------------------


class Part(Accelerator):
    """One of several processes, without the others: what it computes before sums are taken over all."""

    num_processes = 2
    process_index = 0

    def reduce(self, tensor: torch.Tensor, reduction: str = "mean", scale: float = 1.0) -> torch.Tensor:
        return tensor


def part(index: int) -> Part:
    made = Part(cpu=True)
    made.process_index = index
    return made


@pytest.mark.parametrize("kind", [Formation, Invocation, Supervised])
def test_the_gradients_of_the_processes_add_up_to_that_of_one(kind: type, tiny_base: Path, tiny_data: Path) -> None:
    """And they sample the same answers, each of them once, whoever samples it."""
    samples = read_samples(tiny_data / "data/train")
    found, answers = [], []
    for accelerators in ([Accelerator(cpu=True)], [part(0), part(1)]):
        sums: dict[str, torch.Tensor] = {}
        texts: list[tuple[str, str]] = []
        for accelerator in accelerators:
            model = tiny.vismem(tiny_base)
            parameters = trainable(model, ("tokens.",) if kind is Invocation else FORMATION)
            if kind is Supervised:
                written = partial(answer_with_memory, probability=0.4)
                objective: Any = Supervised(model, samples, written, 0, accelerator, batch_size=4, micro_batch=4)
            else:
                stage = STAGE1 if kind is Formation else CONFIG.stage2
                objective = kind(model, samples, GRPO, stage, 0, accelerator)
            batch = objective.collect(0)
            objective.backward(batch)
            rollouts = batch.rollouts if isinstance(objective, GrpoObjective) else batch[1]
            texts += [(rollout.sample_id, rollout.marked_text) for rollout in rollouts]
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    sums[name] = sums.get(name, torch.zeros_like(parameter)) + parameter.grad
        found.append(sums)
        answers.append(sorted(texts))
    assert answers[0] == answers[1]
    assert found[0].keys() == found[1].keys()
    assert any(gradient.abs().max() > 1e-4 for gradient in found[0].values())
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-4, atol=1e-6), name


def test_a_batch_is_shared_out_whole_or_not_at_all() -> None:
    batch = [7, 3, 9, 1]
    assert sorted(shard_batch(batch, part(0)) + shard_batch(batch, part(1))) == sorted(batch)
    with pytest.raises(UserError, match="a multiple of 2"):
        shard_batch(batch[:3], part(0))

"""A tiny model goes the whole way by the README's commands, from data to a server: of each family without graphs, and
of the largest by its own profile, as real ones are: of a real vocabulary, in bfloat16, in several files.
"""

import json
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_families
from PIL import Image

from vismem import Client, VisMem
from vismem.serving.deploy import api_server

SMALL = (
    "stage1.steps=1", "stage1.warm_start.steps=1", "stage2.steps=1", "grpo.batch_size=2",
    "stage1.group_size=2", "stage2.group_size=2", "memory.lora_rank=2", "evaluate.arms=[vanilla, vismem]",
    "evaluate.bootstrap=100", "grpo.max_new_tokens=6", "evaluate.max_new_tokens=6",
)  # fmt: skip
ASKED = "where is the red circle?"
Run = Callable[..., str]


@pytest.fixture
def run(project: Path) -> Run:
    def command(*words: str) -> str:
        vismem = str(project / ".venv" / "bin" / "vismem")
        done = subprocess.run([vismem, *words], cwd=project, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return command


def write_questions(file: Path, count: int) -> None:
    rng = np.random.default_rng(count)  # other pictures in every split
    with file.open("w") as lines:
        for number in range(count):
            name = f"{file.stem}-{number}"
            Image.fromarray(rng.integers(0, 256, (56, 56, 3), np.uint8)).save(file.parent / f"{name}.png")
            row = {"id": name, "image": f"{name}.png", "prompt": ASKED, "answer": f"cell {number % 7}"}
            lines.write(json.dumps(row) + "\n")


def repro(project: Path, run: Run, profile: str, *more: str) -> Path:
    """The artifacts of a run that ended with a server's answers."""
    run("repro", "--profile", profile, "--quiet", *(word for each in (*SMALL, *more) for word in ("--set", each)))
    (artifacts,) = (folder for folder in (project / "runs").glob(f"{profile}*/artifacts") if folder.is_dir())
    smoke = json.loads((artifacts / "deploy" / "smoke.json").read_text())
    assert smoke["model"] == f"vismem_{profile}_challenger", "random weights: the gate refuses them"
    assert smoke["items"] > 0
    assert not (artifacts / "deploy" / "model_repository").exists()
    return artifacts


@pytest.mark.parametrize("variant", ["internvl", "llava_onevision"])
def test_a_model_goes_from_questions_to_a_server(project: Path, run: Run, variant: str) -> None:
    tiny_families.save_base(project / "base", variant)
    write_questions(project / "data.jsonl", 40)
    run("init", "mine", "--data", "data.jsonl", "--base", "base")
    artifacts = repro(project, run, "mine")
    with api_server(artifacts / "export", "mine", "float32", project / "log") as (address, _):
        picture = project / "data-0.png"
        own = VisMem.from_pretrained(artifacts / "export").answer(picture, ASKED, max_new_tokens=8)
        assert Client(address).ask(picture, ASKED, max_new_tokens=8).marked == own.marked
        said = run("infer", "--image", str(picture), ASKED, "--max-new-tokens", "8", "--url", address)
        assert said.strip() == own.marked
        named = json.loads((artifacts / "export" / "lineage.json").read_text())["memories_per_answer"]
        page = urllib.request.urlopen(f"{address}/metrics").read().decode()
        for kind, value in named.items():
            assert f'vismem_evaluation_memories_per_answer{{kind="{kind}"}} {value}' in page


def test_the_largest_profile_goes_the_whole_way_and_copies_no_weights_of_its_base(
    project: Path, run: Run, tmp_path: Path
) -> None:
    tiny_families.save_wide_base(project / "base", tmp_path / "small")
    weights = sorted((project / "base").glob("*.safetensors"))
    assert len(weights) > 1
    (project / "data").mkdir(exist_ok=True)
    for split, count in (("train", 8), ("validation", 4), ("test", 6)):
        write_questions(project / "data" / f"{split}.jsonl", count)
    artifacts = repro(project, run, "qwen2_5_vl_7b", "base.model=base", "preflight.free_disk_gb=0", "preflight.gpus=0")
    linked = sorted((artifacts / "base").glob("*.safetensors"))
    assert [file.stat().st_ino for file in linked] == [file.stat().st_ino for file in weights]
    own = {file for file in artifacts.rglob("*.safetensors") if file.parent != artifacts / "base"}
    assert sum(file.stat().st_size for file in own) < sum(file.stat().st_size for file in weights) / 4
    with api_server(artifacts / "export", "large", "bfloat16", project / "log") as (address, _):
        picture = project / "data" / "test-0.png"
        own = VisMem.from_pretrained(artifacts / "export", dtype="bfloat16").answer(picture, ASKED, max_new_tokens=8)
        assert Client(address).ask(picture, ASKED, max_new_tokens=8).marked == own.marked

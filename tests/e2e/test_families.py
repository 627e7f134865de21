"""A tiny model of each family without graphs goes the whole way by the README's commands, from data to a server."""

import json
import subprocess
import urllib.request
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


@pytest.mark.parametrize("variant", ["internvl", "llava_onevision"])
def test_a_model_goes_from_questions_to_a_server(project: Path, variant: str) -> None:
    def run(*words: str) -> str:
        command = [str(project / ".venv" / "bin" / "vismem"), *words]
        done = subprocess.run(command, cwd=project, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    tiny_families.save_base(project / "base", variant)
    rng = np.random.default_rng(0)
    with (project / "data.jsonl").open("w") as lines:
        for number in range(40):
            Image.fromarray(rng.integers(0, 256, (56, 56, 3), np.uint8)).save(project / f"{number}.png")
            row = {"image": f"{number}.png", "prompt": ASKED, "answer": f"cell {number % 7}"}
            lines.write(json.dumps(row) + "\n")
    run("init", "mine", "--data", "data.jsonl", "--base", "base")
    run("repro", "--profile", "mine", "--quiet", *(word for each in SMALL for word in ("--set", each)))
    (artifacts,) = (folder for folder in (project / "runs").glob("mine*/artifacts") if folder.is_dir())
    smoke = json.loads((artifacts / "deploy" / "smoke.json").read_text())
    assert smoke["model"] == "vismem_mine_challenger", "random weights: the gate refuses them"
    assert smoke["items"] > 0
    assert not (artifacts / "deploy" / "model_repository").exists()

    with api_server(artifacts / "export", "mine", "float32", project / "log") as (address, _):
        picture = project / "0.png"
        own = VisMem.from_pretrained(artifacts / "export").answer(picture, ASKED, max_new_tokens=8)
        assert Client(address).ask(picture, ASKED, max_new_tokens=8).marked == own.marked
        said = run("infer", "--image", str(picture), ASKED, "--max-new-tokens", "8", "--url", address)
        assert said.strip() == own.marked
        named = json.loads((artifacts / "export" / "lineage.json").read_text())["memories_per_answer"]
        page = urllib.request.urlopen(f"{address}/metrics").read().decode()
        for kind, value in named.items():
            assert f'vismem_evaluation_memories_per_answer{{kind="{kind}"}} {value}' in page

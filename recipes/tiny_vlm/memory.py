"""Trains a memory for the tiny VLM with the library's own steps and their default parameters."""

import shutil
from pathlib import Path
from typing import Any

from recipes.tiny_vlm.card import begin, write_card
from vismem.config import Config, resolve
from vismem.files import read_json
from vismem.models.reference import Base
from vismem.models.vismem import VisMemModel
from vismem.provenance import sha256_folder
from vismem.steps import run_step

TRAINED = ("prepare", "validate", "base", "stage1", "stage2")
VALIDATION = 1200  # questions that the card's scores are from


def memory_config(base: Path, seed: int) -> Config:
    """The defaults with a larger validation split, on which the two arms of the card are compared."""
    scenes = resolve().prepare.sources[0].model_copy(update={"validation": VALIDATION, "test": 1})
    changes = {
        "prepare.sources": [scenes.model_dump()],
        "base.model": str(base),
        "evaluate.arms": ["vanilla", "vismem"],
    }
    return resolve(overrides={"seed": seed, **changes})


def train_memory(out: Path, base: Path, config: Config, origin: dict[str, Any]) -> Path:
    """Write the memory that stage II leaves, with its card, to `out`; return `out`.

    `origin` as in train_tiny_vlm. The steps' folders are in `OUT.partial`, from which a killed run resumes. The card
    scores the validation split.
    """
    work = out.with_name(f"{out.name}.partial")
    reference = Base(config.base.model, sha256_folder(base, "*.safetensors"))
    wanted = {"base_sha256": reference.sha256, "parameters": config.model_dump(mode="json")}
    started = begin(work, wanted, origin)
    for name in TRAINED:
        if not (work / name).is_dir():
            print(run_step(name, config, work), flush=True)
    shutil.copytree(work / "validate/data/validation", work / "shown/data/test", dirs_exist_ok=True)
    print(run_step("evaluate", config, work, {"validate": work / "shown"}), flush=True)
    metrics = read_json(work / "evaluate" / "metrics.json")
    shutil.rmtree(out, ignore_errors=True)
    VisMemModel.from_pretrained(work / "stage2", work / "base").save_pretrained(out)
    reference.write(out)
    facts = {
        **started,
        "data_sha256": read_json(work / "validate" / "validation.json")["data_sha256"],
        "questions": metrics["n"],
        "scores": {arm: round(scores["overall"], 2) for arm, scores in metrics["arms"].items()},
        "gain": metrics["gain"]["overall"],
    }
    write_card(out, "memory.md.j2", facts)
    shutil.rmtree(work)
    return out

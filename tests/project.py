"""A project with scores and a registry: tiny stand-ins for the outputs of export, evaluate and validate."""

import json
from pathlib import Path
from typing import Any

from vismem.config import parse_config
from vismem.data.profile import Profile
from vismem.data.sample import Sample, write_shards
from vismem.evaluation.predictions import InvocationRecord, Prediction, predictions_file, write_predictions
from vismem.provenance import sha256_folder, write_manifest
from vismem.records import Metrics, ParityReport, Validation
from vismem.registry import release
from vismem.registry.champion import read_ledger
from vismem.registry.register import register
from vismem.registry.tracking import Store, find_version, open_store

PASSES = {  # smoke scores mean nothing: the gate lets all pass, so that the pipeline comes to its last step
    "gate.min_items": 1,
    "gate.min_clusters": 1,
    "gate.min_gain": -100,
    "gate.min_gain_low": -100,
    "gate.max_capability_drop": 100,
    "gate.max_time_overhead": 1000,
}
KIND = {"per_answer": 0.5, "mean_position": None}
USE = {"answers_with_memory": 50.0, "short": KIND, "long": KIND}
HASHES = {"stage2_sha256": "5a5a", "test_sha256": "7e57", "items_sha256": "17e5"}
CARD = """---
license: apache-2.0
---

# VisMem on a tiny model

<img src="scores.png" alt="scores">

A card.
"""
PARITY = ParityReport(
    graphs=True,
    passed=True,
    items=4,
    greedy_equal=4,
    memories=8,
    max_memory_difference=1e-6,
    tolerance=1e-4,
    differences=(),
    seconds={"torch": 1.0, "runtime": 1.0},
)
VALIDATION = Validation.model_validate(
    {
        "success": True,
        "rows": {"total": 1, "clean": 1, "quarantined": 0, "splits": {}},
        "data_sha256": "da7a",
        "rules": [],
        "task_mix": {"train": {}},
    }
)

PROFILE = Profile(
    format=1,
    question_length={9: 1},
    image_min_side={84: 1},
    image_max_side={84: 1},
    brightness={200: 1},
    words=("how", "many"),
    unseen_words={0: 1},
    repeats={1: 1},
)


def scores(score: float = 66.0, by: float = 6.0, **changed: Any) -> Metrics:
    """Scores on 600 items of one capability, `by` points above vanilla; `changed` replaces whole fields."""
    arms = {
        "vanilla": {"overall": score - by, "understanding": score - by, "seconds_per_sample": 0.10},
        "vismem": {"overall": score, "understanding": score, "seconds_per_sample": 0.12},
    }
    interval = {name: (arm["overall"] - 2, arm["overall"] + 2) for name, arm in arms.items()}
    gains = {name: {"delta": by, "ci95": (by - 2, by + 2), "p": 0.01} for name in ("overall", "understanding")}
    values = {
        "n": 600,
        "seed": 0,
        "counts": {"understanding": 600},
        "clusters": {"overall": 600, "understanding": 600},
        "arms": arms,
        "intervals": {name: {"overall": ends, "understanding": ends} for name, ends in interval.items()},
        "gain": gains,
        "ablations": {},
        "overhead": {"vismem": 0.2},
        "benchmarks": {},
        "macro": {},
        "tasks": {},
        "yes_no": {"n": 0, "arms": {}, "gain": {}},
        "unparsed": {},
        "unfinished": {},
        "invocation": {"overall": USE, "tasks": {}},
        "invocation_by_arm": {"vismem": USE},
        **HASHES,
    }
    return Metrics.model_validate({**values, **changed})


def answered(read: str) -> Prediction:
    """The project's one question, answered so, with one memory."""
    memory = InvocationRecord(position=1, kind="short", forced=False, relative_position=0.5)
    return Prediction(
        id="q1",
        task="count",
        capability="understanding",
        source="scenes",
        question="how many?",
        reference="two",
        text=read,
        marked_text=read,
        extracted=read,
        rule="word",
        score=float(read == "two"),
        invocations=(memory,),
        answer_length=2,
        finished=True,
        cluster="c1",
    )


class Project:
    """A project folder whose steps before the registry have run."""

    def __init__(self, root: Path) -> None:
        self.artifacts = root / "artifacts"
        self.config = parse_config({"registry": {"tracking_uri": f"sqlite:///{root / 'mlflow.db'}"}})
        self.steps = {name: self.artifacts / name for name in ("export", "evaluate", "validate")}
        test = self.steps["validate"] / "data" / "test"
        write_shards([Sample("q1", (b"png",), "how many?", "two")], test)
        self.test_sha256 = sha256_folder(test, "*.parquet")
        VALIDATION.write(self.steps["validate"])
        PROFILE.write(self.steps["validate"])
        (self.steps["validate"] / "report.html").write_text("<p>data</p>")

    def build(self, weights: bytes, score: float = 66.0, gain: float = 6.0, **changed: Any) -> None:
        """The outputs of evaluate and export for a model of that score."""
        evaluate, bundle = self.steps["evaluate"], self.steps["export"]
        scores(score, gain, **{"test_sha256": self.test_sha256, **changed}).write(evaluate)
        for arm, read in ("vanilla", "three"), ("vismem", "two" if score >= 60 else "three"):
            write_predictions([answered(read)], predictions_file(evaluate, arm))
        (evaluate / "plots").mkdir(exist_ok=True)
        (evaluate / "plots" / "scores.png").write_bytes(b"png")
        (evaluate / "report.html").write_text("<p>scores</p>")
        (bundle / "training").mkdir(parents=True, exist_ok=True)
        (bundle / "training" / "stage1.csv").write_text("step,reward,kl\n0,0.25,\n1,0.5,0.01\n")
        PARITY.write(bundle)
        lineage = {"git": {"commit": "c0ffee"}, "data_sha256": "da7a", "params": {"seed": 0}}
        lineage["inputs_sha256"] = {"stage2": HASHES["stage2_sha256"]}
        (bundle / "lineage.json").write_text(json.dumps(lineage))
        (bundle / "README.md").write_text(CARD)
        (bundle / "vismem").mkdir(exist_ok=True)
        (bundle / "vismem" / "memory.safetensors").write_bytes(weights)
        if not (bundle / "onnx").is_dir():  # else the test has put a real one there
            (bundle / "onnx").mkdir()
            (bundle / "onnx" / "runtime.json").write_text("{}")
        write_manifest(bundle)

    def run(self, name: str, folder: str | None = None) -> dict[str, Any]:
        """Run `register` or `promote`, the first into `folder`; return what it wrote, together."""
        registered = self.artifacts / (folder or "register")
        out = registered if name == "register" else self.artifacts / name
        out.mkdir(parents=True, exist_ok=True)
        inputs = {**self.steps, "register": registered}
        line = (register if name == "register" else release.promote)(self.config, inputs, out)
        written = {key: value for path in out.glob("*.json") for key, value in json.loads(path.read_text()).items()}
        return {"line": line, **written}

    def release(self, weights: bytes, score: float, gain: float = 6.0, **changed: Any) -> dict[str, Any]:
        self.build(weights, score, gain, **changed)
        self.run("register")
        return self.run("promote")

    def connect(self, uri: str) -> None:
        """Use the store by that address from now on."""
        registry = self.config.registry.model_copy(update={"tracking_uri": uri})
        self.config = self.config.model_copy(update={"registry": registry})

    @property
    def store(self) -> Store:
        return open_store(self.config.registry)

    @property
    def moves(self) -> list[tuple[str, str, str | None]]:
        """The ledger's moves, each as action, version and previous."""
        return [(move.action, move.version, move.previous) for move in read_ledger(self.store).moves]

    def champion(self) -> str | None:
        version = find_version(self.store, "champion")
        return version.version if version else None

"""A tiny random model, exported: the bundle, the torch model and the runtime that must agree with it."""

import sys
from pathlib import Path

import pytest
import tiny
import torch
from project import HASHES

sys.path.insert(0, str(Path(__file__).parent))

from pictures import TOKENS

from vismem.config import BaseConfig, Config, EvaluateConfig, ExportConfig
from vismem.data.sample import write_shards
from vismem.evaluation.metrics import summarise
from vismem.evaluation.predictions import predict
from vismem.export.export import export
from vismem.generation.engine import generate
from vismem.generation.invocation import Learned, Off
from vismem.models.vismem import VisMemModel
from vismem.records import Metrics
from vismem.serving.answering import Runtime
from vismem.training.base import base


@pytest.fixture(scope="session")
def inputs(tiny_base, tmp_path_factory):
    """Outputs of the steps before export, of a tiny random model that invokes now and then."""
    root = tmp_path_factory.mktemp("steps")
    model = tiny.vismem(tiny_base)
    with torch.no_grad():
        model.tokens.head.mul_(3)
    model.save_pretrained(root / "stage2")
    samples = tiny.samples()
    write_shards(samples, root / "validate" / "data" / "test")
    answers = {
        arm: [predict(s, r) for s, r in zip(samples, generate(model, samples, policy, max_new_tokens=4), strict=True)]
        for arm, policy in (("vanilla", Off(limit=0)), ("vismem", Learned()))
    }
    figures = summarise(answers, dict.fromkeys(answers, 0.01), seed=0, resamples=100)
    Metrics(**figures, **HASHES).write(root / "evaluate")
    (root / "base").mkdir()
    base(Config(base=BaseConfig(model=str(tiny_base))), {}, root / "base")
    return {name: root / name for name in ("base", "stage2", "validate", "evaluate")}


@pytest.fixture(scope="session")
def config():
    return Config(export=ExportConfig(parity_items=6), evaluate=EvaluateConfig(max_new_tokens=TOKENS))


@pytest.fixture(scope="session")
def bundle(inputs, config, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundle")
    (out / "leftover").mkdir()  # of a killed run
    line = export(config, inputs, out)
    assert "6 of 6 answers" in line
    return out


@pytest.fixture(scope="session")
def model(inputs):
    return VisMemModel.from_pretrained(inputs["stage2"], inputs["base"])


@pytest.fixture(scope="session")
def runtime(bundle):
    return Runtime.open(bundle)

"""VLMEvalKit asks the endpoint, an arm by its model name: its answers and scores are those of `vismem evaluate`.

The requests are written as its wrappers write them (open-compass/VLMEvalKit at e8e78f0, vlmeval/api/lmdeploy.py,
openai_sdk.py and gpt.py). VLMEvalKit itself needs an older transformers, so an environment of its own: the last test
runs where VLMEVALKIT_PYTHON names that environment's Python.
"""

import base64
import csv
import io
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from http_calls import post, served
from PIL import Image

from vismem.config import Config, EvaluateConfig, LmuDataSource, ScenesSource
from vismem.data.readers.lmudata import read
from vismem.data.sample import Sample
from vismem.data.scenes import generate
from vismem.evaluation.arms import resolve_arms
from vismem.evaluation.compare import compare, read_arms
from vismem.evaluation.decoding import decode
from vismem.evaluation.predictions import Prediction, predict
from vismem.evaluation.scored import read_scored
from vismem.generation.torch_executor import TorchExecutor
from vismem.inference import VisMem
from vismem.serving.answering import Runtime
from vismem.serving.http import create_app

MODEL = Path(__file__).parents[2] / "assets" / "tiny-vlm-memory"
PYTHON = os.environ.get("VLMEVALKIT_PYTHON")
ARMS = {"vanilla": "vismem-vanilla", "vismem": "vismem", "long_only": "vismem-long_only"}  # and their models
LIMIT, COUNT = 40, 24  # tokens, questions
BENCHMARK = "TinyScenes"


@pytest.fixture(scope="module")
def lmu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of benchmarks with one of scenes; VLMEvalKit enlarges images below 100 pixels, so these are larger."""
    source = ScenesSource(train=30, validation=0, test=0, image_size=112, tasks=())
    scenes = [sample for sample in generate(source, "train", seed=0) if len(sample.images) == 1][:COUNT]
    folder = tmp_path_factory.mktemp("lmu")
    with (folder / f"{BENCHMARK}.tsv").open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "image", "question", "answer"])
        for place, sample in enumerate(scenes):
            table.writerow([place, base64.b64encode(sample.images[0]).decode(), sample.question, sample.answer])
    return folder


@pytest.fixture(scope="module")
def samples(lmu: Path) -> list[Sample]:
    """The questions as our reader of benchmarks has them, with the images that VLMEvalKit sends."""
    read_ones = read(LmuDataSource(kind="lmudata", name=BENCHMARK, path=lmu, split="test"))
    return [replace(sample, images=(as_jpeg(sample.images[0]),)) for sample in read_ones]


def as_jpeg(image: bytes) -> bytes:
    """vlmeval/smp/vlm.py, encode_image_to_base64."""
    Image.open(io.BytesIO(image)).convert("RGB").save(file := io.BytesIO(), "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def model() -> VisMem:
    return VisMem.from_pretrained(MODEL, "cpu")


@pytest.fixture(scope="module")
def expected(model: VisMem, samples: list[Sample]) -> dict[str, list[Prediction]]:
    """Arm -> its predictions, as `vismem evaluate` decodes and scores them."""
    config = Config(evaluate=EvaluateConfig(arms=tuple(ARMS), batch_size=4, max_new_tokens=LIMIT))
    runs = decode({"vismem": model.model}, resolve_arms(tuple(ARMS)), samples, config)
    found = {
        name: [predict(sample, rollout) for sample, rollout in zip(samples, run.rollouts, strict=True)]
        for name, run in runs.items()
    }
    assert len({tuple(answer.text for answer in answers) for answers in found.values()}) == len(ARMS)
    assert all(0 < sum(answer.score for answer in answers) < COUNT for answers in found.values())
    return found


@pytest.fixture(scope="module")
def url(model: VisMem) -> Iterator[str]:
    with served(create_app(Runtime(TorchExecutor(model.model)), "vismem")) as address:
        yield address


def lmdeploy(sample: Sample, name: str) -> dict[str, Any]:
    """What `run.py --base-url ... --model NAME --max-tokens N` sends."""
    return _request(sample, name, {}) | {"n": 1, "max_tokens": LIMIT, "temperature": 0.0}


def gpt4v(sample: Sample, name: str) -> dict[str, Any]:
    """What a `GPT4V` of `vlmeval/config.py` with `api_base` sends."""
    return _request(sample, name, {"detail": "low"}) | {"temperature": 0, "max_tokens": LIMIT}


def _request(sample: Sample, name: str, more: dict[str, str]) -> dict[str, Any]:
    image = {"url": f"data:image/jpeg;base64,{base64.b64encode(sample.images[0]).decode()}", **more}
    parts = [{"type": "image_url", "image_url": image}, {"type": "text", "text": sample.question}]
    return {"model": name, "messages": [{"role": "user", "content": parts}]}


@pytest.mark.parametrize("wrapper", [lmdeploy, gpt4v])
@pytest.mark.parametrize("arm", ARMS)
def test_a_wrapper_gets_the_answers_of_an_evaluation(
    arm: str, wrapper: Any, url: str, samples: list[Sample], expected: dict[str, list[Prediction]]
) -> None:
    with ThreadPoolExecutor(4) as pool:
        replies = list(
            pool.map(lambda sample: post(url, wrapper(sample, ARMS[arm]), Authorization="Bearer sk"), samples)
        )
    assert [status for status, _ in replies] == [200] * COUNT
    assert [reply["choices"][0]["message"]["content"] for _, reply in replies] == [a.text for a in expected[arm]]


def test_the_wrappers_default_of_tokens_is_refused_with_the_limit(url: str, samples: list[Sample]) -> None:
    status, reply = post(url, lmdeploy(samples[0], "vismem") | {"max_tokens": 16_384})
    assert (status, "2048" in reply["error"]["message"]) == (400, True)


@pytest.mark.skipif(PYTHON is None, reason="VLMEVALKIT_PYTHON names no Python that has VLMEvalKit")
def test_vlmevalkit_itself_scores_every_arm_as_an_evaluation(
    url: str, lmu: Path, expected: dict[str, list[Prediction]], tmp_path: Path
) -> None:
    command = [str(PYTHON), "-m", "vlmeval", "--data", BENCHMARK, "--model", *ARMS.values(), "--mode", "infer"]
    command += ["--base-url", f"{url}/v1", "--max-tokens", str(LIMIT), "--work-dir", str(tmp_path)]
    environment = os.environ | {"LMUData": str(lmu), "PRED_FORMAT": "tsv", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    files = {arm: tmp_path / name / f"{name}_{BENCHMARK}.tsv" for arm, name in ARMS.items()}
    for arm, file in files.items():
        with file.open(newline="") as lines:
            said = [row["prediction"] for row in csv.DictReader(lines, delimiter="\t")]
        assert said == [answer.text.strip() for answer in expected[arm]]
        assert [(row.id, row.score) for row in read_scored(file)] == [(a.id, a.score) for a in expected[arm]]
    rows = compare(read_arms({arm: [file] for arm, file in files.items()}), seed=0, resamples=100)
    assert [row["n"] for row in rows] == [str(COUNT)] * len(ARMS)

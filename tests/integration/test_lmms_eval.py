"""lmms-eval scores our arms by its own rules, and they are the answers and scores of `vismem evaluate`."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from http_calls import served

pytest.importorskip("lmms_eval", reason="lmms-eval is heavy and no part of the development environment")

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from PIL import Image

from vismem.config import Config, EvaluateConfig
from vismem.data.sample import write_shards
from vismem.errors import UserError
from vismem.evaluation.arms import resolve_arms
from vismem.evaluation.decoding import decode
from vismem.evaluation.lmms import VisMemLmms, _settings
from vismem.evaluation.predictions import predict
from vismem.evaluation.scored import read_scored
from vismem.generation.torch_executor import TorchExecutor
from vismem.inference import VisMem
from vismem.records import VISMEM
from vismem.serving.answering import Runtime
from vismem.serving.http import create_app

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "assets" / "tiny-vlm-memory"
SAMPLES = tiny.samples()
ARMS = ("vanilla", "vismem", "short_only", "random_100")
LIMIT = 16  # tokens
TASK = """
task: tiny_scenes
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: "{shards}/*.parquet"}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function tiny_utils.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
process_results: !function tiny_utils.results
generation_kwargs: {{max_new_tokens: {limit}, temperature: 0, do_sample: false}}
metric_list: [{{metric: correct, aggregation: mean, higher_is_better: true}}]
"""
UTILS = """
import io
from PIL import Image
from vismem.data.sample import Sample
from vismem.evaluation.answers import score

def visual(doc):
    return [Image.open(io.BytesIO(data)) for data in doc["images"]]

def results(doc, said):
    asked = Sample(doc["id"], (), doc["question"], doc["answer"], choices=tuple(doc["choices"]))
    return {"correct": score(asked, said[0])}
"""


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_shards(SAMPLES, folder / "shards")
    (folder / "tiny_utils.py").write_text(UTILS)
    (folder / "tiny_scenes.yaml").write_text(TASK.format(shards=folder / "shards", limit=LIMIT))
    return folder


@pytest.fixture(scope="module")
def expected() -> dict[str, list[Any]]:
    """Arm -> its predictions, as `vismem evaluate` decodes and scores them."""
    arms, model = resolve_arms(ARMS), VisMem.from_pretrained(MODEL, "cpu").model
    config = Config(evaluate=EvaluateConfig(arms=ARMS, batch_size=4, max_new_tokens=LIMIT))
    runs = decode({"vismem": model}, arms, SAMPLES, config)
    return {
        name: [predict(sample, rollout) for sample, rollout in zip(SAMPLES, run.rollouts, strict=True)]
        for name, run in runs.items()
    }


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    model = VisMem.from_pretrained(MODEL, "cpu").model
    with served(create_app(Runtime(TorchExecutor(model)), "tiny")) as address:
        yield address


@pytest.mark.parametrize("over_http", [False, True])
@pytest.mark.parametrize("arm", [arm for arm in ARMS if not arm.startswith("random")])
def test_an_arm_has_the_answers_and_the_score_of_an_evaluation(
    arm: str, over_http: bool, tasks: Path, expected: dict[str, list[Any]], url: str
) -> None:
    name = "tiny" if arm == VISMEM else f"tiny-{arm}"
    http = f"model_version={name},base_url={url}/v1,api_key=none,num_concurrent=4"
    found = simple_evaluate(
        model="openai" if over_http else "vismem",
        model_args=http if over_http else f"pretrained={MODEL},arm={arm},device=cpu",
        tasks=["tiny_scenes"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=5,
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"]["tiny_scenes"], key=lambda sample: sample["doc_id"])
    answers = expected[arm]
    assert [sample["filtered_resps"][0] for sample in samples] == [answer.text for answer in answers]
    assert [sample["correct"] for sample in samples] == [answer.score for answer in answers]
    assert found["results"]["tiny_scenes"]["correct,none"] == pytest.approx(
        sum(answer.score for answer in answers) / len(answers)
    )
    assert 0 < sum(answer.score for answer in answers) < len(answers)


def test_the_arms_differ(expected: dict[str, list[Any]]) -> None:
    assert len({tuple(answer.text for answer in answers) for answers in expected.values()}) > 1


def test_the_command_finds_the_model_and_writes_what_it_answered(
    tasks: Path, expected: dict[str, list[Any]], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "lmms_eval", "--model", "vismem", "--batch_size", "8", "--log_samples"]
    command += ["--model_args", f"pretrained={MODEL},arm=vanilla,device=cpu", "--tasks", "tiny_scenes"]
    command += ["--include_path", str(tasks), "--output_path", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.rglob("*_samples_tiny_scenes.jsonl")
    assert {row.id: (row.score, row.reference) for row in read_scored(file)} == {
        f"tiny_scenes-{place}": (answer.score, answer.reference) for place, answer in enumerate(expected["vanilla"])
    }


class Asked:
    """A request of lmms-eval, and the document's messages."""

    def __init__(self, messages: list[dict[str, Any]], **settings: Any) -> None:
        self.args = ("", lambda doc: messages, settings, 0, "task", "test")


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


@pytest.fixture(scope="module")
def model() -> VisMemLmms:
    made = VisMemLmms(str(MODEL), device="cpu", batch_size="auto")
    made.task_dict = {"task": {"test": [None]}}
    return made


def test_conversations_keep_their_turns_and_the_places_of_their_images(model: VisMemLmms) -> None:
    picture = {"type": "image", "url": Image.new("RGB", (84, 84), "red")}
    turns = [
        {"role": "user", "content": [text("look:"), picture, text("which"), text("colour?")]},
        {"role": "assistant", "content": [text("red")]},
        {"role": "user", "content": [text("sure?"), picture]},
    ]
    sample = model._sample(Asked(turns))
    assert [turn.parts for turn in sample.chat] == [("look:", None, "which\ncolour?"), ("red",), ("sure?", None)]
    assert (sample.id, len(sample.images)) == ("task-0", 2)
    assert model._sample(Asked(turns)).id == "task-0 again 2"  # a repeat draws other numbers
    (answer,) = model.generate_until([Asked(turns, max_new_tokens=3)])
    assert answer.token_counts.output_tokens <= 3


def test_settings_of_a_task_are_obeyed_or_refused(model: VisMemLmms) -> None:
    assert _settings({"until": ["\n\n"], "top_p": 0.5, "num_beams": 1}) == (0, 0.0, ())
    assert _settings({"until": "STOP", "temperature": 0.7, "do_sample": False}) == (0, 0.0, ("STOP",))
    assert _settings({"temperature": 0.7, "do_sample": True, "max_new_tokens": 9}) == (9, 0.7, ())
    for settings, said in (
        ({"num_beams": 4}, "num_beams=4 is not supported: give --gen_kwargs num_beams=1"),
        ({"temperature": 1, "top_p": 0.9}, "top_p=0.9"),
    ):
        with pytest.raises(UserError, match=said):
            model.generate_until([Asked([], **settings)])
    question = [{"role": "user", "content": [{"type": "image", "url": SAMPLES[0].images[0]}, text("what is shown?")]}]
    (whole,) = model.generate_until([Asked(question, max_new_tokens=LIMIT)])
    middle = whole.text[len(whole.text) // 2 :]
    (cut,) = model.generate_until([Asked(question, max_new_tokens=LIMIT, until=[middle])])
    assert cut.text == whole.text.partition(middle)[0] != whole.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([{"type": "video", "url": "a.mp4"}, text("what?")], "task, document 0: video is not supported"),
        ([text("what?")], "task, document 0: IMAGE holds 0 images"),
        ([{"type": "image", "url": "none.png"}, text("what?")], "document 0: cannot read the image none.png"),
        ([{"type": "image", "url": SAMPLES[0].images[0]}, text("<m_I^s>")], "task, document 0: .*m_I"),
    ],
)
def test_a_question_that_cannot_be_asked_says_which(
    model: VisMemLmms, content: list[dict[str, Any]], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        model.generate_until([Asked([{"role": "user", "content": content}])])


def test_what_the_model_cannot_do_is_refused(model: VisMemLmms) -> None:
    assert get_model("vismem") is VisMemLmms
    with pytest.raises(UserError, match="scores no given answers"):
        model.loglikelihood([])
    with pytest.raises(UserError, match="takes no tasks of several rounds"):
        model.generate_until_multi_round([])
    for arm, said in (
        ("short_onli", "did you mean 'short_only'"),
        ("sft_lora", "arm=sft_lora: the trained model has vanilla, "),
    ):
        with pytest.raises(UserError, match=said):
            VisMemLmms(str(MODEL), arm=arm)

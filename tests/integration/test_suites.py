"""The paper's benchmarks from their files to their scores, without a judge and with one, stopped and resumed."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny
from suite_files import GOLD, REPLIES, write_files

from vismem import cli
from vismem.config import Config, EvaluateConfig, SuiteConfig
from vismem.data.benchmarks import BENCHMARKS, Benchmark
from vismem.data.sample import Sample
from vismem.errors import UserError
from vismem.evaluation import decoding as module
from vismem.evaluation.arms import Arm
from vismem.evaluation.predictions import predictions_file, read_predictions
from vismem.generation.types import Rollout
from vismem.launch import LaunchConfig, launch_step
from vismem.runtime.chat import IMAGE
from vismem.steps import run_step

CONFIG = Config(evaluate=EvaluateConfig(batch_size=2, max_new_tokens=4, bootstrap=100))
Asked = list[tuple[str, Sample]]  # arm and question, warm-up too
Judged = tuple[dict[str, Any], Path, Asked, list[dict[str, Any]]]
MEAN = "mean of those scored"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trained") / "stage2"
    tiny.vismem(tiny_base).save_pretrained(folder)
    return {"base": tiny_base, "stage2": folder}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("LMUData"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Every arm replies as `suite_files` has it; what was asked."""
    seen: Asked = []
    monkeypatch.setattr(module, "_answer", scripted(seen))
    return seen


def scripted(seen: Asked, most: float = float("inf")) -> Callable[..., module.Run]:
    """What answers in the model's place; after `most` questions it is killed."""

    def answer(model: object, arm: Arm, samples: Sequence[Sample], *_: object) -> module.Run:
        seen.extend((arm.name, sample) for sample in samples)
        if len(seen) > most:
            raise KeyboardInterrupt
        texts = [REPLIES[sample.id].get(arm.name, "no") for sample in samples]
        rows = zip(samples, texts, strict=True)
        return module.Run(
            [Rollout(sample.id, (1,), (True,), (0.0,), (), text, text, True, 1) for sample, text in rows], 0.1
        )

    return answer


def config_of(files: Path, **changes: Any) -> Config:
    return CONFIG.model_copy(update={"suite": SuiteConfig(data=files, **changes)})


@contextmanager
def judging(reply: Callable[[str, str], str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An endpoint that replies `reply(reference, answer)`: its address, and the requests that it got."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(request | {"path": self.path, "key": self.headers.get("Authorization")})
            prompt = request["messages"][0]["content"]
            reference, answer = prompt.split("Reference: ")[1].removesuffix("\nScore:").split("\nAnswer: ")
            body = json.dumps({"choices": [{"message": {"content": reply(reference, answer)}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", requests
        finally:
            server.shutdown()
            thread.join()


def rows_of(artifacts: Path) -> dict[str, Any]:
    """The rows of `suite.json` by name."""
    return {row["name"]: row for row in json.loads((artifacts / "suite" / "suite.json").read_text())}


def by_rule(reference: str, answer: str) -> str:
    parts = reference.split("<AND>")
    found = [any(one in answer for one in part.split("<OR>")) for part in parts]
    return f"{sum(found) / len(parts)}\n"


def figures(out: Path) -> dict[str, Any]:
    """`metrics.json` and `suite.json` but for the times."""
    metrics = json.loads((out / "metrics.json").read_text())
    del metrics["overhead"]
    for arm in metrics["arms"].values():
        del arm["seconds_per_sample"]
    return metrics | {"suite": json.loads((out / "suite.json").read_text())}


@pytest.fixture(scope="module")
def judged(inputs: dict[str, Path], files: Path, tmp_path_factory: pytest.TempPathFactory) -> Judged:
    """Asked without a judge, then scored with one: its rows, its artifacts, what was asked, the judge's requests."""
    artifacts = tmp_path_factory.mktemp("artifacts")
    with pytest.MonkeyPatch.context() as patch, judging(by_rule) as (url, requests):
        patch.setenv("VISMEM_JUDGE_KEY", "secret")
        patch.setattr(module, "_answer", scripted(asked := []))
        line = run_step("suite", config_of(files), artifacts, inputs)
        assert "MMVet: not scored: a judge model scores it: name one with suite.judge_url and suite.judge_model" in line
        assert set(rows_of(artifacts)[MEAN]["scores"]) == {"vanilla", "vismem"}
        whole = len(asked)
        for _ in range(2):
            run_step("suite", config_of(files, judge_url=url, judge_model="judge-2"), artifacts, inputs)
        assert len(asked) == whole, "no question was asked again"
    return rows_of(artifacts), artifacts, asked, requests


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_from_the_published_layout_to_the_score_worked_out_by_hand(judged: Judged, benchmark: Benchmark) -> None:
    rows, artifacts, asked, _ = judged
    found = rows[benchmark.name]
    assert found["paper"] == {"vanilla": benchmark.vanilla, "vismem": benchmark.vismem}
    if benchmark.unsupported:
        assert (found["why"], found["scores"]) == (f"not supported: {benchmark.unsupported}", {})
        return
    gold = GOLD[benchmark.file]
    assert found["why"] == ""
    assert tuple(found["scores"].values()) == pytest.approx(gold.scores)
    assert found["left_out"] == gold.left_out
    assert found["n"] == len(gold.rows) - sum(gold.left_out.values())
    first = next(sample for _, sample in asked if sample.source == benchmark.file)
    (turn,) = first.turns()
    assert "".join("<image>" if part is IMAGE else part for part in turn.parts).endswith(gold.first)
    answers = read_predictions(predictions_file(artifacts / "suite", "vanilla"))
    assert {answer.capability for answer in answers if answer.source == benchmark.file} == {benchmark.capability}


def test_means_weigh_benchmarks_alike_and_the_page_has_the_paper_s_beside_them(
    judged: Judged,
) -> None:
    rows, artifacts, *_ = judged
    scored = [benchmark for benchmark in BENCHMARKS if benchmark.file]
    means = [sum(GOLD[benchmark.file].scores[arm] for benchmark in scored) / 10 for arm in (0, 1)]
    assert tuple(rows[MEAN]["scores"].values()) == pytest.approx(means)
    assert rows[MEAN]["paper"]["vismem"] == pytest.approx(sum(benchmark.vismem for benchmark in scored) / 10)
    page = (artifacts / "suite" / "report.html").read_text()
    for said in ("<small>paper 59.6</small>", "1 left out: part dev", "not supported: a toolbox"):
        assert said in page
    assert sorted(path.name for path in artifacts.iterdir()) == ["suite", "suite_store"]
    assert not (artifacts / "suite_store" / "data").exists()


def test_a_judge_gets_each_request_once_with_its_key(
    judged: Judged,
) -> None:
    *_, requests = judged
    assert len(requests) == 8, "two benchmarks of two questions, two arms"
    assert {request["path"] for request in requests} == {"/v1/chat/completions"}
    assert {(request["model"], request["key"]) for request in requests} == {("judge-2", "Bearer secret")}


def test_a_verdict_that_cannot_be_read_counts_as_unparsed(
    inputs: dict[str, Path], files: Path, tmp_path: Path, asked: Asked
) -> None:
    with judging(lambda reference, answer: "I think 0.5 or 1.0" if "kitten" in answer else "1.0") as (url, _):
        run_step("suite", config_of(files, judge_url=url, judge_model="m"), tmp_path, inputs)
    found = [p for p in read_predictions(predictions_file(tmp_path / "suite", "vismem")) if p.source == "MMVet"]
    assert [(p.rule, p.score) for p in found] == [("judge", 1.0), ("unparsed", 0.0)]


def test_a_judge_that_is_not_there_leaves_the_others_scores(
    inputs: dict[str, Path], files: Path, tmp_path: Path, asked: Asked
) -> None:
    config = config_of(files, judge_url="http://127.0.0.1:9/v1", judge_model="m")
    assert "MMVet: not scored: the judge at http://127.0.0.1:9/v1/chat" in run_step("suite", config, tmp_path, inputs)
    assert rows_of(tmp_path)["MMStar"]["scores"] == {"vanilla": 50.0, "vismem": 75.0}


def test_a_killed_suite_resumes_and_ends_like_an_unbroken_one(
    inputs: dict[str, Path], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: Asked = []
    monkeypatch.setattr(module, "_answer", scripted(whole))
    run_step("suite", config_of(files), tmp_path / "whole", inputs)
    monkeypatch.setattr(module, "KEEP_EVERY", 0.0)
    first: Asked = []
    monkeypatch.setattr(module, "_answer", scripted(first, most=len(whole) // 2))
    with pytest.raises(KeyboardInterrupt):
        run_step("suite", config_of(files), tmp_path, inputs)
    assert not (tmp_path / "suite").exists()
    rest: Asked = []
    monkeypatch.setattr(module, "_answer", scripted(rest))
    run_step("suite", config_of(files), tmp_path, inputs)
    assert len(rest) < len(whole) * 2 / 3
    assert figures(tmp_path / "suite") == figures(tmp_path / "whole" / "suite")
    for arm in ("vanilla", "vismem"):
        again, unbroken = (read_predictions(predictions_file(f / "suite", arm)) for f in (tmp_path, tmp_path / "whole"))
        assert again == unbroken


def test_another_arm_answers_alone_and_another_model_s_answers_are_its_own(
    inputs: dict[str, Path], files: Path, tmp_path: Path, asked: Asked, tiny_base: Path
) -> None:
    run_step("suite", config_of(files), tmp_path, inputs)
    asked.clear()
    run_step("suite", config_of(files, arms=("vanilla", "vismem", "short_only")), tmp_path, inputs)
    assert {arm for arm, _ in asked} == {"short_only"}
    assert set(rows_of(tmp_path)[MEAN]["scores"]) == {"vanilla", "vismem", "short_only"}
    other = config_of(files).model_copy(update={"base": CONFIG.base.model_copy(update={"dtype": "bfloat16"})})
    run_step("suite", other, tmp_path, inputs)
    assert {arm for arm, _ in asked} == {"short_only", "vanilla", "vismem"}, "another precision is another model"
    asked.clear()
    tiny.vismem(tiny_base, seed=5).save_pretrained(tmp_path / "other")
    run_step("suite", config_of(files), tmp_path, inputs | {"stage2": tmp_path / "other"})
    assert {arm for arm, _ in asked} == {"vanilla", "vismem"}


def test_two_processes_ask_as_one_does(inputs: dict[str, Path], files: Path, tmp_path: Path) -> None:
    launched = launch_step("suite", config_of(files), tmp_path / "two", inputs, LaunchConfig("torchrun", 2))
    assert launched == run_step("suite", config_of(files), tmp_path, inputs)
    assert figures(tmp_path / "two" / "suite") == figures(tmp_path / "suite")


def test_a_missing_or_broken_file_is_named_and_the_others_go_on(
    inputs: dict[str, Path], files: Path, tmp_path: Path, asked: Asked
) -> None:
    own = tmp_path / "LMUData"
    shutil.copytree(files, own)
    (own / "MMStar.tsv").unlink()
    (own / "BLINK.tsv").write_text("index\tquestion\tanswer\timage\n6\tWhich?\tA\t\n7\tWhich?\tA\t" + "no base64 " * 9)
    (own / "LogicVista.tsv").write_text("index\tquestion\tanswer\n")
    (own / "MUIRBench.tsv").write_text("index\tquestion\n7\tWhich?\n")
    (own / "HallusionBench.tsv").write_text((files / "MMStar.tsv").read_text())
    (own / "images" / "MV-MATH" / "b_3.jpg").unlink()
    run_step("suite", config_of(own), tmp_path, inputs)
    found = rows_of(tmp_path)
    for name, said in {
        "MMStar": "MMStar.tsv: download it with VLMEvalKit",
        "BLINK": "BLINK.tsv, row 7: `image` is neither base64",
        "LogicVista": "not asked: its file has no rows",
        "MUIRBench": "MUIRBench.tsv: no column answer",
        "HallusionBench": "4 rows: an answer of another kind (choice)",
        "MV-Math": "MV-MATH.tsv, row 1110: ",
    }.items():
        assert said in found[name]["why"], name
        assert found[name]["scores"] == {}
    assert found["MMMU"]["scores"] == {"vanilla": 50.0, "vismem": 75.0}


def test_what_cannot_be_asked_at_all_is_an_error(inputs: dict[str, Path], tmp_path: Path, files: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no benchmark can be scored:\nMMStar: not asked: no .*MMStar\.tsv"):
        run_step("suite", config_of(tmp_path / "empty"), tmp_path, inputs)
    with pytest.raises(UserError, match=r"suite\.data: no folder .*gone"):
        run_step("suite", config_of(tmp_path / "gone"), tmp_path, inputs)
    with pytest.raises(UserError, match="sft_lora decodes another model"):
        run_step("suite", config_of(files, arms=("vanilla", "sft_lora")), tmp_path, inputs)


def test_the_command_asks_a_model_by_its_name_without_parameters(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shipped model really answers, each benchmark's first pictures, several at once among them."""
    monkeypatch.chdir(tmp_path)
    suite = ("evaluate", "--suite", "paper", "--data", str(files), "--limit", "1")
    assert cli.main([*suite, "--model", "assets/tiny-vlm-memory"]) == 0
    said = capsys.readouterr().out
    assert "of 8 test questions" in said
    assert "mean of those scored: vanilla " in said
    asked = [name for name, row in rows_of(Path("artifacts")).items() if row["n"] == 1]
    assert asked == [benchmark.name for benchmark in BENCHMARKS if benchmark.file and not benchmark.judge]
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--limit", "1"])
    assert "--data, --limit, --model and --base go with --suite" in capsys.readouterr().err

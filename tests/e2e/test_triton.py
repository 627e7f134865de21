"""A real tritonserver with a stand-in runtime: what clients see of answers, faults, cancellation and the end."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import yaml
from PIL import Image

from vismem.config import parse_config
from vismem.data.sample import Sample, write_shards
from vismem.errors import UserError
from vismem.export.triton import write_model_repository
from vismem.provenance import write_manifest
from vismem.records import Release
from vismem.serving import deploy as deploy_step
from vismem.serving.client import Token, infer, main_infer, marked, plain
from vismem.serving.environment import DEFAULT_PYTHON, VARIABLE, find_serving_environment
from vismem.serving.probe import main as probe
from vismem.serving.server import TritonServer, serve

ROOT = Path(__file__).parents[2]
STAND_IN = """
import json, os, time
from dataclasses import dataclass

@dataclass(frozen=True)
class Chunk:
    text: str
    event: str

class Runtime:
    def __init__(self, bundle, threads=1):
        self.word = (bundle / "word.txt").read_text()
        self.left = 0  # answers that were given up half way
        self.asked = 0

    def generate(self, images, prompt, *, max_new_tokens=48, temperature=0.0, seed=0, memory=True):
        if prompt == "echo":
            sizes = [image.size for image in images]
            yield Chunk(json.dumps([sizes, max_new_tokens, temperature, seed, memory]), "token")
            return
        if prompt == "nothing":
            yield Chunk("", "end")
            return
        if prompt == "count":
            self.asked += 1
            yield Chunk(str(self.asked), "token")
            return
        if prompt == "left":
            yield Chunk(str(self.left), "token")
            return
        try:
            for i in range(max_new_tokens):
                if i == 1 and memory:
                    yield Chunk("", "short")
                if i == 2 and prompt == "fail":
                    raise RuntimeError("as asked")
                if i == 2 and prompt == "die":
                    os._exit(1)
                time.sleep(0.02 if prompt == "endless" else 0)
                yield Chunk(f" {self.word}{i}", "token")
            yield Chunk("", "end")
        except GeneratorExit:
            self.left += 1
            raise
"""
ANSWER = (Token(" é0", "token"), Token("", "short"), Token(" é1", "token"), Token(" é2", "token"), Token("", "end"))


def png(width: int = 30, height: int = 20) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


IMAGE = png()


def make_repository(folder: Path, name: str = "vismem", runtime: str = STAND_IN) -> Path:
    """A repository with the stand-in runtime, moved after it was written, as a step's output is."""
    bundle, package = folder / "bundle", folder / "runtime"
    bundle.mkdir(parents=True)
    package.mkdir()
    (bundle / "word.txt").write_text("é")
    write_manifest(bundle)
    (package / "__init__.py").write_text(runtime)
    write_model_repository(bundle, folder / "partial", name, 7, runtime=package)
    return (folder / "partial").rename(folder / "model_repository")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    if not DEFAULT_PYTHON.exists() and VARIABLE not in os.environ:
        pytest.fail(f"{DEFAULT_PYTHON} is missing: run `make serving`")
    folder = tmp_path_factory.mktemp("triton")
    with TritonServer(make_repository(folder), log=folder / "server.log") as running:
        yield running


def living(group: int) -> list[int]:
    """Process ids of a process group, those that have ended and only wait to be reaped left out."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, leader = status.read_text().rpartition(") ")[2].split()[:3]
        except OSError:  # ended meanwhile
            continue
        if int(leader) == group and state not in "ZX":
            found.append(int(status.parent.name))
    return found


def ask(server: TritonServer, prompt: str = "hi", **options: object) -> tuple[Token, ...]:
    options = {"images": [IMAGE], "max_new_tokens": 3, "timeout": 20} | options
    images = options.pop("images")
    return tuple(infer(server.grpc_url, "vismem", images, prompt, **options))  # type: ignore[arg-type]


def test_a_stream_brings_each_piece_with_its_event(server: TritonServer) -> None:
    assert ask(server) == ANSWER
    assert plain(ANSWER) == "é0 é1 é2"
    assert marked(ANSWER) == "é0⟨short⟩ é1 é2"


def test_a_collected_answer_equals_the_streamed_one(server: TritonServer) -> None:
    assert ask(server, stream=False) == ANSWER


def test_every_input_reaches_the_runtime(server: TritonServer) -> None:
    options = {"max_new_tokens": 5, "temperature": 0.5, "seed": 2**40, "memory": False}
    (token,) = ask(server, "echo", images=[png(30, 20), png(8, 9)], **options)
    assert json.loads(token.text) == [[[30, 20], [8, 9]], 5, 0.5, 2**40, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": [IMAGE, IMAGE[:60]]}, r"image 2 of 2 \(60 bytes\) does not decode"),
        ({"images": [b"GIF89a?"]}, r"image 1 of 1 \(7 bytes\) does not decode"),
        ({"images": []}, "IMAGE holds 0 images: send 1 to 64"),
        ({"prompt": " \n"}, "PROMPT is empty"),
        ({"max_new_tokens": 0}, r"MAX_NEW_TOKENS is 0: it must lie in 1\.\."),
        ({"temperature": float("nan")}, "TEMPERATURE is nan"),
        ({"seed": -1}, "SEED is -1"),
    ],
)
def test_a_bad_request_is_refused_with_its_reason_and_the_server_answers_on(
    options: dict[str, object], message: str, server: TritonServer
) -> None:
    for stream in (True, False):
        with pytest.raises(UserError, match=message):
            ask(server, **options, stream=stream)  # type: ignore[arg-type]
    assert ask(server) == ANSWER


def test_a_fault_in_the_middle_of_an_answer_ends_that_answer_only(server: TritonServer) -> None:
    pieces = infer(server.grpc_url, "vismem", [IMAGE], "fail")
    assert [next(pieces), next(pieces), next(pieces)] == list(ANSWER[:3])
    with pytest.raises(UserError, match="the model failed: RuntimeError: as asked"):
        next(pieces)
    assert ask(server) == ANSWER


def test_closing_a_stream_stops_its_answer_on_the_server(server: TritonServer) -> None:
    before = int(plain(ask(server, "left")))
    pieces = endless(server)
    assert next(pieces) == ANSWER[0]
    pieces.close()  # type: ignore[attr-defined]
    assert left_at_last(server, before + 1) == before + 1


def test_a_killed_client_stops_its_answer_on_the_server(server: TritonServer) -> None:
    before = int(plain(ask(server, "left")))
    code = (
        "import sys; from vismem.serving.client import infer\n"
        f"for token in infer({server.grpc_url!r}, 'vismem', [bytes.fromhex({IMAGE.hex()!r})], 'endless', "
        "max_new_tokens=8000): print(token.text, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == " é0\n"
        client.kill()
    assert left_at_last(server, before + 1) == before + 1


def left_at_last(server: TritonServer, awaited: int) -> int:
    """How many answers were given up half way, asked again for a while until it is the awaited number."""
    for _ in range(200):
        if (left := int(plain(ask(server, "left")))) == awaited:
            break
        time.sleep(0.05)
    return left


def endless(server: TritonServer) -> Iterator[Token]:
    return infer(server.grpc_url, "vismem", [IMAGE], "endless", max_new_tokens=8000)


def test_two_answers_are_decoded_side_by_side_and_a_third_waits_until_one_ends(server: TritonServer) -> None:
    with contextlib.closing(endless(server)) as first, contextlib.closing(endless(server)) as second:  # type: ignore[type-var]
        assert [next(first), next(second), next(first), next(second)] == [*ANSWER[:1] * 2, *ANSWER[1:2] * 2]
        with pytest.raises(UserError, match=r"sent nothing for 0.3 s: it may be busy or dead"):
            ask(server, timeout=0.3)
        first.close()  # type: ignore[attr-defined]
        assert ask(server) == ANSWER
        assert next(second) == ANSWER[2]


def test_an_unknown_model_is_reported(server: TritonServer) -> None:
    with pytest.raises(UserError, match="has no model 'other' ready"):
        next(infer(server.grpc_url, "other", [IMAGE], "hi"))


def test_serving_leaves_the_repository_as_it_was_written(server: TritonServer) -> None:
    ask(server)
    names = {path.name for path in server.repository.rglob("*")}
    assert names == {
        *("vismem", "config.pbtxt", "7", "model.py", "serving", "runtime", "__init__.py"),
        *("bundle", "manifest.json", "word.txt"),
    }


def test_a_port_in_use_is_named_with_its_flag(server: TritonServer, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        second = TritonServer(server.repository, log=tmp_path / "log", http_port=port)
        with pytest.raises(UserError, match=rf"port {port} .*in use.*--http-port \(deploy.http_port"), second:
            pass
    assert not (tmp_path / "log").exists()


def test_infer_prints_the_answer_with_its_memories_marked(server: TritonServer, tmp_path: Path) -> None:
    config = parse_config({"deploy": {"grpc_port": server.ports["grpc"]}})
    (tmp_path / "a.png").write_bytes(IMAGE)
    for stream in (False, True):
        written: list[str] = []
        main_infer(config, [tmp_path / "a.png"], "hi", stream=stream, max_new_tokens=3, write=written.append)
        assert "".join(written).strip() == "é0⟨short⟩ é1 é2"
        assert len(written) == (len(ANSWER) + 1 if stream else 1)


def test_infer_names_an_image_that_is_not_there(server: TritonServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the image .*none.png: No such file"):
        main_infer(parse_config({}), [tmp_path / "none.png"], "hi", url=server.grpc_url)


def test_infer_without_a_server_says_how_to_start_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "a.png").write_bytes(IMAGE)
    with pytest.raises(UserError, match=rf"no model server answers at 127.0.0.1:{port}: start one with `vismem serve`"):
        main_infer(parse_config({"deploy": {"grpc_port": port}}), [tmp_path / "a.png"], "hi")


def test_a_model_process_that_dies_is_reported_and_the_server_can_still_be_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with TritonServer(make_repository(tmp_path), log=tmp_path / "log", exit_timeout=1) as server:
        group = server.service.process.pid
        with pytest.raises(UserError, match=r"sent nothing for 2 s|is not healthy"):
            ask(server, "die", timeout=2)
        with pytest.raises(UserError, match="restart `vismem serve`"):
            ask(server, timeout=2)
        assert says_ready(server)  # for ever: hence the probe
        assert probe([*probed(server), "--timeout", "2"]) == 1
        assert "is not healthy" in capsys.readouterr().err
    assert living(group) == []


def probed(server: TritonServer) -> list[str]:
    """Options of the probe; in a pod the ports are its defaults."""
    return ["--url", server.grpc_url, "--metrics", f"http://127.0.0.1:{server.ports['metrics']}/metrics"]


def pending(server: TritonServer) -> int:
    """How many questions wait in Triton's queue."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.ports['metrics']}/metrics", timeout=10) as reply:
        (count,) = re.findall(r"^nv_inference_pending_request_count\{.*\} (\d+)", reply.read().decode(), re.MULTILINE)
    return int(count)


def says_ready(server: TritonServer) -> bool:
    import tritonclient.grpc as triton

    with triton.InferenceServerClient(server.grpc_url) as client:
        return bool(client.is_server_ready() and client.is_model_ready("vismem"))


def test_the_probes_of_a_pod_find_a_living_server_well_with_what_the_serving_image_has(server: TritonServer) -> None:
    deployments = yaml.safe_load_all((ROOT / "deploy" / "kubernetes" / "base" / "triton.yaml").read_text())
    (triton,) = (d["spec"]["template"]["spec"]["containers"][0] for d in deployments if d["kind"] == "Deployment")
    environment = find_serving_environment()
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        command = [str(environment.python), *triton[name]["exec"]["command"][1:], *probed(server)]
        variables = {**environment.variables(), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "vismem answers\n", "")


def test_a_server_that_is_busy_with_others_is_not_taken_for_a_dead_one(
    server: TritonServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Thirty answers of a sixth of a second, two at a time: in a second some begin, and ours waits behind them."""
    with ThreadPoolExecutor(30) as clients:
        with contextlib.closing(endless(server)) as first, contextlib.closing(endless(server)) as second:  # type: ignore[type-var]
            assert [next(first), next(second)] == [ANSWER[0]] * 2  # both workers are taken
            for _ in range(30):
                clients.submit(ask, server, "endless", max_new_tokens=8, timeout=120)
            while pending(server) < 29:  # the model holds one already
                time.sleep(0.01)
        assert probe([*probed(server), "--timeout", "1"]) == 0
        assert "vismem is busy: " in capsys.readouterr().out
    assert probe(probed(server)) == 0
    assert capsys.readouterr().out == "vismem answers\n"


def test_a_server_that_answers_nobody_is_not_excused_as_busy(server: TritonServer) -> None:
    with contextlib.closing(endless(server)) as first, contextlib.closing(endless(server)) as second:  # type: ignore[type-var]
        assert [next(first), next(second)] == [ANSWER[0]] * 2
        assert probe([*probed(server), "--timeout", "0.5"]) == 1


def test_the_probe_says_that_no_server_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert probe(["--url", "127.0.0.1:9", "--metrics", "http://127.0.0.1:9/metrics"]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_the_series_that_the_autoscaler_reads_are_those_of_the_server(server: TritonServer) -> None:
    ask(server)
    rules = (ROOT / "deploy" / "kubernetes" / "prometheus-adapter.yaml").read_text()
    with urllib.request.urlopen(f"http://127.0.0.1:{server.ports['metrics']}/metrics", timeout=10) as reply:
        offered = reply.read().decode()
    asked = set(re.findall(r"nv_\w+(?=\{)", rules))
    assert len(asked) == 3
    for name in asked:
        assert f'\n{name}{{model="vismem",version="7"}} ' in offered


def test_a_model_that_does_not_load_ends_the_start_with_its_reason(tmp_path: Path) -> None:
    repository = make_repository(tmp_path, runtime="raise ImportError('no such part')")
    with (
        pytest.raises(UserError, match=rf"version 7: .*ImportError: no such part; its log is {tmp_path}/log"),
        TritonServer(repository, log=tmp_path / "log"),
    ):
        pass


def test_serve_runs_in_the_foreground_until_it_is_told_to_stop(tmp_path: Path) -> None:
    repository = make_repository(tmp_path, name="vismem_challenger")
    code = (
        "from pathlib import Path; from vismem.config import parse_config; from vismem.serving.server import serve\n"
        f"serve(parse_config({{}}), Path({str(repository)!r}), log=Path({str(tmp_path / 'log')!r}), grpc_port=0, "
        "http_port=0, metrics_port=0, write=lambda line: print(line, flush=True))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving vismem_challenger on gRPC 127.0.0.1:")
        url = line.split()[4]
        (tmp_path / "a.png").write_bytes(IMAGE)
        written: list[str] = []
        main_infer(parse_config({}), [tmp_path / "a.png"], "hi", url=url, max_new_tokens=1, write=written.append)
        assert written == ["é0\n"]
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read().splitlines()[-1] == "stopped"
    assert process.returncode == 0
    with pytest.raises(UserError, match="no model server answers"):
        next(infer(url, "vismem_challenger", [IMAGE], "hi"))


def test_serve_without_a_repository_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none is not there: run `vismem deploy`"):
        serve(parse_config({}), tmp_path / "none")
    with pytest.raises(UserError, match="holds no model"):
        serve(parse_config({}), tmp_path)


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("/nonexistent/python", "/nonexistent/python, and it is not there: run `make serving`"),
        (sys.executable, "no nvidia-pytriton"),
    ],
)
def test_a_serving_environment_without_triton_is_reported(
    python: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, python)
    with pytest.raises(UserError, match=message):
        find_serving_environment()


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Outputs of export, promote and validate, the smallest that deploy reads; the runtime is the stand-in."""
    make_repository(tmp_path / "made")
    runtime = tmp_path / "made" / "runtime"
    monkeypatch.setattr(deploy_step, "write_model_repository", partial(write_model_repository, runtime=runtime))
    rows = [Sample(id=str(i), images=(IMAGE,), question=f"question {i}", answer=str(i)) for i in range(3)]
    write_shards(rows, tmp_path / "validate" / "data" / "test")
    (tmp_path / "promote").mkdir()
    return {"export": tmp_path / "made" / "bundle", "promote": tmp_path / "promote", "validate": tmp_path / "validate"}


def test_deploy_serves_a_refused_version_as_challenger_and_says_so(inputs: dict[str, Path], tmp_path: Path) -> None:
    refused = {"promoted": False, "reasons": ("gain 0.2 is below 1.0",)}
    Release(name="vismem", version="4", model_id="m-1", previous=None, **refused).write(inputs["promote"])
    line = deploy_step.deploy(parse_config({}), inputs, tmp_path / "out")
    assert line.startswith(
        "NOT released, the gate refused version 4 (gain 0.2 is below 1.0): deployed as vismem_challenger"
    )
    assert (tmp_path / "out" / "model_repository" / "vismem_challenger" / "4" / "model.py").is_file()
    smoke = json.loads((tmp_path / "out" / "smoke.json").read_text())
    assert (smoke["model"], smoke["version"], smoke["promoted"], smoke["items"]) == ("vismem_challenger", 4, False, 3)
    assert smoke["question"] == "question 0"
    assert smoke["answer_marked"].startswith("é0⟨short⟩ é1 é2")
    assert smoke["answer"].startswith("é0 é1 é2")
    assert smoke["reference"] == "0"


def test_deploy_serves_a_released_version_under_the_models_name(
    server: TritonServer, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = {"promoted": True, "reasons": ()}
    Release(name="vismem", version="5", model_id="m-1", previous=None, **passed).write(inputs["promote"])
    (tmp_path / "out" / "model_repository" / "half").mkdir(parents=True)  # left by a killed run
    running = contextlib.nullcontext(server)  # the one that runs already: a second start shows nothing new
    monkeypatch.setattr(deploy_step, "TritonServer", lambda repository, log: running)
    line = deploy_step.deploy(parse_config({}), inputs, tmp_path / "out")
    assert line.startswith("deployed vismem version 5: 3 questions answered over gRPC")
    assert [path.name for path in (tmp_path / "out" / "model_repository").iterdir()] == ["vismem"]


def test_the_smoke_test_fails_on_an_empty_answer(server: TritonServer) -> None:
    sample = Sample(id="s1", images=(IMAGE,), question="nothing", answer="1")
    with pytest.raises(UserError, match=r"smoke test: vismem gave an empty answer to 'nothing' \(s1\)"):
        deploy_step.smoke_test(server.grpc_url, "vismem", [sample])


def test_the_smoke_test_fails_where_two_answers_to_one_question_differ(server: TritonServer) -> None:
    sample = Sample(id="s2", images=(IMAGE,), question="count", answer="1")
    with pytest.raises(UserError, match=r"streamed and collected answers of vismem differ for s2: '\d' against '\d'"):
        deploy_step.smoke_test(server.grpc_url, "vismem", [sample])

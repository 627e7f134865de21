"""`vismem serve` and `vismem infer` on a real tritonserver: what people see of its start, its end and its faults."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from stand_in import ANSWER, IMAGE, make_repository

from vismem.cli import main
from vismem.config import parse_config
from vismem.errors import UserError
from vismem.serving.client import Client, main_infer
from vismem.serving.environment import TRITON_VARIABLE, VARIABLE, find_serving_environment
from vismem.serving.server import TritonServer, triton_server
from vismem.serving.supervise import serve


def test_a_port_in_use_is_named_with_its_flag(server: TritonServer, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        second = triton_server(server.repository, log=tmp_path / "log", ports={"http": port})
        with pytest.raises(UserError, match=rf"port {port} .*in use.*--http-port \(deploy.http_port"), second:
            pass
    assert not (tmp_path / "log").exists()


def test_infer_prints_the_answer_with_its_memories_marked(server: TritonServer, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(IMAGE)
    for stream in (False, True):
        written: list[str] = []
        main_infer(
            [f"{tmp_path}/a.png"], "hi", url=server.grpc_url, stream=stream, max_new_tokens=3, write=written.append
        )
        assert "".join(written).strip() == "é0⟨short⟩ é1 é2"
        assert len(written) == (len(ANSWER) + 1 if stream else 1)


def test_infer_works_from_an_empty_folder_with_nothing_but_an_address(
    server: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And passes sampling options on, which the server checks as it checks those of any client."""
    (tmp_path / "a.png").write_bytes(IMAGE)
    monkeypatch.chdir(tmp_path)
    asked = ("infer", "--url", server.grpc_url, "--image", "a.png", "--max-new-tokens", "3")
    for question in (("hi",), ("--prompt", "hi")):
        assert main([*asked, *question]) == 0
        assert capsys.readouterr().out == "é0⟨short⟩ é1 é2\n"
    for option, value in (("--temperature", "101"), ("--model", "other"), ("--seed", str(2**63))):
        assert main([*asked, "hi", option, value]) == 1
        assert value in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png"]


def test_infer_names_an_image_that_is_not_there(server: TritonServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the image .*none.png: No such file"):
        main_infer([f"{tmp_path}/none.png"], "hi", url=server.grpc_url)


def test_infer_without_a_server_says_how_to_start_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "a.png").write_bytes(IMAGE)
    with pytest.raises(UserError, match=rf"no model server answers at 127.0.0.1:{port}: start one with `vismem serve`"):
        main_infer([f"{tmp_path}/a.png"], "hi", url=f"127.0.0.1:{port}")


def test_a_model_that_does_not_load_ends_the_start_with_its_reason(tmp_path: Path) -> None:
    repository = make_repository(tmp_path, runtime="raise ImportError('no such part')")
    with (
        pytest.raises(UserError, match=rf"version 7: .*ImportError: no such part; its log is {tmp_path}/log"),
        triton_server(repository, log=tmp_path / "log"),
    ):
        pass


def test_serve_runs_in_the_foreground_until_it_is_told_to_stop(tmp_path: Path) -> None:
    repository = make_repository(tmp_path, name="vismem_challenger")
    code = (
        "from pathlib import Path; from vismem.config import parse_config; from vismem.serving.supervise import serve\n"
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
        main_infer([f"{tmp_path}/a.png"], "hi", url=url, max_new_tokens=1, write=written.append)
        assert written == ["é0\n"]
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read().splitlines()[-1] == "stopped"
    assert process.returncode == 0
    with pytest.raises(UserError, match="no model server answers"):
        Client(f"grpc://{url}", model="vismem_challenger").ask([IMAGE], "hi")


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


def test_a_triton_of_nvidia_s_image_runs_with_the_stub_that_lies_in_its_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layout, made of the wheel's parts."""
    wheel, home = find_serving_environment(), tmp_path / "tritonserver"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "tritonserver").symlink_to(wheel.binary)
    (home / "lib").symlink_to(wheel.libraries[0])
    wheel.make_backend_folder(home / "backends")
    monkeypatch.setenv(TRITON_VARIABLE, str(home))
    assert find_serving_environment().stub.parent == home / "backends" / "python"
    with triton_server(make_repository(tmp_path), log=tmp_path / "log") as server:
        assert str(home) in Path(f"/proc/{server.service.process.pid}/cmdline").read_text()
    (home / "backends" / "python" / "triton_python_backend_stub").unlink()
    with pytest.raises(UserError, match="backend_stub is missing from the Triton that VISMEM_TRITON names"):
        find_serving_environment()

"""A real tritonserver with a certificate and a token: who may read, and who may ask."""

import base64
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import tritonclient.grpc as triton
from certificates import write_pair
from stand_in import ANSWER, IMAGE, make_repository
from test_triton_admin import by_hand, send
from test_triton_unary import inputs, post
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from vismem.cli import main
from vismem.config import parse_config
from vismem.errors import UserError
from vismem.files import read_json, write_json
from vismem.runtime.access import TOKEN_VARIABLE
from vismem.serving.client import Client, own_client
from vismem.serving.exchange import DisconnectedError, UnauthorizedError
from vismem.serving.probe import probe
from vismem.serving.repository import check_repository
from vismem.serving.server import TritonServer, triton_server

TOKEN = "s3cret"
WRONG = ["", "S3cret", "s3cre", "s3cret2", "sécret", "Bearer s3cret"]
PATHS = ("vismem_unary/generate", "vismem/generate_stream", "vismem_unary/infer")
IMPATIENT = """
import sys
from vismem.cli import main
from vismem.serving import supervise
supervise.CHECK_SECONDS, supervise.PATIENCE = 0.2, 1.0
sys.exit(main(sys.argv[1:]))
"""
ASKED = {"IMAGE": [base64.b64encode(IMAGE).decode()], "PROMPT": ["hi"]}
INFER = {"inputs": [{"name": n, "datatype": "BYTES", "shape": [1], "data": v} for n, v in ASKED.items()]}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def server(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TOKEN_VARIABLE, TOKEN)  # of the server, and of the one who starts it
        repository = make_repository(folder)
        with triton_server(repository, log=folder / "server.log", host="0.0.0.0", tls=pair) as running:
            patch.delenv(TOKEN_VARIABLE)
            yield running


@pytest.fixture
def trusted(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(pair[0]))


def unary(server: TritonServer, pair: tuple[Path, Path], token: str) -> str:
    headers = {"authorization": f"Bearer {token}"}
    with triton.InferenceServerClient(server.grpc_url, ssl=True, root_certificates=str(pair[0])) as client:
        answer = client.infer("vismem_unary", inputs(), headers=headers, client_timeout=60)
    return str(answer.as_numpy("TEXT")[0].decode())


def over_http(server: TritonServer, path: str, authorization: str) -> tuple[int, str]:
    """Of /generate Triton passes no header on: it is a field of the body."""
    body = INFER if path.endswith("infer") else {**ASKED, "authorization": authorization}
    return post(server, path, body, Authorization=authorization)


@pytest.mark.usefixtures("trusted")
def test_who_has_the_token_is_answered(
    server: TritonServer,
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A stream, a unary call and HTTP; and `vismem infer`, which reads the token as the server does."""
    client = Client(f"grpcs://{server.grpc_url}", token=TOKEN)
    assert [piece.event for piece in client.stream(IMAGE, "hi", max_new_tokens=3)] == [piece.event for piece in ANSWER]
    assert unary(server, pair, TOKEN) == " é0 é1 é2"
    for path in PATHS:
        status, said = over_http(server, path, f"Bearer {TOKEN}")
        assert (status, " é2" in said) == (200, True)
    (tmp_path / "a.png").write_bytes(IMAGE)
    monkeypatch.setenv(TOKEN_VARIABLE, f"{TOKEN}\n")
    assert main(["infer", "--url", f"grpcs://{server.grpc_url}", "--image", f"{tmp_path}/a.png", "hi"]) == 0
    assert "é0⟨short⟩ é1" in capsys.readouterr().out


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("token", WRONG)
def test_who_has_not_is_refused_whichever_way_he_asks(
    server: TritonServer, pair: tuple[Path, Path], token: str
) -> None:
    if token.isascii():  # gRPC sends no other header
        with pytest.raises(UnauthorizedError, match="no such token"):
            Client(f"grpcs://{server.grpc_url}", token=token).ask(IMAGE, "hi")
        with pytest.raises(InferenceServerException, match="no such token"):
            unary(server, pair, token)
    for path in PATHS:
        status, said = over_http(server, path, f"Bearer {token}")
        assert (status >= 400, "no such token" in said) == (True, True)


@pytest.mark.parametrize(("sent", "answered"), [(TOKEN.encode(), True), (b"no", False), (b"\xff\xfe", False)])
def test_a_header_that_is_no_text_is_another_token(
    server: TritonServer, pair: tuple[Path, Path], sent: bytes, answered: bool
) -> None:
    message = service_pb2.ModelInferRequest(model_name="vismem")
    for tensor in inputs():
        message.inputs.append(tensor._get_tensor())
        message.raw_input_contents.append(tensor._get_content())
    tls = ssl.create_default_context(cafile=str(pair[0]))
    tls.set_alpn_protocols(["h2"])
    call = by_hand("ModelStreamInfer", [(b"authorization", b"Bearer " + sent)], message.SerializeToString())
    said = send(server.ports["grpc"], call, tls)
    assert (" é0".encode() in said, b"no such token" in said) == (answered, not answered)


def test_who_does_not_trust_the_certificate_or_speaks_in_clear_gets_nothing(server: TritonServer) -> None:
    for scheme in ("grpc", "grpcs"):
        with pytest.raises(DisconnectedError):
            Client(f"{scheme}://{server.grpc_url}", token=TOKEN, timeout=20).ask(IMAGE, "hi")


def test_what_knows_no_tls_listens_on_this_machine_alone(server: TritonServer) -> None:
    process = psutil.Process(server.service.process.pid)
    listening = {c.laddr.port: c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert listening.pop(server.ports["grpc"]) in ("::", "0.0.0.0")
    assert listening == dict.fromkeys((server.ports["http"], server.ports["metrics"]), "127.0.0.1")


def test_the_token_stands_on_no_command_line(server: TritonServer) -> None:
    root = psutil.Process(server.service.process.pid)
    assert not [p for p in (root, *root.children(recursive=True)) if TOKEN in " ".join(p.cmdline())]


@pytest.mark.usefixtures("trusted")
def test_serve_takes_the_files_says_how_it_listens_and_asks_with_the_token_too(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    ports = [f"--{name}-port=0" for name in ("grpc", "http", "metrics")]
    options = [
        f"--repository={make_repository(tmp_path)}",
        f"--tls-certificate={pair[0]}",
        f"--tls-key={pair[1]}",
        *ports,
    ]
    command = [sys.executable, "-c", IMPATIENT, "serve", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line.endswith(", with a token)\n")
            address = line.split()[4]
            assert address.startswith("grpcs://127.0.0.1:")
            time.sleep(3)  # many questions of its own: one that fails for a second restarts the server
            assert own_client(address).ask(IMAGE, "hi", max_new_tokens=1) == "é0"
        finally:
            process.terminate()
        assert "restarted" not in process.stdout.read()
    assert process.returncode == 0


@pytest.mark.usefixtures("trusted")
def test_the_probe_asks_as_a_client_does(server: TritonServer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = (parse_config({}), f"grpcs://{server.grpc_url}", server.metrics_url)
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert probe(*asked, timeout=20) == "vismem answers"
    monkeypatch.delenv(TOKEN_VARIABLE)
    with pytest.raises(UnauthorizedError, match="no such token"):
        probe(*asked, timeout=1)


def test_what_knows_no_token_is_not_served_where_one_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that an earlier VisMem wrote would answer everyone."""
    repository = make_repository(tmp_path)
    (file,) = repository.glob("vismem/*/vismem/runtime/access.py")
    file.unlink()
    manifest = repository / "vismem" / "manifest.json"
    listed = read_json(manifest)
    del listed["files"][file.relative_to(manifest.parent).as_posix()]
    write_json(manifest, listed)
    check_repository(repository)
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    with pytest.raises(UserError, match="was written by an earlier VisMem and knows no token: run `vismem deploy`"):
        check_repository(repository)

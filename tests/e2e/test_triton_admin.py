"""What lets a client run code on a real tritonserver, or read its memory and files, is closed, whatever he sends."""

import json
import socket
import ssl
import struct
from collections.abc import Iterator

import psutil
import pytest
from stand_in import make_repository

from vismem.serving.server import CLOSED, TritonServer, triton_server

ADMIN = [
    ("RepositoryIndex", "/v2/repository/index"),
    ("RepositoryModelLoad", "/v2/repository/models/vismem/load"),
    ("RepositoryModelUnload", "/v2/repository/models/vismem/unload"),
    ("SystemSharedMemoryStatus", "/v2/systemsharedmemory/status"),
    ("SystemSharedMemoryRegister", "/v2/systemsharedmemory/region/x/register"),
    ("TraceSetting", "/v2/trace/setting"),
    ("LogSettings", "/v2/logging"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("triton")
    with triton_server(make_repository(folder), log=folder / "server.log") as running:
        yield running


def keys(server: TritonServer) -> list[tuple[bytes, bytes]]:
    """Every header that the command lines of the server and its children could give away."""
    root = server.service.process.pid
    words = [
        word for p in [psutil.Process(root), *psutil.Process(root).children(recursive=True)] for word in p.cmdline()
    ]
    found = {word.split("=", 1)[1].rpartition(":")[2] for word in words if "-restricted-" in word}
    assert found == {CLOSED.rpartition(":")[2]}
    return [tuple(part.encode() for part in key.split("=")) for key in found]  # type: ignore[misc]


def send(port: int, request: bytes, tls: ssl.SSLContext | None = None) -> bytes:
    """What the server answers to these bytes, until it closes the connection or is silent for a second."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port)) as plain:
        connection = tls.wrap_socket(plain, server_hostname="127.0.0.1") if tls else plain
        connection.settimeout(1)
        connection.sendall(request)
        try:
            while piece := connection.recv(65536):
                answer += piece
        except (TimeoutError, ConnectionResetError):
            pass
    return answer


def grpc(server: TritonServer, call: str, headers: list[tuple[bytes, bytes]]) -> bytes:
    named = [(b"triton-grpc-protocol-" + name, value) for name, value in headers]
    return send(server.ports["grpc"], by_hand(call, named))


def by_hand(call: str, headers: list[tuple[bytes, bytes]], message: bytes = b"") -> bytes:
    """A call's bytes: a client library refuses to send such a header at all."""

    def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
        return struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body

    start = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", f"/inference.GRPCInferenceService/{call}".encode()),
    ]
    start += [(b":authority", b"localhost"), (b"te", b"trailers"), (b"content-type", b"application/grpc")]
    fields = b"".join(b"\0" + bytes([len(n)]) + n + bytes([len(v)]) + v for n, v in [*start, *headers])
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
    return preface + frame(1, 4, 1, fields) + frame(0, 1, 1, b"\0" + struct.pack(">I", len(message)) + message)


def http(server: TritonServer, path: str, headers: list[tuple[bytes, bytes]]) -> bytes:
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
    start = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\n".encode()
    return send(server.ports["http"], start + lines + b"\r\n{}")


@pytest.mark.parametrize(("call", "path"), ADMIN)
def test_an_admin_call_is_refused(server: TritonServer, call: str, path: str) -> None:
    assert b"This protocol is restricted" in grpc(server, call, [])
    assert http(server, path, []).startswith(b"HTTP/1.1 403 ")


def test_one_who_reads_the_command_line_cannot_send_the_key(server: TritonServer) -> None:
    """Whole, in lower case, folded onto two lines, or cut at the line break."""
    ((name, value),) = keys(server)
    first, _, rest = name.partition(b"\n")
    assert b"grpc-status\x010" in grpc(server, "ServerLive", [])  # the bytes are right: an open call succeeds
    for sent in (name, name.lower(), name.replace(b"\n", b"\r\n "), first, rest):
        assert b"grpc-status\x010" not in grpc(server, "RepositoryIndex", [(sent, value)])
        answer = http(server, "/v2/repository/index", [(sent, value)])
        assert answer == b"" or answer.startswith((b"HTTP/1.1 403 ", b"HTTP/1.1 400 "))


def test_a_client_cannot_load_code(server: TritonServer) -> None:
    import tritonclient.grpc as triton
    from tritonclient.utils import InferenceServerException

    code = {"file:1/model.py": b"raise SystemExit"}
    client = triton.InferenceServerClient(server.grpc_url)
    with client, pytest.raises(InferenceServerException, match="protocol is restricted"):
        client.load_model("vismem", config=json.dumps({"backend": "python"}), files=code)

"""A real tritonserver with a stand-in runtime: what clients see of answers, faults and cancellation."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stand_in import ANSWER, IMAGE, ask, client_of, decoding, endless, png

from vismem.canary import _check_version
from vismem.errors import UserError
from vismem.serving.client import AsyncClient
from vismem.serving.exchange import DeadlineError, RefusedError, ServerError, Token, marked, plain
from vismem.serving.repository import repository_problems
from vismem.serving.server import TritonServer


def test_a_stream_brings_each_piece_with_its_event(server: TritonServer) -> None:
    assert ask(server) == ANSWER
    assert plain(ANSWER) == "é0 é1 é2"
    assert marked(ANSWER) == "é0⟨short⟩ é1 é2"
    assert plain(held := (*ANSWER[:-1], Token("!", "end"))) == "é0 é1 é2!"  # what a stop string might have begun with
    assert marked(held) == "é0⟨short⟩ é1 é2!"


def test_what_users_ask_lies_in_memory_that_only_the_server_s_user_reads(server: TritonServer) -> None:
    regions = [*Path("/dev/shm").glob(f"vismem_{os.getpid()}_*")]
    assert regions
    assert not [region for region in regions if region.stat().st_mode & 0o077]


def test_a_collected_answer_equals_the_streamed_one(server: TritonServer) -> None:
    assert ask(server, stream=False) == ANSWER


def test_every_input_reaches_the_runtime(server: TritonServer) -> None:
    options = {"max_new_tokens": 5, "temperature": 0.5, "seed": 2**40, "memory": "short", "stop": ["é", "x"]}
    (token,) = ask(server, "echo", images=[png(30, 20), png(8, 9)], **options)
    assert json.loads(token.text) == [[[30, 20], [8, 9]], 5, 0.5, 2**40, "short", ["é", "x"]]
    (token,) = ask(server, "echo", max_new_tokens=None)
    assert json.loads(token.text)[1] == 48, "the bundle's own"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": [IMAGE, IMAGE[:20]]}, r"image 2 of 2 \(20 bytes\) does not decode"),
        ({"images": [b"GIF89a?"]}, r"image 1 of 1 \(7 bytes\) does not decode"),
        ({"images": []}, "IMAGE holds 0 images: send 1 to 64"),
        ({"prompt": " \n"}, "PROMPT is empty"),
        ({"max_new_tokens": 0}, r"MAX_NEW_TOKENS is 0: it must lie in 1\.\."),
        ({"temperature": float("nan")}, "TEMPERATURE is nan"),
        ({"seed": -1}, "SEED is -1"),
        ({"stop": list("abcde")}, "STOP holds 5 texts: send at most 4"),
    ],
)
def test_a_bad_request_is_refused_with_its_reason_and_the_server_answers_on(
    options: dict[str, object], message: str, server: TritonServer
) -> None:
    for stream in (True, False):
        with pytest.raises(RefusedError, match=message):
            ask(server, **options, stream=stream)  # type: ignore[arg-type]
    assert ask(server) == ANSWER


@pytest.mark.parametrize(("prompt", "kind"), [("fail", "RuntimeError"), ("misfit", "ValueError")])
def test_a_fault_in_the_middle_of_an_answer_ends_that_answer_only(server: TritonServer, prompt: str, kind: str) -> None:
    pieces = client_of(server).stream([IMAGE], prompt)
    assert [next(pieces), next(pieces), next(pieces)] == list(ANSWER[:3])
    with pytest.raises(ServerError, match=f"the model failed: {kind}: as asked") as caught:
        next(pieces)
    assert type(caught.value) is ServerError  # no refusal: the same question may be answered later
    assert ask(server) == ANSWER


def test_closing_a_stream_stops_its_answer_on_the_server(server: TritonServer) -> None:
    before = int(plain(ask(server, "left")))
    pieces = endless(server)
    assert next(pieces) == ANSWER[0]
    pieces.close()  # type: ignore[attr-defined]
    assert left_at_last(server, before + 1) == before + 1


def test_async_answers_come_side_by_side_and_one_that_is_given_up_is_stopped(server: TritonServer) -> None:
    client = AsyncClient(f"grpc://{server.grpc_url}")  # asks for the one model that there is

    async def side_by_side() -> None:
        first, second = (client.stream(IMAGE, "endless", max_new_tokens=2000) for _ in range(2))
        assert [await anext(first), await anext(second), await anext(first)] == [ANSWER[0], ANSWER[0], ANSWER[1]]
        await first.aclose()
        answer = await client.ask(IMAGE, "hi", max_new_tokens=3)
        assert (answer.pieces, answer.marked) == (ANSWER, "é0⟨short⟩ é1 é2")
        assert await anext(second) == ANSWER[1]
        await second.aclose()

    async def given_up() -> None:
        asking = asyncio.create_task(client.ask(IMAGE, "endless", max_new_tokens=2000))
        while not asking.done() and not await asyncio.to_thread(decoding, server):
            pass
        asking.cancel()

    before = int(plain(ask(server, "left")))
    asyncio.run(side_by_side())
    assert left_at_last(server, before + 2) == before + 2
    asyncio.run(given_up())
    assert left_at_last(server, before + 3) == before + 3


def test_a_server_of_another_version_is_not_taken_for_the_canary(server: TritonServer) -> None:
    _check_version(server.grpc_url, "vismem", "7")
    with pytest.raises(UserError, match=r"does not serve version 99 of 'vismem'"):
        _check_version(server.grpc_url, "vismem", "99")


def test_a_killed_client_stops_its_answer_on_the_server(server: TritonServer) -> None:
    before = int(plain(ask(server, "left")))
    code = (
        f"from vismem import Client; client = Client('grpc://{server.grpc_url}', model='vismem')\n"
        f"for token in client.stream(bytes.fromhex({IMAGE.hex()!r}), 'endless', max_new_tokens=2000): "
        "print(token.text, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == " é0\n"
        client.kill()
    assert left_at_last(server, before + 1) == before + 1


def test_a_client_that_leaves_before_the_first_token_stops_its_answer_too(server: TritonServer) -> None:
    before = int(plain(ask(server, "left")))
    with pytest.raises(DeadlineError):
        ask(server, "silent", timeout=1)
    assert left_at_last(server, before + 1) == before + 1


def left_at_last(server: TritonServer, awaited: int) -> int:
    """How many answers were given up half way, asked again for a while until it is the awaited number."""
    for _ in range(200):
        if (left := int(plain(ask(server, "left")))) == awaited:
            break
        time.sleep(0.05)
    return left


def test_two_answers_are_decoded_side_by_side_and_a_third_waits_until_one_ends(server: TritonServer) -> None:
    with contextlib.closing(endless(server)) as first, contextlib.closing(endless(server)) as second:  # type: ignore[type-var]
        assert [next(first), next(second), next(first), next(second)] == [*ANSWER[:1] * 2, *ANSWER[1:2] * 2]
        with pytest.raises(UserError, match=r"no whole answer from grpc://.* in 0.3 s: it may be busy or dead"):
            ask(server, timeout=0.3)
        first.close()  # type: ignore[attr-defined]
        assert ask(server) == ANSWER
        assert next(second) == ANSWER[2]


def test_an_unknown_model_is_reported(server: TritonServer) -> None:
    with pytest.raises(UserError, match=r"model 'other' at .*: it is not ready on this server"):
        client_of(server, "other").ask([IMAGE], "hi")


def test_serving_leaves_the_repository_as_it_was_written(server: TritonServer) -> None:
    ask(server)
    assert repository_problems(server.repository) == []

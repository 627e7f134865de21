"""A real exported bundle, deployed and served: what Triton answers is what the runtime answers in this process."""

import io
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from PIL import Image

from examples import ask_grpc
from vismem.data.sample import Sample, StoredSamples
from vismem.errors import UserError
from vismem.generation.invocation import MODES
from vismem.runtime.chat import Turn
from vismem.serving.answering import Runtime
from vismem.serving.client import Client
from vismem.serving.exchange import RefusedError, Token, marked, plain
from vismem.serving.server import TritonServer

TOKENS = 12


@pytest.fixture(scope="module")
def server(bundle_server: TritonServer) -> TritonServer:
    return bundle_server


def in_process(runtime: Runtime, sample: Sample, **options: object) -> tuple[Token, ...]:
    images = [Image.open(io.BytesIO(data)) for data in sample.images]
    return tuple(Token(chunk.text, chunk.event) for chunk in runtime.generate(images, sample.question, **options))  # type: ignore[arg-type]


def served(server: TritonServer, sample: Sample, **options: object) -> tuple[Token, ...]:
    return tuple(Client(f"grpc://{server.grpc_url}").stream(sample.images, sample.question, **options))  # type: ignore[arg-type]


def test_the_smoke_tests_example_is_the_runtimes_own_answer(deployed: Path, runtime: Runtime, tiny_data: Path) -> None:
    smoke = json.loads((deployed / "smoke.json").read_text())
    assert (smoke["model"], smoke["version"], smoke["promoted"]) == ("vismem_challenger", 2, False)
    assert smoke["items_with_memory"] > 0
    sample = next(s for s in StoredSamples(tiny_data / "data" / "test") if s.question == smoke["question"])
    tokens = in_process(runtime, sample)
    assert (smoke["answer"], smoke["answer_marked"]) == (plain(tokens), marked(tokens))


def test_concurrent_answers_are_each_the_runtimes_own(server: TritonServer, runtime: Runtime) -> None:
    samples = tiny.samples()[:6]
    expected = [in_process(runtime, sample, max_new_tokens=TOKENS) for sample in samples]
    assert any(token.event in ("short", "long") for tokens in expected for token in tokens)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda sample: served(server, sample, max_new_tokens=TOKENS), samples))
    assert found == expected


def test_sampling_and_memory_options_reach_the_runtime(server: TritonServer, runtime: Runtime) -> None:
    sample = tiny.samples()[0]
    for options in (
        {"temperature": 1.0, "seed": 5},
        {"temperature": 1.0, "seed": 6},
        *({"memory": mode} for mode in MODES),
    ):
        expected = in_process(runtime, sample, max_new_tokens=TOKENS, **options)
        assert served(server, sample, max_new_tokens=TOKENS, **options) == expected, options
    text = plain(in_process(runtime, sample, max_new_tokens=TOKENS))
    assert (
        plain(served(server, sample, max_new_tokens=TOKENS, stop=[text[5:8]])) == text[: text.index(text[5:8])].strip()
    )
    with pytest.raises(UserError, match="MEMORY is 'both': it must be one of learned, off, short, long"):
        served(server, sample, memory="both")


def test_a_conversation_of_the_client_is_the_runtimes_own(server: TritonServer, runtime: Runtime) -> None:
    sample = replace(tiny.samples()[0], images=tiny.samples()[0].images[:1])
    turns = [Turn("user", ("Look", None)), Turn("assistant", ("Yes?",)), Turn("user", (sample.question,))]
    image = Image.open(io.BytesIO(sample.images[0]))
    own = runtime.generate([image], turns, max_new_tokens=TOKENS)
    found = Client(f"grpc://{server.grpc_url}").ask(sample.images, turns, max_new_tokens=TOKENS)
    assert found.pieces == tuple(Token(chunk.text, chunk.event) for chunk in own)


def test_the_example_with_plain_tritonclient_prints_the_answer(
    server: TritonServer, runtime: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = next(sample for sample in tiny.samples() if len(sample.images) == 1)
    (tmp_path / "a.png").write_bytes(sample.images[0])
    ask_grpc.main(f"{tmp_path}/a.png", sample.question, "vismem_challenger", server.grpc_url)
    assert capsys.readouterr().out.strip() == marked(in_process(runtime, sample))


def test_an_answer_ends_with_what_it_took(server: TritonServer, runtime: Runtime) -> None:
    sample = tiny.samples()[0]
    *_, end = served(server, sample, max_new_tokens=TOKENS)
    *_, expected = runtime.generate([Image.open(io.BytesIO(data)) for data in sample.images], sample.question)
    *_, cut = served(server, sample, max_new_tokens=1)
    assert end.usage is not None
    assert expected.usage is not None
    assert end.usage["prompt_tokens"] == expected.usage.prompt_tokens
    assert end.usage.keys() == vars(expected.usage).keys()
    own = {name: cut.usage[name] for name in ("memories", "first_token_seconds")}
    assert own["first_token_seconds"] > 0
    assert cut.usage == {**end.usage, "finish": "length", "tokens": 1, **own}


def test_a_question_that_holds_one_of_the_models_own_tokens_is_refused_with_its_name(server: TritonServer) -> None:
    image = tiny.samples()[0].images
    for token in ("<m_I^s>", "<|image_pad|>", "<|im_end|>"):
        with pytest.raises(RefusedError, match=f"PROMPT holds {re.escape(token)}, one of the model's own tokens"):
            Client(f"grpc://{server.grpc_url}").ask(image, f"a {token}?")


def test_an_image_with_transparency_is_seen_as_in_training(server: TritonServer, runtime: Runtime) -> None:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((84, 84)).convert("LA").save(file, "PNG")
    sample = Sample(id="la", images=(file.getvalue(),), question=tiny.samples()[0].question, answer="")
    assert served(server, sample, max_new_tokens=TOKENS) == in_process(runtime, sample, max_new_tokens=TOKENS)

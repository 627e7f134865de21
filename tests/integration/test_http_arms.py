"""The endpoint's arms as model names: each answers as `evaluate` decodes it, also beside the others in one batch."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import tiny
import tiny_stages
from http_calls import GOOD, messages, post, served

from vismem.evaluation.arms import ARMS as EVALUATED
from vismem.generation.engine import generate
from vismem.generation.invocation import BASE_MODES, MODES
from vismem.generation.torch_executor import TorchExecutor
from vismem.models.vismem import VisMemModel
from vismem.records import VISMEM
from vismem.serving.answering import Runtime
from vismem.serving.client import Client
from vismem.serving.completion import ARMS, Extension
from vismem.serving.http import create_app

SAMPLES = tiny.samples()
LIMIT = 12  # tokens
NAMES = {"tiny": VISMEM} | {f"tiny-{arm}": arm for arm in ARMS}


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> VisMemModel:
    made = tiny_stages.eager_model(tiny_base)
    made.policy_lora.enabled = True  # a reader: without memory it is still not the base
    return made


@pytest.fixture(scope="module")
def url(model: VisMemModel) -> Iterator[str]:
    with served(create_app(Runtime(TorchExecutor(model, cache_bytes=10**9), rows=5), "tiny")) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=3)


def test_the_arms_are_those_of_an_evaluation() -> None:
    assert {name: EVALUATED[name].policy for name in ARMS} == {name: BASE_MODES[mode] for name, mode in ARMS.items()}
    accepted = Extension.model_json_schema()["properties"]["memory"]["anyOf"][0]["enum"]
    assert sorted(accepted) == sorted(BASE_MODES)


def test_every_arm_is_a_model_and_answers_beside_the_others_as_it_does_alone(
    client: openai.OpenAI, model: VisMemModel
) -> None:
    assert [served.id for served in client.models.list()] == list(NAMES)
    asked = [(name, sample) for sample in SAMPLES for name in NAMES]

    def ask(question: Any) -> Any:
        name, sample = question
        shown = messages(sample.images, sample.question)
        return client.chat.completions.create(model=name, max_tokens=LIMIT, messages=shown)

    with ThreadPoolExecutor(10) as pool:
        replies = list(pool.map(ask, asked))
    texts = {}
    for name, arm in NAMES.items():
        expected = generate(model, SAMPLES, EVALUATED[arm].policy, max_new_tokens=LIMIT)
        own = [reply for (asked_name, _), reply in zip(asked, replies, strict=True) if asked_name == name]
        texts[arm] = [reply.choices[0].message.content for reply in own]
        assert texts[arm] == [rollout.text for rollout in expected]
        assert {reply.model for reply in own} == {name}
        kinds = [[invocation.kind.value for invocation in rollout.invocations] for rollout in expected]
        assert [[memory["kind"] for memory in reply.vismem["memories"]] for reply in own] == kinds
    assert len({tuple(said) for said in texts.values()}) == len(NAMES)  # no two arms are the same


def test_the_bare_base_is_the_policy_without_its_adapter(model: VisMemModel) -> None:

    with model.policy_lora.active(False):
        expected = generate(model, SAMPLES, MODES["off"], max_new_tokens=LIMIT)
    found = generate(model, SAMPLES, BASE_MODES["vanilla"], max_new_tokens=LIMIT)
    assert [rollout.token_ids for rollout in found] == [rollout.token_ids for rollout in expected]
    assert [rollout.logprobs for rollout in found] == [rollout.logprobs for rollout in expected]
    assert model.policy_lora.enabled
    assert model.policy_lora.adapted is None


def test_the_field_chooses_as_the_name_does_and_a_contradiction_is_refused(url: str) -> None:
    named = post(url, GOOD | {"model": "tiny-vanilla"})
    field = post(url, GOOD | {"vismem": {"memory": "vanilla"}})
    assert named[0] == field[0] == 200
    assert named[1]["choices"] == field[1]["choices"]
    assert post(url, GOOD | {"model": "tiny-short_only", "vismem": {"memory": "short"}})[0] == 200
    status, reply = post(url, GOOD | {"model": "tiny-short_only", "vismem": {"memory": "long"}})
    assert (status, reply["error"]["message"]) == (400, "'tiny-short_only' is memory 'short', not 'long'")
    status, reply = post(url, GOOD | {"model": "tiny-short"})
    assert (status, "'tiny-short_only'" in reply["error"]["message"]) == (404, True)


def test_our_own_client_needs_no_name(url: str) -> None:
    client = Client(url)
    assert client.ask(SAMPLES[0].images, SAMPLES[0].question, max_new_tokens=2) is not None
    assert client.model == "tiny"

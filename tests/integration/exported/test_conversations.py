"""Conversations: several turns, images between texts. The graphs read them as torch does, by any chat template."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from pictures import TOKENS, encoded, noise

from vismem.data.sample import Sample
from vismem.errors import UserError
from vismem.export.onnx import prompt_parts
from vismem.generation.engine import generate
from vismem.generation.invocation import MODES
from vismem.generation.prompts import encode
from vismem.runtime.chat import IMAGE, Turn
from vismem.runtime.images import grid_of
from vismem.runtime.limits import RequestError
from vismem.runtime.prompt import tokenise

PLAIN = None
QWEN = (  # Qwen2.5-VL's own: without a turn of the system it has one of its own
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = "{{ part['text'] or '<|vision_start|><|image_pad|><|vision_end|>' }}"
NO_SYSTEM = (
    "{% for turn in messages %}{% if turn['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}<|im_start|>"
    f"{{% for part in turn['content'] %}}{PARTS}{{% endfor %}}{{% endfor %}}"
)
LAST = (
    f"{{% for part in messages[-1]['content'] %}}{PARTS}{{% endfor %}}?"  # of a conversation it says the last turn only
)
TRIMMED = QWEN.replace("{{ content['text'] }}", "{{ content['text'] | trim }}")

SYSTEM, MODEL = Turn("system", ("be brief\n",)), Turn("assistant", (" two, I think ",))
FIRST, BETWEEN = Turn("user", (IMAGE, "how many?")), Turn("user", ("and is ", IMAGE, " or ", IMAGE, " red?"))
CHATS = {
    "a question": (FIRST,),
    "images between texts": (BETWEEN,),
    "several turns": (FIRST, MODEL, BETWEEN),
    "a system's turn": (SYSTEM, BETWEEN),
    "all of it": (SYSTEM, FIRST, MODEL, Turn("user", ("why?",)), MODEL, BETWEEN),
}
PICTURES = [noise(84, 84), noise(170, 60, 1), noise(112, 140, 2)]


def sample_of(chat: tuple[Turn, ...]) -> Sample:
    count = sum(turn.parts.count(IMAGE) for turn in chat)
    return Sample(id="x", images=encoded(*PICTURES[:count]), question="", answer="", chat=chat)


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("template", [PLAIN, QWEN])
def test_ids_and_positions_are_those_of_the_torch_side(model, bundle, runtime, monkeypatch, template, name):
    settings = json.loads((bundle / "onnx" / "runtime.json").read_text())
    if template:
        monkeypatch.setattr(model.backbone.processor, "chat_template", template)
        settings["prompt"] = prompt_parts(model.backbone.processor)
    sample = sample_of(CHATS[name])
    grids = [grid_of(image.size, settings["image"], "") for image in PICTURES[: len(sample.images)]]
    prompt = tokenise(runtime.executor.tokenizer, settings, CHATS[name], grids)
    expected = encode(model.backbone, [sample])
    assert np.array_equal(prompt.positions, expected.positions[:, 0].numpy())
    assert np.array_equal(prompt.visual, expected.visual[0].numpy())
    text = ~expected.visual[0]
    assert torch.equal(model.embed(torch.tensor(prompt.ids))[text], expected.embeds[0][text])


@pytest.mark.parametrize("name", CHATS)
def test_the_graphs_answer_a_conversation_as_torch_does(model, runtime, name):
    sample = sample_of(CHATS[name])
    (expected,) = generate(model, [sample], MODES["learned"], max_new_tokens=TOKENS)
    pieces = list(runtime.generate(PICTURES[: len(sample.images)], CHATS[name], max_new_tokens=TOKENS))
    assert "".join(piece.text for piece in pieces) == expected.text
    assert pieces[-1].usage.prompt_tokens > expected.visual_tokens > 0


def test_what_was_said_before_and_where_images_stand_counts(model):
    def logprobs(chat):
        (rollout,) = generate(model, [sample_of(chat)], MODES["off"], max_new_tokens=1)
        return rollout.logprobs

    assert len({logprobs(chat) for chat in CHATS.values()}) == len(CHATS)


@pytest.mark.parametrize(
    ("template", "refused"),
    [(NO_SYSTEM, {"a system's turn", "all of it"}), (LAST, {*CHATS} - {"a question", "images between texts"})],
)
def test_turns_that_the_template_cannot_say_are_refused_by_name(model, bundle, runtime, monkeypatch, template, refused):
    settings = json.loads((bundle / "onnx" / "runtime.json").read_text())
    monkeypatch.setattr(model.backbone.processor, "chat_template", template)
    settings["prompt"] = prompt_parts(model.backbone.processor)
    for name, chat in CHATS.items():
        expected = pytest.raises(RequestError, match="no such turns: ") if name in refused else nullcontext()
        with expected:
            tokenise(runtime.executor.tokenizer, settings, chat, [(4, 4)] * len(sample_of(chat).images))


def test_a_template_that_trims_what_is_said_is_refused(model, monkeypatch):
    monkeypatch.setattr(model.backbone.processor, "chat_template", TRIMMED)
    with pytest.raises(UserError, match=r"chat template .*`export\.graphs: false`.*`vismem api`"):
        prompt_parts(model.backbone.processor)

"""Conversations: where images stand in a question, what messages say, and which turns are refused."""

from typing import Any

import pytest

from vismem.runtime.chat import IMAGE, Turn, check_chat, joined, one_turn, read_messages, said
from vismem.runtime.limits import RequestError
from vismem.runtime.prompt import composed


@pytest.mark.parametrize(
    ("question", "images", "parts"),
    [
        ("how many?", 0, ("how many?",)),
        ("how many?", 2, (IMAGE, IMAGE, "how many?")),
        ("is <image> or <image> red?", 2, ("is ", IMAGE, " or ", IMAGE, " red?")),
        ("<image><image>which?", 2, (IMAGE, IMAGE, "which?")),
        ("which is it: <image>", 1, ("which is it: ", IMAGE)),
        ("one <image> for two", 2, (IMAGE, IMAGE, "one <image> for two")),  # no place for each: it is text
        ("what does <image> mean in HTML?", 0, ("what does <image> mean in HTML?",)),
    ],
)
def test_images_stand_at_the_marks_or_before_the_question(question: str, images: int, parts: Any) -> None:
    (turn,) = one_turn(question, images)
    assert turn == Turn("user", parts)
    assert turn.parts.count(IMAGE) == images


def test_messages_are_read_as_openai_writes_them() -> None:
    chat = read_messages(
        [
            {"role": "system", "content": "be"},
            {"role": "system", "content": "brief"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}],
            },
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": [{"type": "text", "text": "d"}, {"type": "text", "text": "e"}]},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "f"}]},
        ]
    )
    assert chat == [
        Turn("system", ("be\nbrief",)),
        Turn("user", ("a", IMAGE, "b")),
        Turn("assistant", ("c",)),
        Turn("user", ("d\ne", IMAGE, "f")),
    ]
    check_chat(chat, images=2)
    assert said(chat) == "be\nbrief\na\nb\nc\nd\ne\nf"


WRONG: list[Any] = [
    None,
    {"role": "user", "content": "a"},
    ["a"],
    [None],
    [{"role": "user"}],
    [{"role": "user", "content": 5}],
    [{"role": "user", "content": {"type": "text", "text": "a"}}],
    [{"role": "user", "content": ["a"]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "text", "text": 5}]}],
    [{"role": "user", "content": [{"type": "video"}]}],
    [{"role": "user", "content": [{"type": []}]}],
]


@pytest.mark.parametrize("messages", WRONG)
def test_what_is_no_message_is_refused(messages: Any) -> None:
    with pytest.raises(RequestError, match=r"message.*must be"):
        check_chat(read_messages(messages), images=0)


USER, MODEL, SYSTEM = Turn("user", ("a",)), Turn("assistant", ("b",)), Turn("system", ("c",))


@pytest.mark.parametrize(
    ("chat", "images", "reason"),
    [
        ([], 0, "the turns are none"),
        ([MODEL], 0, "a user's last"),
        ([USER, MODEL], 0, "user, assistant: "),
        ([USER, USER], 0, "user, user: "),
        ([USER, MODEL, MODEL, USER], 0, "in turn"),
        ([USER, SYSTEM, USER], 0, "one of the system first"),
        ([SYSTEM], 0, "a user's last"),
        ([SYSTEM, SYSTEM, USER], 0, "one of the system first"),
        ([Turn("tool", ("a",))], 0, "the turns are tool"),
        ([Turn("start", ("a",)), USER], 0, "the turns are start"),
        ([Turn("end", ("a",))], 0, "the turns are end"),
        ([USER], 1, "places for 0 images, and 1 were sent"),
        ([Turn("user", (IMAGE, "a"))], 0, "places for 1 images, and 0 were sent"),
        ([USER, Turn("assistant", (IMAGE,)), USER], 1, "in a user's turns only"),
        ([Turn("user", (IMAGE,))], 1, "no text"),
        ([USER, MODEL, Turn("user", (" \n",))], 0, "no text"),
    ],
)
def test_turns_that_make_no_conversation_are_refused(chat: Any, images: int, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        check_chat(chat, images)


@pytest.mark.parametrize(
    "chat", [[USER], [SYSTEM, USER], [USER, MODEL, USER], [SYSTEM, USER, MODEL, USER, MODEL, USER]]
)
def test_conversations_pass(chat: Any) -> None:
    check_chat(chat, images=0)


def test_texts_side_by_side_are_lines() -> None:
    assert joined(["a", "b", IMAGE, IMAGE, "c"]) == ("a\nb", IMAGE, IMAGE, "c")


def test_a_conversation_is_composed_of_joints_and_images_in_order() -> None:
    joints = {"start user": "[", "user assistant": "|", "assistant user": "/", "user end": "]"}
    chat = [Turn("user", (IMAGE, "a")), MODEL, Turn("user", ("c", IMAGE, "d"))]
    assert composed(joints, chat, ["1", "2"]) == "[1a|b/c2d]"
    with pytest.raises(RequestError, match="no such turns: system, user"):
        composed(joints, [SYSTEM, USER], [])

"""What a sample says to the model: the prompt's messages and the text to be written. The only place that knows."""

from typing import Any

from vismem.data.sample import Sample
from vismem.runtime.chat import IMAGE

ANSWER_MARK = "answer:"


def prompt_messages(sample: Sample) -> list[dict[str, Any]]:
    """The turns for `processor.apply_chat_template`, with placeholders of images and videos.

    Videos stand behind the images of the last turn.
    """
    messages: list[dict[str, Any]] = [
        {"role": turn.role, "content": [*map(_part, turn.parts)]} for turn in sample.turns()
    ]
    content = messages[-1]["content"]
    leading = max((at + 1 for at, part in enumerate(content) if part["type"] == "image"), default=0)
    content[leading:leading] = [{"type": "video"} for _ in sample.videos]
    return messages


def _part(part: str | None) -> dict[str, Any]:
    return {"type": "image"} if part is IMAGE else {"type": "text", "text": part}


def target_text(sample: Sample) -> str:
    """The reference answer: rationale (where there is one), mark, answer."""
    return f"{sample.rationale} {ANSWER_MARK} {sample.answer}".strip()

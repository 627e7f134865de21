"""What a sample says to the model: the prompt's messages and the text to be written. The only place that knows."""

from typing import Any

from vismem.data.sample import Sample

ANSWER_MARK = "answer:"


def prompt_messages(sample: Sample) -> list[dict[str, Any]]:
    """One user turn for `processor.apply_chat_template`: placeholders of its images, of its videos, the question."""
    content: list[dict[str, Any]] = [{"type": "image"} for _ in sample.images]
    content += [{"type": "video"} for _ in sample.videos]
    return [{"role": "user", "content": [*content, {"type": "text", "text": sample.question}]}]


def target_text(sample: Sample) -> str:
    """The reference answer: rationale (where there is one), mark, answer."""
    return f"{sample.rationale} {ANSWER_MARK} {sample.answer}".strip()


def answer_part(text: str) -> str:
    """What stands after the last answer mark in a decoded text; the whole text where there is none."""
    return text.rsplit(ANSWER_MARK, 1)[-1].strip()

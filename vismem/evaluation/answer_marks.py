"""Where a generated text says that its answer comes: thoughts are dropped, and the last explicit mark is found."""

import re

_THOUGHT = re.compile(r"<think>.*?</think>|^.*</think>|<think>.*", re.DOTALL | re.IGNORECASE)
_TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL | re.IGNORECASE)
_FINAL = re.compile(r"\bfinal\s+answer\s*(?::|\bis\b)\s*:?", re.IGNORECASE)
_OF = r"(?:\s+(?:to|for|of)\s+(?:this|the|your|that)(?:\s+\w+)?\s+(?:question|problem))?"
_STATED = re.compile(
    rf"\b(?:answer{_OF}\s*:|(?:answer|option|choice){_OF}\s+(?:is|would\s+be|should\s+be|must\s+be|will\s+be)\b\s*:?)",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\boxed\s*\{", re.IGNORECASE)


def without_thoughts(text: str) -> str:
    """What was said after thinking; what never came out of its thoughts says nothing. Bold type is dropped too."""
    return _THOUGHT.sub(" ", text).replace("**", "").strip()


def last_marked(text: str) -> tuple[str, str] | None:
    """The text behind the last explicit mark, and the rule's name; boxed, tagged and final go before stated."""
    strong = [(start, content, "boxed") for start, content in _boxes(text)]
    strong += [(found.start(), found[1], "answer tag") for found in _TAGGED.finditer(text)]
    strong += [(found.start(), _line_behind(found), "final answer") for found in _FINAL.finditer(text)]
    if strong:
        _, content, rule = max(strong)
        return content.strip(), rule
    stated = list(_STATED.finditer(text))
    return (_line_behind(stated[-1]), "answer stated") if stated else None


def _line_behind(mark: re.Match[str]) -> str:
    """What stands behind a mark, up to the end of the first line that is not empty."""
    return mark.string[mark.end() :].strip().split("\n", 1)[0].strip()


def _boxes(text: str) -> list[tuple[int, str]]:
    """Start and content of every closed `\\boxed{...}`, nested braces included."""
    boxes = []
    for found in _BOXED.finditer(text):
        depth = 1
        for end in range(found.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                boxes.append((found.start(), text[found.end() : end]))
                break
    return boxes

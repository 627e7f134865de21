"""Where a generated text says that its answer comes: thoughts are dropped, and the last explicit mark is found."""

import re

_THOUGHT = re.compile(r"<think>.*?</think>|^.*</think>|<think>.*", re.DOTALL | re.IGNORECASE)
_TAGGED = re.compile(
    r"<(?:answer|\|begin_of_box\|)>(?P<tagged>.*?)(?:</answer>|<\|end_of_box\|>|$)|"
    r"[\"']answer[\"']\s*:\s*(?P<quote>[\"']?)(?P<value>[^\"'{}]*)(?P=quote)\s*[,}]",  # JSON
    re.DOTALL | re.IGNORECASE,
)
_FINAL = re.compile(r"\bfinal\s+answer\s*(?::|\bis\b)\s*:?", re.IGNORECASE)
_OF = r"(?:\s+(?:to|for|of)\s+(?:this|the|your|that)(?:\s+\w+)?\s+(?:question|problem))?"
_LETTER_IS = r"(?:answer|option|choice|correct)\s+letter"  # as MathVista's own hint asks for it
_STATED = re.compile(
    rf"\b(?:(?:answers?|ans|{_LETTER_IS}){_OF}(?:\s*[:=]|\s[-\u2013\u2014]\s)|"
    rf"(?:answer|option|choice|{_LETTER_IS}){_OF}\s+(?:is|would\s+be|should\s+be|must\s+be|will\s+be)\b\s*:?|"
    rf"(?:answers|correct\s+(?:options|choices)){_OF}\s+are\b\s*:?)",
    re.IGNORECASE,
)
FINAL_VALUE = re.compile(  # a sentence with which a reply ends, as MathVista's own hint asks for it
    r"^(?:(?:so|thus|therefore|hence),?\s+)?(?:the\s+)?final\s+(?:value|result)\s*(?::|\bis\b)\s*:?", re.IGNORECASE
)
_REMARK = re.compile(  # a line's last sentence that says whence an answer is or that it is right, and not which it is
    r"(?:^|(?<=[.!?\n])|(?<=\byes,)|(?<=\bno,))\s*(?:"
    r"(?:the|this|that|my)\s+(?:answer|option|choice)\s+is\s+"
    r"(?:(?:based\s+on|supported\s+by|consistent\s+with)\b[^.:!?\n]{0,200}|correct|sure|certain)|"
    r"(?:this|that)\s+(?:answer|option|choice)\s+is\s+"
    r"(?:right|clear|the\s+(?:only|best|correct|right)\b[^.:!?\n]{0,200})|"
    r"the\s+other\s+(?:answer|option|choice)\s+is\s+(?:wrong|incorrect|false)\b[^.:!?\n]{0,200}"
    r")[.!]*[ ]*(?=\n|$)",
    re.IGNORECASE,
)
_TURN = re.compile(r"\b(?:but|however|wait|actually|instead)\b", re.IGNORECASE)
_BRACE = re.compile(r"\\boxed\s*\{|[{}]", re.IGNORECASE)


def without_thoughts(text: str) -> str:
    """What was said after thinking, in single spaces and line breaks, without bold type.

    What never came out of its thoughts says nothing.
    """
    said = re.sub(r"[^\S\n]+", " ", _THOUGHT.sub(" ", text).replace("**", "").replace("__", ""))
    return re.sub(r"\n[ \n]*", "\n", said).strip()


def without_remarks(text: str) -> str:
    """Without what is said of an answer already given ("This answer is based on ..."), but where it may be another."""
    return text if _TURN.search(text) else _REMARK.sub("", text)


def last_marked(text: str) -> tuple[str, str] | None:
    """The text behind the last explicit mark, and the rule's name; boxed, tagged and final go before stated."""
    strong = [(start, content, "boxed") for start, content in _boxes(text)]
    strong += [
        (found.start(), found["tagged"] or found["value"] or "", "answer tag") for found in _TAGGED.finditer(text)
    ]
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
    boxes, unclosed = [], list[re.Match[str]]()
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            unclosed.append(brace)
        elif unclosed and (opening := unclosed.pop())[0] != "{":
            boxes.append((opening.start(), text[opening.end() : brace.start()]))
    return boxes

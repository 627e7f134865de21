"""Reading an answer out of a generated text, and scoring it: 1 for correct, 0 otherwise.

The rules stand in a fixed order, from the most explicit to the least, and never guess: what no rule can read is
unparsed, and unparsed is wrong. The rule that read an answer is kept, so that a report can show how arms differ in it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vismem.data.sample import Sample, lettered

UNPARSED = "unparsed"

_THOUGHT = re.compile(r"<think>.*?</think>|^.*</think>|<think>.*", re.DOTALL | re.IGNORECASE)
_TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL | re.IGNORECASE)
_FINAL = re.compile(r"\bfinal\s+answer\s*(?::|\bis\b)\s*:?", re.IGNORECASE)
_STATED = re.compile(r"\b(?:answer\s*:|(?:answer|option|choice)\s+is\b\s*:?)", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\s*\{")
_WRAPPED = re.compile(r"^\\(?:text|mathrm|mathbf)\s*\{(.*)\}$", re.DOTALL)
_LONE_LETTER = re.compile(r"^\(?(?P<letter>[A-Za-z])(?:[).:]+)?$")
_LABELLED = re.compile(r"^(?P<open>\()?(?P<letter>[A-Za-z])(?(open)\)|[).:])\s+\S")
_WORD = r"[AI]\s+(?!(?:or|and|nor|is|because)\b)[a-z]"  # the article or the pronoun, with the word behind it
_STANDALONE = re.compile(rf"(?<![\w'\u2019-])(?!{_WORD})([A-Z])(?![\w'\u2019-])")
_SEVERAL_CLAUSES = re.compile(r"[,;:!?\n]|\.(?:\s|$)")
_LETTERED = re.compile(r"(?:^|[\s(])A[).:].*?(?:^|[\s(])B[).:]", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Extraction:
    """What was read: `value` is the text of a choice, or the answer as written; None where no rule applied."""

    value: str | None
    rule: str


UNREAD = Extraction(None, UNPARSED)


def extract(text: str, choices: Sequence[str], *, letters: bool = True) -> Extraction:
    """Read the answer out of `text`.

    With `choices` the value is one of them, named by its text or, if `letters`, by its letter (A is the first).
    Without, the value is what an explicit marker introduces, or the whole reply where it is a single clause.
    Where a marker introduces nothing readable, the weaker rules look only behind it, never at what went before.
    """
    region = _THOUGHT.sub(" ", text).replace("**", "").strip()
    marked = _last_marked(region)
    if marked is not None:
        region, rule = marked
        value = _resolve(region, choices, letters) if choices else (_strip(region) or None)
        if value is not None:
            return Extraction(value, rule)
    if choices:
        return _read_choice(region, choices, letters)
    reply = _strip(region)
    readable = marked is None and reply and not _SEVERAL_CLAUSES.search(reply)
    return Extraction(reply, "whole reply") if readable else UNREAD


def score(sample: Sample, text: str) -> float:
    """1.0 if the answer read out of `text` equals the sample's, 0.0 otherwise (case, spacing and final stops aside)."""
    return float(is_correct(sample, read(sample, text)))


def read(sample: Sample, text: str) -> Extraction:
    """`extract` with the sample's choices; letters count only where the question or the answer uses them."""
    return extract(text, sample.choices, letters=_uses_letters(sample.question, sample.answer))


def is_correct(sample: Sample, extraction: Extraction) -> bool:
    """Whether an extraction agrees with the sample's answer, exactly after `normalise`."""
    expected = reference_choice(sample.question, sample.answer, sample.choices) or sample.answer
    return extraction.value is not None and normalise(extraction.value) == normalise(expected)


def reference_choice(question: str, answer: str, choices: Sequence[str]) -> str | None:
    """The choice that a reference answer names, by its text or by its letter; None where it names none."""
    return _resolve(answer, choices, _uses_letters(question, answer))


def normalise(text: str) -> str:
    """Lower case, single spaces, none before punctuation, no final punctuation."""
    joined = re.sub(r"\s+([,.;:!?])", r"\1", " ".join(text.split()))
    return joined.casefold().rstrip(" .,;:!?")


def _last_marked(text: str) -> tuple[str, str] | None:
    """The text behind the last explicit marker, and the rule's name; boxed, tagged and final go before stated."""
    strong = [(start, content, "boxed") for start, content in _boxes(text)]
    strong += [(found.start(), found[1], "answer tag") for found in _TAGGED.finditer(text)]
    strong += [(found.start(), _line_behind(found), "final answer") for found in _FINAL.finditer(text)]
    if strong:
        _, content, rule = max(strong)
        return content.strip(), rule
    stated = list(_STATED.finditer(text))
    return (_line_behind(stated[-1]), "answer stated") if stated else None


def _line_behind(marker: re.Match[str]) -> str:
    """What stands behind a marker, up to the end of the first line that is not empty."""
    return marker.string[marker.end() :].strip().split("\n", 1)[0].strip()


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


def _read_choice(region: str, choices: Sequence[str], letters: bool) -> Extraction:
    """The rules without a marker: the whole reply, its first line, one standalone letter, one option's text."""
    for rule, part in (("whole reply", region), ("first line", region.split("\n", 1)[0])):
        if (value := _resolve(part, choices, letters)) is not None:
            return Extraction(value, rule)
    named = _STANDALONE.findall(region) if letters else ()
    by_letter = [choice for letter, choice in lettered(choices).items() if letter in named]
    for rule, found in (("one letter", by_letter), ("one option", _mentioned(region, choices))):
        if found:
            return Extraction(found[0], rule) if len(found) == 1 else UNREAD
    return UNREAD


def _resolve(text: str, choices: Sequence[str], letters: bool) -> str | None:
    """The choice that `text`, as a whole, names: by its text, its letter, or a letter with a label's mark."""
    stripped = _strip(text)
    for choice in choices:
        if choice and normalise(choice) == normalise(stripped):
            return choice
    found = _LONE_LETTER.match(stripped) or _LABELLED.match(stripped) if letters else None
    return lettered(choices).get(found["letter"].upper()) if found else None


def _strip(text: str) -> str:
    """Without outer spaces, quotes, dollars, `\\text{}` and final stops."""
    bare = text.strip(" \t\n\"'`$*\u201c\u201d\u2018\u2019")
    wrapped = _WRAPPED.match(bare)
    return (wrapped[1] if wrapped else bare).strip().rstrip(".,;!?").rstrip()


def _mentioned(text: str, choices: Sequence[str]) -> list[str]:
    """The choices whose text occurs, longest first, so that "red circle" does not also count as "red".

    "yes" and "no" count only as the first or last word: inside a sentence they are not an answer.
    """
    rest = normalise(text)
    mentioned = []
    for choice in sorted(choices, key=len, reverse=True):
        wanted = re.escape(normalise(choice))
        pattern = rf"^{wanted}\b|\b{wanted}$" if wanted in ("yes", "no") else rf"(?<!\w){wanted}(?!\w)"
        if wanted and re.search(pattern, rest):
            mentioned.append(choice)
            rest = re.sub(pattern, " | ", rest)
    return mentioned


def _uses_letters(question: str, answer: str) -> bool:
    """Whether the question shows its options under letters, or the answer is a letter."""
    return bool(_LETTERED.search(question)) or _LONE_LETTER.match(answer.strip()) is not None

"""Reading an answer out of a generated text, and scoring it: 1 for correct, 0 otherwise. The reward is this score.

How depends on the form of the answer (`vismem.data.answer_forms`). The rules stand in a fixed order, from the most
explicit to the least, and never guess: what no rule can read is unparsed, and unparsed is wrong. The rule that read an
answer is kept, so that a report can show how arms differ in it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from vismem.data.answer_forms import (
    LABELS,
    AnswerForm,
    AnswerKind,
    answer_form,
    normalise,
    reference_value,
    strip,
    without_article,
)
from vismem.data.benchmarks import references
from vismem.data.numbers import parse_number, read_number, same_number
from vismem.data.sample import Sample
from vismem.evaluation.answer_leads import FILLER, leading, leading_letters
from vismem.evaluation.answer_marks import FINAL_VALUE, last_marked, without_remarks, without_thoughts

UNPARSED = "unparsed"

_DENIED_BEHIND = re.compile(  # but not "red not blue"
    r"^(?:(?:is|was|seems|looks)\s*(?:not\b|n't)|(?:(?:is|was|seems|looks)\s+)?(?:wrong|incorrect|false)\b)",
    re.IGNORECASE,
)
_IS_RIGHT = re.compile(
    r"(?:^|(?<=[\s(\[]))(?P<letter>[A-Z])[)\]]?\s+(?:is|must\s+be)\s+(?:the\s+)?(?:correct|right|best|answer)\b",
    re.IGNORECASE,
)
_CONCLUDED = re.compile(
    r"\b(?:(?:must|should|would|has\s+to)\s+be|it\s+is|it['\u2019]s|(?:match|fit|guess)\s+is|corresponds\s+to|matches|"
    r"choose|pick|select|go\s+with|so|thus|therefore|hence)\b[,:]?\s+(?:(?:the\s+)?(?:option|choice|letter|answer)\s+)?"
    r"[(\[]?(?P<letter>[A-Z])[)\]]?$",
    re.IGNORECASE,
)
_ALL_RIGHT = re.compile(r"\s+(?:is|are)\s+(?:both\s+|all\s+)?(?:the\s+)?(?:correct|right)(?:\s+\w+)?$", re.IGNORECASE)
_HEDGED = re.compile(r"\b(?:or|and|nor|neither|if|whether|than|why|not)\s+[(\[]?$", re.IGNORECASE)
_NEGATION = re.compile(
    r"\b(?:not|no|never|cannot|neither|nor|without|except|rather\s+than|than|instead\s+of)\b|n't\b", re.IGNORECASE
)
_LISTED = re.compile(r"\b(?:neither|nor|or)\b", re.IGNORECASE)  # a list may go on being denied in the next clause
_CLAUSES = re.compile(r"[,;:!?\n]|\.(?:\s|$)")
_SENTENCES = re.compile(  # not behind "St." or an initial
    r"\n+|[!?]\s+|(?<!\bst)(?<!\bdr)(?<!\bmr)(?<!\bmrs)(?<!\bvs)(?<!\bfig)(?<!\b[a-z])\.\s+", re.IGNORECASE
)
_POLAR = re.compile(
    r"^(?:.*[,;]\s*(?=(?:so|thus|therefore|hence)\b))?(?:(?:so|thus|therefore|hence|then|well|sure|overall|"
    r"in\s+conclusion|(?:based\s+on|in)\s+the\s+(?:image|picture)|i(?:\s+would|['\u2019]d)?\s+(?:say|think))\b\W{0,9}){0,9}"
    r"(?P<word>yes|no|true|false)(?!\w)"
    r"(?=\W*$|\s*[.,;:!)\]\"\u2014-]|\s+(?:and(?!\s+no\b)|it|there|they|he|she|we|i|you|this|"
    r"that|these|those|the|because|since|as)\b)",
    re.IGNORECASE,
)
_OPPOSITES = {"yes": r"\bno\W*$", "no": r"\byes\b", "true": r"\bfalse\b", "false": r"\btrue\b"}
_LEAD_IN = re.compile(
    r"^(?:it|this|that|he|she|they|these|those|there)(?:['\u2019](?:s|re)|\s+(?:is|are|was|were))\s+"
    r"(?:(?:made\s+(?:of|from)|called|named)\s+)?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Extraction:
    """What was read: `value` is the text of a choice, or the answer as written; None where no rule applied."""

    value: str | None
    rule: str


UNREAD = Extraction(None, UNPARSED)


def score(sample: Sample, text: str) -> float:
    """1.0 if the answer read out of `text` equals the sample's, 0.0 otherwise."""
    return read_and_score(sample, text)[1]


def read_and_score(sample: Sample, text: str) -> tuple[Extraction, float]:
    """What is read out of `text`, and its score; where several references are right, by the one that it meets."""
    found = []
    for answer in references(sample):
        own = replace(sample, answer=answer)
        extraction = read(own, text)
        found.append((extraction, float(is_correct(own, extraction))))
    return max(found, key=lambda each: each[1])


def read(sample: Sample, text: str) -> Extraction:
    """`extract` with the form of the sample's answer."""
    return extract(text, answer_form(sample.question, sample.answer, sample.choices))


def extract(text: str, form: AnswerForm) -> Extraction:
    """Read an answer of the given form out of `text`.

    The value is the text of an option, letters as "A, C", yes or no, or a number or words as they were written. Where a
    mark introduces nothing readable, the weaker rules look only behind it, never at what went before; but remarks on an
    answer that was given are no marks.
    """
    said = without_thoughts(text)
    found = _extract(said, form)
    bare = without_remarks(said) if found.value is None else said
    return found if bare == said else _extract(bare, form)


def _extract(said: str, form: AnswerForm) -> Extraction:
    region, rule = last_marked(said) or (said, "")
    match form.kind:
        case AnswerKind.CHOICE:
            return _read_choice(region, rule, form)
        case AnswerKind.LETTERS:
            return _read_letters(region, rule, form)
        case AnswerKind.YES_NO:
            return _read_polar(region, rule, form)
        case AnswerKind.NUMBER:
            return _read_number(region, rule)
        case AnswerKind.TEXT:
            return _read_text(region, rule)


def is_correct(sample: Sample, extraction: Extraction) -> bool:
    """Whether an extraction is the sample's answer: the same option, number by value, or words by `normalise`."""
    form = answer_form(sample.question, sample.answer, sample.choices)
    expected = reference_value(form, sample.answer)  # None where it is none of the options: nothing is right then
    if extraction.value is None or expected is None:
        return False
    if form.options:
        return extraction.value == expected
    if form.kind is AnswerKind.NUMBER:
        said, wanted = parse_number(extraction.value), parse_number(expected)
        return said is not None and wanted is not None and same_number(said, wanted)
    same = without_article if form.kind is AnswerKind.TEXT else normalise
    return same(extraction.value) == same(expected)


def _read_choice(region: str, rule: str, form: AnswerForm) -> Extraction:
    """The whole region or its beginning; then its first or last line, an option called right, one option's words."""
    if value := form.option(region) or leading(region, form):
        return Extraction(value, rule or "whole reply")
    if not rule and (edge := _edge_line(region, lambda line: form.option(line) or leading(line, form))):
        return edge
    if form.by_letter and (value := _called_right(region, form)):
        return Extraction(value, "option is right")
    if form.by_letter and (value := _concluded(region, form)):
        return Extraction(value, "conclusion")
    if form.polar:
        return _read_polar(region, rule, form)
    if all(parse_number(option) for option in form.options.values()):
        number = read_number(region, leading=bool(rule)) if rule or _is_sentence(region) else None
        value = form.option(number.text) if number else None
        return Extraction(value, rule or "one number") if value else UNREAD
    value = _mentioned(region, form)
    return Extraction(value, "one option") if value else UNREAD


def _read_letters(region: str, rule: str, form: AnswerForm) -> Extraction:
    if value := form.letters(FILLER.sub("", _ALL_RIGHT.sub("", strip(region)))):
        return Extraction(value, rule or "whole reply")
    if not rule and (edge := _edge_line(region, form.letters)):
        return edge
    value = leading_letters(region, form)
    return Extraction(value, rule or "whole reply") if value else UNREAD


def _read_polar(region: str, rule: str, form: AnswerForm) -> Extraction:
    """Yes or no as the first word of the region; without a mark also of its last sentence, if both say the same."""
    sentences = [sentence for sentence in _SENTENCES.split(strip(region)) if sentence.strip()]
    edges = (*sentences[:1], *sentences[-1:])
    found = [match for edge in edges if (match := _POLAR.match(edge))]
    said = [match["word"].casefold() for match in found]
    if len({*said}) != 1 or said[0] not in (form.polar or ()):
        return UNREAD
    if any(re.search(_OPPOSITES[said[0]], match.string[match.end() :], re.IGNORECASE) for match in found):
        return UNREAD
    whole = normalise(strip(region)) == said[0]
    return Extraction(form.option(said[0]) or said[0], rule or ("whole reply" if whole else "first word"))


def _read_number(region: str, rule: str) -> Extraction:
    """The only number behind a mark or of a one-sentence reply; else the first or last line, or the final value."""
    if rule or _is_sentence(region):
        number = read_number(region, leading=bool(rule))
        whole = "whole reply" if parse_number(strip(region)) else "one number"
        return Extraction(number.text, rule or whole) if number else UNREAD
    if edge := _edge_line(region, _number_text):
        return edge
    last = _SENTENCES.split(strip(region))[-1]
    value = FINAL_VALUE.match(last)
    return _read_number(last[value.end() :], "final answer") if value else UNREAD


def _number_text(line: str) -> str | None:
    """The text of the number that a line is."""
    number = parse_number(strip(line))
    return number.text if number else None


def _read_text(region: str, rule: str) -> Extraction:
    """What stands behind a mark, or the whole reply where it is one sentence."""
    words = strip(_LEAD_IN.sub("", strip(region)))
    return Extraction(words, rule or "whole reply") if words and (rule or _is_sentence(region)) else UNREAD


def _is_sentence(text: str) -> bool:
    return bool(strip(text)) and len(_SENTENCES.split(strip(text))) == 1


def _edge_line(text: str, answer: Callable[[str], str | None]) -> Extraction | None:
    """The answer that the first or the last line is, where no other line is another one."""
    lines = [answer(line) for line in text.split("\n") if line.strip()]
    if len({*lines} - {None}) == 1:
        for line, rule in ((lines[0], "first line"), (lines[-1], "last line")):
            if line is not None:
                return Extraction(line, rule)
    return None


def _called_right(text: str, form: AnswerForm) -> str | None:
    """The only option of which the text says "X is correct"."""
    letters = {
        found["letter"].upper()
        for found in _IS_RIGHT.finditer(text)
        if not _HEDGED.search(text[max(0, found.start() - 12) : found.start()])
    }
    return form.options.get(letters.pop()) if len(letters) == 1 else None


def _concluded(text: str, form: AnswerForm) -> str | None:
    """The option with whose letter the last sentence ends, as in "so it must be B"."""
    sentence = _SENTENCES.split(strip(text))[-1]
    found = _CONCLUDED.search(sentence)
    clause = _CLAUSES.split(sentence[: found.start()])[-1] if found else ""
    return form.options.get(found["letter"].upper()) if found and not _NEGATION.search(clause) else None


def _mentioned(text: str, form: AnswerForm) -> str | None:
    """The only option whose text occurs, undenied, and no other's label beside it. Options of one letter are no words.

    The longest go first, so that "red circle" does not also count as "red".
    """
    labels = (form.options.get(label["letter"].upper()) for label in LABELS.finditer(text)) if form.by_letter else ()
    named = {label for label in labels if label}
    clauses = [normalise(clause) for clause in _CLAUSES.split(text)]
    rest, mentioned = normalise(text), False
    words = [*map(normalise, {*form.options.values()})]
    for option in sorted(form.options.values(), key=len, reverse=True):
        wanted = normalise(option)
        pattern = re.compile(rf"(?<![\w-]){re.escape(wanted)}(?![\w-]|[.,]\d)")
        if len(wanted) > 1 and pattern.search(rest):
            rest = pattern.sub(" | ", rest)
            found = [(clause, at) for clause in clauses if (at := pattern.search(clause))]
            denied = [
                _NEGATION.search(clause[: at.start()]) or _DENIED_BEHIND.match(clause[at.end() :].lstrip())
                for clause, at in found
            ]
            if all(denied) and not _LISTED.search(text):
                continue  # "a dog, not a cat"
            if any(denied) or words.count(wanted) > 1:
                return None
            named.add(option)
            mentioned = True
    return named.pop() if mentioned and len(named) == 1 else None

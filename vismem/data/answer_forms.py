"""What kind of answer a question asks for, derived from question, reference and choices: the only place that knows.

`prepare` picks the instruction for it, `validate` looks for the reference among the options, and evaluation and reward
read answers by it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from string import ascii_uppercase

from vismem.data.numbers import parse_number, same_number
from vismem.data.sample import lettered

POLAR = (("yes", "no"), ("true", "false"))
UNSEEN = dict.fromkeys("ABCDEFGH", "")  # letters that count where the options are in the picture

LABELS = re.compile(r"(?:^|(?<=[\s,;:]))[(\[]?(?P<letter>[A-Z])(?:[)\]][.:]?|[.:])", re.IGNORECASE | re.MULTILINE)
_LETTER = re.compile(r"[(\[]?(?P<letter>[A-Za-z])[)\]]?[.:]*")
_BETWEEN = re.compile(r"\s*(?:[,;/&\n]|\band\b)+\s*", re.IGNORECASE)
_SPACED = re.compile(r"[A-Za-z](?: [A-Za-z])+")
_LETTERS = re.compile(r"[A-Z](?:\s*(?:,|;|/|&|and)?\s*[A-Z])*")
_WRAPPED = re.compile(r"^\\(?:text|mathrm|mathbf|textbf)\s*\{(.*)\}$", re.DOTALL | re.IGNORECASE)
_AROUND = " \t\n\"'`$*\u201c\u201d\u2018\u2019"
_ARTICLE = re.compile(r"^(?:an?|the)\s+(?=\w)")


class AnswerKind(StrEnum):
    """How an answer is given, and so how it is read."""

    CHOICE = "choice"  # one of the options, by its text or its letter
    LETTERS = "letters"  # a set of options, by their letters
    YES_NO = "yes_no"  # yes or no, true or false
    NUMBER = "number"  # a number, perhaps with a unit
    TEXT = "text"  # anything else: the words of the reference


@dataclass(frozen=True)
class AnswerForm:
    """The kind of answer that a question asks for, and what may be answered."""

    kind: AnswerKind
    options: Mapping[str, str]  # letter: text, of the options that are offered
    by_letter: bool = False  # whether an option may be named by its letter
    shown: bool = False  # whether the question shows the options under their letters
    polar: tuple[str, str] | None = None  # the two words where these are asked for

    def option(self, text: str) -> str | None:
        """The text of the option that `text`, as a whole, is: its words, its number or its letter, or all of them.

        A capital is first of all the letter that an option is shown under. None for words that fit several alike.
        """
        bare = strip(text)
        letter = _LETTER.fullmatch(bare) if self.by_letter else None
        if self.shown and letter and letter["letter"] in self.options:
            return self.options[letter["letter"]]
        for same, said in ((str.strip, text), (strip, bare), (normalise, bare), (without_article, bare)):
            if fitting := {option for option in self.options.values() if same(said) and same(option) == same(said)}:
                return fitting.pop() if len(fitting) == 1 else None
        if number := parse_number(bare):
            equal = [o for o in self.options.values() if (its := parse_number(o)) and same_number(number, its)]
            if len(equal) == 1:
                return equal[0]
        if letter:
            return self.options.get(letter["letter"].upper())
        if self.by_letter and (labelled := _LETTER.match(bare)):
            own = self.options.get(labelled["letter"].upper())
            rest = bare[labelled.end() :].strip(" -\u2013\u2014")
            return own if own and normalise(strip(rest)) == normalise(own) else None
        return None

    def letters(self, text: str) -> str | None:
        """The set of letters that `text`, as a whole, names, as "A, C"; None where anything else is there."""
        valid = self.options or UNSEEN
        bare = re.sub(r"^\[(.*)\]$", r"\1", strip(text))
        together = bare.upper()
        parts: Iterable[str] = filter(None, (bare.split() if _SPACED.fullmatch(bare) else _BETWEEN.split(bare)))
        if together.isalpha() and [*together] == sorted({*together}):  # "AC"
            parts = together
        found = set[str]()
        for part in parts:
            letter = _LETTER.fullmatch(part.strip(_AROUND))
            named = letter["letter"].upper() if letter else self._letter_of(part)
            if named is None or named not in valid:
                return None
            found.add(named)
        return ", ".join(sorted(found)) or None

    def _letter_of(self, text: str) -> str | None:
        option = self.option(text)
        return next((letter for letter, own in self.options.items() if own == option), None)


@lru_cache(maxsize=4096)  # the answers of a group are read one by one
def answer_form(question: str, answer: str, choices: Sequence[str]) -> AnswerForm:
    """The form of the answer to a question. `choices`: a tuple; an empty one is not offered.

    Options that stand in the question only ("A. red B. blue") count where the reference is one of them.
    """
    offered = _offered(question, answer, choices)
    options, right = offered.options, offered.option(answer) if offered.options else None
    letters = _LETTERS.fullmatch(answer.strip()) is not None
    if options and right is None and letters and len(offered.letters(answer) or "") > 1:  # "A, C"
        return AnswerForm(AnswerKind.LETTERS, options, True, offered.shown)
    if any(choices) or right is not None:  # "red", or its letter; "no", of yes and no
        polar = not offered.by_letter and offered.polar
        return AnswerForm(AnswerKind.YES_NO, options, polar=polar) if polar else offered
    if polar := _polar((answer,)):  # "no", where nothing is offered
        return AnswerForm(AnswerKind.YES_NO, {}, polar=polar)
    if parse_number(answer):  # "12 cm"
        return AnswerForm(AnswerKind.NUMBER, {})
    if letters and AnswerForm(AnswerKind.LETTERS, {}).letters(answer):  # "B", of options in the picture
        return AnswerForm(AnswerKind.LETTERS, {}, True)
    return AnswerForm(AnswerKind.TEXT, {})


def _offered(question: str, answer: str, choices: Sequence[str]) -> AnswerForm:
    """The choice that the question offers, of `choices` or else of the options that it shows."""
    options = lettered(choices) or _shown_options(question)
    shown, named = _shows(question, options), _LETTER.fullmatch(answer.strip()) is not None
    own = {option.strip().upper(): option for option in options.values()}
    letters_only = not shown and {*own} <= {*ascii_uppercase} and len(own) == len({*options.values()}) > 0
    if letters_only:
        options = own
    elif shown and named:  # of two with the same words one is right
        texts = [*options.values()]
        options = {at: f"{text} ({at})" if texts.count(text) > 1 else text for at, text in options.items()}
    return AnswerForm(AnswerKind.CHOICE, options, shown or letters_only or named, shown, _polar(options.values()))


def reference_value(form: AnswerForm, answer: str) -> str | None:
    """The reference as an answer of its form is read; None where it is none of the options."""
    if form.kind is AnswerKind.LETTERS:
        return form.letters(answer)
    if form.options:
        return form.option(answer)
    return normalise(answer) if form.polar else answer


def canonical(form: AnswerForm, answer: str) -> str | None:
    """One text for all answers of a form that are scored as the same; None for one that is none of the options."""
    value = reference_value(form, answer)
    if value is None:
        return None
    if form.kind is AnswerKind.LETTERS and form.options:  # whatever their order
        return ", ".join(sorted(normalise(form.options[letter]) for letter in value.split(", ")))
    if form.kind is AnswerKind.NUMBER and (number := parse_number(answer)):
        return f"{number.value if number.value.denominator == 1 else float(number.value)}{number.unit}"
    return (without_article if form.kind is AnswerKind.TEXT else normalise)(value)


def normalise(text: str) -> str:
    """Lower case, single spaces, none before punctuation, no final punctuation."""
    joined = re.sub(r"\s+([,.;:!?])", r"\1", " ".join(text.split()))
    return joined.casefold().rstrip(" .,;:!?")


def without_article(text: str) -> str:
    """`normalise`, without a leading article."""
    return _ARTICLE.sub("", normalise(text))


def strip(text: str) -> str:
    """Without outer spaces, quotes, dollars, stars, `\\(`, `\\text{}` and final stops."""
    bare = re.sub(r"\\[()\[\]]", "", text).strip(_AROUND).rstrip(".,;!?").rstrip(_AROUND)
    wrapped = _WRAPPED.match(bare)
    return (wrapped[1] if wrapped else bare).strip().rstrip(".,;!?").rstrip(_AROUND)


def _polar(texts: Iterable[str]) -> tuple[str, str] | None:
    """The pair of words of which all `texts` are one."""
    words = {normalise(text) for text in texts}
    return next((pair for pair in POLAR if words <= set(pair)), None)


def _shows(question: str, options: Mapping[str, str]) -> bool:
    """Whether the question shows the first two of the options under their letters."""
    labels = [found["letter"].upper() for found in LABELS.finditer(question)]
    wanted = [*options][:2]
    return len(wanted) == 2 and wanted[0] in labels and wanted[1] in labels[labels.index(wanted[0]) :]


def _shown_options(question: str) -> dict[str, str]:
    """The options that a question shows under the letters A, B, ..., each up to the next one or its line's end."""
    labels, wanted = list[re.Match[str]](), iter(ascii_uppercase)
    letter = next(wanted)
    for found in LABELS.finditer(question):
        if found["letter"].upper() == letter:
            labels.append(found)
            letter = next(wanted, "")
    if len(labels) < 2:
        return {}
    ends = [found.start() for found in labels[1:]] + [len(question)]
    texts = [strip(question[label.end() : end].strip().split("\n")[0]) for label, end in zip(labels, ends, strict=True)]
    return dict(zip(ascii_uppercase, texts, strict=False)) if all(texts) else {}

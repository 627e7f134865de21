"""The letter or letters of options with which a text begins, with or without a reason behind them."""

import re

from vismem.data.answer_forms import LABELS, UNSEEN, AnswerForm, strip

FILLER = re.compile(
    r"^(?:(?:most\s+)?(?:it['\u2019]s|it\s+is|i(?:\s+would|['\u2019]d)?\s+(?:choose|pick|select|say|think|go\s+with)|"
    r"clearly|definitely|likely|probably|therefore|thus|hence|obviously|simply|then|so|either|both|only|the|correct|"
    r"options?|choices?|letters?|answers?|not\s+[(\[]?[a-z][)\]]?,?\s+but(?:\s+rather)?)\b\s*[:,]?\s*)+",
    re.IGNORECASE,
)
_LEADING = re.compile(
    r"^(?:[(\[](?P<closed>[A-Za-z])[)\]][.:,;]*|(?P<open>[A-Za-z])(?:[).:,;]+(?=\s|$)|(?=[ \t]+[-\u2013\u2014]+\s)|"
    r"(?=[ \t]+(?:because|since|as|which|due)\b)|\s*\Z))",
    re.IGNORECASE,
)
_ANOTHER = re.compile(
    r"^(?:(?:or|and|nor|&|/)\s*)?[(\[]?[A-Za-z](?:[)\].:,;/]|\s*\Z|\s+(?:or|and|&)\b)|^or\b", re.IGNORECASE
)
_DENIED = re.compile(
    r"^(?:(?:is|was|seems|looks)\s*)?(?:not\b(?!\s+(?:option\s+)?[(\[]?[a-z]\b)|n't|wrong|incorrect|false)",
    re.IGNORECASE,
)
_SEVERAL = re.compile(  # no comma ends them: what follows it may be one more
    r"^(?P<letters>[(\[]?[A-Z][)\]]?(?:(?:\s*[,;/&]\s*(?:and\s+)?|\s+and\s+)[(\[]?[A-Z][)\]]?)*)"
    r"(?:[.:]+(?=\s)|,?\s+(?:because|since|as(?!\s+well)|which|due)\b|"
    r"(?<=[)\]])(?=\s+(?!(?:or|and|nor|is|are|was|were|do|does|did|has|have|can|cannot|shows?)\b|[&/(\[])))",
    re.IGNORECASE,
)
_NAMED = (  # letters of which a reason says that they may be the answer, or not
    LABELS,
    re.compile(r"(?<![\w'\u2019])(?P<letter>[A-Z])[)\]]?\s+(?:is|are|also|too|fits|matches|works)\b", re.IGNORECASE),
    re.compile(r"\b(?:or|also|plus|maybe|perhaps)\s+[(\[]?(?P<letter>[A-Z])(?!\w)", re.IGNORECASE),
)
_ALL_DENIED = re.compile(
    r"^(?:neither|none)\b|^(?:(?:both|these|they|all)\s+)?(?:(?:are|were|do|does|seem|look)\s*)?"
    r"(?:not\b|n['\u2019]t\b|wrong|incorrect|false)",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(r"^(?:no|wait|but|actually|however|hmm|maybe|perhaps)\b", re.IGNORECASE)


def leading(text: str, form: AnswerForm) -> str | None:
    """The option whose letter begins the text, as in "(B) because ...", if no other has a label."""
    bare = FILLER.sub("", strip(text))
    found = _LEADING.match(bare) if form.by_letter else None
    if found is None:
        return form.option(bare) if bare != strip(text) else None
    letter = (found["closed"] or found["open"]).upper()
    rest = bare[found.end() :].strip(" -\u2013\u2014")
    others = {label["letter"].upper() for label in LABELS.finditer(bare)} & {*form.options} - {letter}
    option, named = form.options.get(letter), form.option(rest) if len(rest) > 1 else None
    if named not in (None, option) or _DENIED.match(rest) or others:
        return None
    return None if named is None and _ANOTHER.match(rest) else option


def leading_letters(text: str, form: AnswerForm) -> str | None:
    """The set of letters that begins the text, as in "A and C because ...", if no other is named so."""
    bare = FILLER.sub("", strip(text))
    found = _SEVERAL.match(bare)
    letters = form.letters(found["letters"]) if found else None
    if not found or letters is None:
        return None
    rest = bare[found.end() :].strip(" -\u2013\u2014")
    named = {each["letter"].upper() for pattern in _NAMED for each in pattern.finditer(bare)}
    others = named & {*(form.options or UNSEEN)} - {*letters}
    doubts = (_DENIED, _ALL_DENIED, _ANOTHER, _TAKEN_BACK)
    doubted = any(pattern.match(rest) for pattern in doubts) or form.option(rest)
    return None if others or doubted else letters

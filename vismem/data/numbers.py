"""Numbers in text: as a reference writes them ("1,234", "50%", "2 1/2", "12 cm", "three"), and in a model's sentence.

Values are exact fractions. Nothing is evaluated and every form has a length limit, so untrusted text costs little. What
may be no number, or more than one, is None: "3:4", "1,5", "more than 12", "12 or 13".
"""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

# Canonical unit: its other names. Of metric units the symbols below take prefixes too.
_UNITS = {
    "%": "percent|per cent|pct",
    "°": "degrees|degree|deg",
    "°c": "degrees celsius|degree celsius|celsius|° c",
    "°f": "degrees fahrenheit|degree fahrenheit|fahrenheit|° f",
    "mm": "millimeters|millimeter|millimetres|millimetre",
    "cm": "centimeters|centimeter|centimetres|centimetre",
    "m": "meters|meter|metres|metre",
    "km": "kilometers|kilometer|kilometres|kilometre",
    "inch": "inches",
    "ft": "feet|foot",
    "yd": "yards|yard",
    "mile": "miles|mi",
    "mg": "milligrams|milligram",
    "g": "grams|gram",
    "kg": "kilograms|kilogram|kilos|kilo",
    "lb": "lbs|pounds|pound",
    "oz": "ounces|ounce",
    "ml": "milliliters|milliliter|millilitres|millilitre",
    "l": "liters|liter|litres|litre",
    "s": "seconds|second|secs|sec",
    "min": "minutes|minute|mins",
    "h": "hours|hour|hrs|hr",
    "day": "days",
    "week": "weeks",
    "month": "months",
    "year": "years|yrs|yr",
    "km/h": "kmh|kph|kilometers per hour|kilometres per hour",
    "m/s": "meters per second|metres per second",
    "mph": "miles per hour",
    "v": "volts|volt",
    "w": "watts|watt",
    "n": "newtons|newton",
    "j": "joules|joule",
    "pa": "pascals|pascal",
    "hz": "hertz",
    "€": "euros|euro|eur",
    "$": "dollars|dollar|usd",
    "cent": "cents",
}
_PREFIXED = {
    f"{prefix}{symbol}" for prefix in "kcmnμ" for symbol in ("m", "g", "l", "s", "v", "w", "n", "j", "pa", "hz")
}
_UNIT_OF = {alias: unit for unit, names in _UNITS.items() for alias in (unit, *names.split("|"))}
_UNIT_OF = {**{symbol: symbol for symbol in _PREFIXED}, **_UNIT_OF}
_POWERS = {"square": "^2", "sq": "^2", "cubic": "^3"}

_ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_TEENS = ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SMALL = {word: value for value, word in enumerate(_ONES + _TEENS)}
_SMALL |= {word: 10 * (n + 2) for n, word in enumerate(_TENS)} | {"a": 1, "none": 0}
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10}
_PARTS |= {f"{word}s": value for word, value in _PARTS.items()} | {"halves": 2}

_WHOLE = r"(?:\d{1,3}(?:,\d{3})+|\d{1,30})"
_BELOW_100 = rf"(?:(?:{'|'.join(_TENS)})(?:[-\s](?:{'|'.join(_ONES[1:])}))?|{'|'.join(_TEENS + _ONES)})"
_BELOW_1000 = rf"(?:(?:a|{_BELOW_100})\s+(?:hundred|dozen)(?:\s+(?:and\s+)?{_BELOW_100})?|{_BELOW_100})"
_SPELT = rf"(?:a|{_BELOW_1000})\s+(?:thousand|million|billion)(?:\s+(?:and\s+)?{_BELOW_1000})?|{_BELOW_1000}"
_UNIT = "|".join(re.escape(alias) for alias in sorted(_UNIT_OF, key=len, reverse=True))
_NUMBER = re.compile(
    rf"""(?<![\w.^])(?<!\d[,/:*+-])                          # no part of a word, "3:4" or "1,5"
    (?P<sign>(?<![\d)])[-+]|(?:minus|negative)\s+)?          # -3, minus three
    (?P<money>[€£¥]\s?)?                                     # €5
    (?:(?:
        (?:(?P<mixed>{_WHOLE})\s+)?(?P<over>\d{{1,9}})\s?/\s?(?P<under>\d{{1,9}})                # 2 1/2
        | (?P<decimal>{_WHOLE}(?:\.\d{{0,30}})?|\.\d{{1,30}})                                    # 1,234.5
          (?:e(?P<e>[-+]?\d{{1,2}})|\s?[x*]\s?10\s?\^\s?\{{?(?P<power>[-+]?\d{{1,2}})\}}?)?      # 1.2e3, 1.2 * 10^3
      )(?:\s+(?P<scale>{"|".join(_SCALES)})\b)?                                                  # 1.2 million
    | \b(?:
        (?P<parts>a(?=\shalf|\squarter)|{"|".join(_ONES[1:])})[-\s](?P<part>{"|".join(_PARTS)})  # two thirds
        | (?P<half>half) | (?P<spelt>{_SPELT}|none)                                              # one hundred and five
      )\b
    )
    (?:\s?-?\s?(?:(?P<shape>square|sq|cubic)\.?\s+)?         # 5 square meters
      (?P<unit>{_UNIT})(?:\^?(?P<exponent>[23])(?!\d))?(?!\w)  # 5 cm^2
    )?(?!\w)(?![.,/:*+^-]\d)""",
    re.VERBOSE,
)
_LABEL = re.compile(
    r"\b(?:figure|fig\.?|image|picture|photo|panel|step|table|page|question|equation|chapter|example|option|choice)"
    r"\s*#?\(?$"
)
_BOUND = re.compile(  # what stands before a number that is a limit or denied
    r"(?:\bthan|\bleast|\bmost|\bover|\bunder|\babove|\bbelow|\bbetween|\bup\s+to|\bnearly|\balmost|\bexcept|[<>≤≥]|(?:^|\s)-)"
    r"\s*(?:about\s+|exactly\s+)?$|(?:\bnot\b|n't\b|\bnever\b|\bcannot\b|\bneither\b|\bnor\b|\bwithout\b)[^,;.!?]*$"
)
_OPEN_END = re.compile(r"^\s*(?:[+*/^√π\\-]|(?:or|to|and)\s+(?:more|less|fewer|so|\d))")
_COUNTED_ONE = re.compile(r"(?:^\W*|\b(?:is|are|was|were|only|exactly|just|see|count|has|have|be|of|than|about)\s+)$")
_PRONOUN = re.compile(r"^\s+(?:of|that|which|who|with|on|in|at|to)\b")
_NEXT = re.compile(r"^\s*(?:and|or|maybe|perhaps|possibly|to)\b")
_CUT = re.compile(r"[,;(](?!\d{3})|[.:]\s|\s-\s|\b(?:because|since|as)\b")


LONGEST = 300  # characters of a sentence that states a number


@dataclass(frozen=True)
class Number:
    """A number as it was written. `places`: digits behind its point, None of a fraction; 0 means it is exact."""

    value: Fraction
    places: int | None
    unit: str  # canonical, "" where none was named
    text: str


def parse_number(text: str) -> Number | None:
    """The number that the text is, with its unit; None where there is anything else."""
    found = _NUMBER.fullmatch(_plain(text).rstrip(" .!")) if len(text) <= LONGEST else None
    return _number(found) if found else None


def read_number(text: str, *, leading: bool = False) -> Number | None:
    """The only number that a sentence names; with `leading` also one that begins it and is followed by an aside.

    Numbers of figures, options and the like do not count, nor do ordinals and names like "A4". Where there is an equals
    sign, what stands behind the last one is read. None where a number is denied, a bound, or one of several.
    """
    if len(text) > LONGEST:
        return None
    plain = re.split("[=≈]", _plain(text))[-1]
    number = _only_number(plain)
    if number is None and leading and (cut := _CUT.search(plain)):
        rest = plain[cut.end() :]
        listed = cut[0] in ",;" and _NUMBER.match(rest.lstrip())
        if not listed and not _NEXT.match(rest):
            number = _only_number(plain[: cut.start()])
    return number


def same_number(reply: Number, reference: Number) -> bool:
    """Whether a reply's number is the reference's.

    Whole numbers and powers of ten must be equal. A reference with decimals is met by what rounds to it, and a
    fraction by its decimals, two at least. A unit may be left out, but must not be another. Where one is a percentage
    and the other has no unit, it may be meant as such or as its hundredth, to as many digits.
    """
    left, right = reply.unit, reference.unit
    degrees = "°" in (left, right) and left[:1] == right[:1]
    if not (left == right or "" in (left, right) or degrees):
        return False
    replies, references = ((1, Fraction(1, 100)) if unit == "%" and left != right else (1,) for unit in (left, right))
    by_reply = reference.places is None and (reply.places or 0) >= 2
    places = reply.places if by_reply else reference.places
    tolerance = Fraction(1, 2 * 10**places) if places else Fraction(0)
    return any(
        abs(reply.value * said - reference.value * meant) <= tolerance * (said if by_reply else meant)
        for said in replies
        for meant in references
    )


def _only_number(plain: str) -> Number | None:
    """The number of a text in which it is the only one, however often it stands there."""
    found, rest, end = list[Number | None](), "", 0
    for match in _NUMBER.finditer(plain):
        before, behind = plain[: match.start()], plain[match.end() :]
        if match["spelt"] == "none" and match[0] != plain.strip(" ."):
            continue
        rest, end = f"{rest}{plain[end : match.start()]} ", match.end()
        if not _is_name(match[0], before, behind):
            found.append(None if _BOUND.search(before) or _OPEN_END.match(behind) else _number(match))
    rest = re.sub(r"\w*[^\W\d_]\w*", "", rest + plain[end:])  # names and ordinals: A4, 2nd
    one = len({number and (number.value, number.unit) for number in found}) == 1
    return found[0] if one and not re.search(r"[\d√π\\]", rest) else None


def _is_name(number: str, before: str, behind: str) -> bool:
    """Whether a number between these is a figure's or an option's, or "one" or "half" a pronoun or a side."""
    is_count = number not in ("one", "half") or (_COUNTED_ONE.search(before) and not _PRONOUN.match(behind))
    return not is_count or _LABEL.search(before) is not None


def _plain(text: str) -> str:
    """Lower case, without LaTeX and dollar signs; superscripts as ^2, fraction characters as 1/2."""
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text.casefold())
    text = re.sub(r"[⁰¹²³⁴-⁹]+", lambda found: f"^{found[0]}", text)
    text = re.sub(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))|\\[,!;:]|\\(?:left|right)|\\[()\[\]]", "", text)
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/").replace("{,}", ",")
    text = re.sub(r"[\u2212\u2010-\u2014]", "-", text).replace("\u00d7", "*")
    text = re.sub(r"\\[dt]?frac\s?(\d)\s?(\d)", r" \1/\2", text)
    text = re.sub(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", r" \1/\2", text)
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf|mathit)\s*\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"\s*\^\s*(?:\{\s*)?\\circ(?:\s*\})?|\s*\\degree|\s+(?=°)", "°", text).replace("°°", "°")
    text = text.replace(r"\%", "%").replace(r"\times", "*").replace(r"\cdot", "*").replace(r"\approx", "≈")
    text = re.sub(r"(?:\bus|\bc|\ba)?\\?\$|[`\"]|(?<![\d ])\*|\*(?![\d ])", "", text)
    return " ".join(text.split())


def _number(found: re.Match[str]) -> Number | None:
    """What a match of `_NUMBER` says; None where it divides by zero."""
    places: int | None = 0
    if found["under"]:
        if int(found["under"]) == 0:
            return None
        value = int((found["mixed"] or "0").replace(",", "")) + Fraction(int(found["over"]), int(found["under"]))
        places = None
    elif found["decimal"]:
        digits = found["decimal"].replace(",", "").rstrip(".")
        value, places = Fraction(digits), len(digits.partition(".")[2])
    elif found["part"] or found["half"]:
        value = Fraction(_SMALL[found["parts"] or "one"], _PARTS[found["part"] or "half"])
        places = None
    else:
        value = Fraction(_spelt(found["spelt"]))
    if found["scale"] or found["e"] or found["power"]:
        exponent = int(found["e"] or found["power"] or 0)
        value *= _SCALES.get(found["scale"] or "", 1) * Fraction(10) ** exponent
        places = 0
    if found["sign"] and found["sign"] != "+":
        value = -value
    unit = _UNIT_OF.get(found["unit"] or "", (found["money"] or "").strip())
    unit += _POWERS.get(found["shape"] or "", f"^{found['exponent']}" if found["exponent"] else "")
    return Number(value, places, unit, found[0].strip())


def _spelt(text: str) -> int:
    """The value of a number in words."""
    total = part = 0
    for word in re.split(r"[-\s]+", text):
        if word in ("dozen", "hundred"):
            part *= _SCALES[word]
        elif word in _SCALES:
            total, part = total + part * _SCALES[word], 0
        elif word != "and":
            part += _SMALL[word]
    return total + part

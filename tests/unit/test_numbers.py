"""Numbers in text: their exact values, when two of them are the same, and what is none."""

from fractions import Fraction

import pytest

from vismem.data.numbers import LONGEST, parse_number, read_number, same_number


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("12", "12", ""),
        ("12.50", "25/2", ""),
        ("1,234,567", "1234567", ""),
        ("-3", "-3", ""),
        ("\u22123.5", "-7/2", ""),
        ("minus three", "-3", ""),
        ("+3", "3", ""),
        (".5", "1/2", ""),
        ("3/4", "3/4", ""),
        ("2 1/2", "5/2", ""),
        ("2\u00bd", "5/2", ""),
        (r"\frac{3}{4}", "3/4", ""),
        ("two thirds", "2/3", ""),
        ("half", "1/2", ""),
        ("one hundred and five", "105", ""),
        ("twenty-one", "21", ""),
        ("two thousand three hundred", "2300", ""),
        ("a dozen", "12", ""),
        ("1.2 million", "1200000", ""),
        (r"1.2 \times 10^{-3}", "3/2500", ""),
        ("50 %", "50", "%"),
        ("50 per cent", "50", "%"),
        ("$5", "5", ""),
        ("\u20ac5", "5", "\u20ac"),
        ("5 centimetres", "5", "cm"),
        ("5 cm\u00b2", "5", "cm^2"),
        ("5 square meters", "5", "m^2"),
        (r"30^\circ", "30", "\u00b0"),
        ("30 degrees Celsius", "30", "\u00b0c"),
    ],
)
def test_a_number_has_an_exact_value_and_a_unit(text: str, value: str, unit: str) -> None:
    number = parse_number(text)
    assert number is not None
    assert (number.value, number.unit) == (Fraction(value), unit)


@pytest.mark.parametrize(
    "text", ["", "a", "1,5", "3:4", "3-4", "2nd", "A4", "1/0", "12 apples", "10^3", r"2\sqrt{3}", "3/"]
)
def test_what_is_no_number_as_a_whole_is_none(text: str) -> None:
    assert parse_number(text) is None


def same(reply: str, reference: str) -> bool:
    numbers = parse_number(reply), parse_number(reference)
    assert None not in numbers
    return same_number(*numbers)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        ("12", ["12", "12.0", "twelve", "24/2", "1.2e1", "12 cm"], ["12.4", "11.9999", "-12", "13"]),
        ("3.14", ["3.14", "3.140", "3.1416", "22/7", "3.145"], ["3.1", "3", "3.13", "3.146", "-3.14"]),
        ("1.50", ["1.5", "3/2"], ["1.51", "2"]),
        ("1/3", ["1/3", "0.33", "0.3333", "2/6"], ["0.3", "0.34", "0.32", "1/4"]),
        ("1/2", ["0.5", "half", "50%"], ["0.4", "5%"]),
        ("50%", ["50", "50%", "0.5", "1/2", "fifty percent"], ["5", "0.05", "50 cm", "0.5%"]),
        ("50", ["50%", "50"], ["0.5", "500%"]),
        ("12.5%", ["12.5", "0.125", "1/8", "12.54%", "0.1254"], ["0.08", "0.1", "0.13", "0.17"]),
        ("0.5%", ["0.005", "0.5"], ["0", "0.01"]),
        ("1/3", ["33.33%"], ["33.00%", "0.3367"]),
        ("5 cm", ["5", "5 cm", "5 centimeters"], ["5 m", "5 mm", "5 cm^2", "5%", "6 cm"]),
        ("30\u00b0", ["30", "30 degrees", "30 degrees celsius"], ["30 m", "31"]),
        ("30 degrees celsius", ["30 degrees", "30"], ["30 degrees fahrenheit"]),
        ("1.2 million", ["1,200,000"], ["1,234,000"]),
        ("-3", ["-3", "minus 3", "\u22123"], ["3"]),
    ],
)
def test_a_reply_is_the_reference_s_number_to_its_precision_and_in_its_unit(
    reference: str, right: list[str], wrong: list[str]
) -> None:
    assert [reply for reply in right if not same(reply, reference)] == []
    assert [reply for reply in wrong if same(reply, reference)] == []


def test_a_sentence_states_a_number_if_it_is_the_only_one() -> None:
    def value(text: str) -> Fraction | None:
        number = read_number(text)
        return number.value if number else None

    assert value("In figure 2 there are 12 apples, on the 1st shelf of A4.") == 12
    assert value("It is 12 (twelve).") == 12
    for text in ("3 dogs at 12:30", "12 on 2023-01-05", "12 cm and 12 m", "12 of \u221a3", "12 <= x", "x > 12", "- 12"):
        assert value(text) is None, text


def test_what_is_too_long_to_state_a_number_is_not_searched() -> None:
    assert read_number("12 apples" + " and pears" * LONGEST) is None
    assert parse_number("1" * (LONGEST + 1)) is None
    assert parse_number("1" * LONGEST) is None, "a number of thirty digits is the longest"

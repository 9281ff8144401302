"""Numbers in words, compared as numbers."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind_jax.tools.answers import numbers_in, same_number, says


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("It is 1,234.50 or -3.", ["1234.50", "-3"]),
        ("10-4 = 6, (5)-2 = 3", ["10", "4", "6", "5", "2", "3"]),
        ("利润为$20000，约１２％", ["20000", "12"]),
        ("3,4,5 and 12,34", ["3", "4", "5", "12", "34"]),
        ("5km in v2 of x_3 at 1e5", ["5", "1E+5"]),
        ("$20,000,000.", ["20000000"]),
        ("为-5 and −7", ["-5", "-7"]),
        ("", []),
    ],
)
def test_numbers_of_a_text(text, numbers):
    assert numbers_in(text) == [Decimal(number) for number in numbers]


@pytest.mark.parametrize(
    ("expected", "found", "same"),
    [
        ("5", "150", False),
        ("425.50", "425.5", True),
        ("2797", "2797.0", True),
        ("2797", "2797.4", False),
        ("1000000", "1000001", False),
        ("3.3333333333333335", "3.33", True),
        ("3.3333333333333335", "3.3", False),
        ("425.57", "425.6", False),
        ("0.001234", "0.00", False),
        ("22.86", "22.857142", True),
        ("22.86", "-22.86", False),
        ("99999999980000000001", "99999999980000000000", False),
    ],
)
def test_rounding_is_allowed_and_pieces_of_numbers_are_not(expected, found, same):
    assert same_number(Decimal(expected), Decimal(found)) is same


def test_each_number_must_be_said():
    assert says("first 4,499, then 2373 and 729", [Decimal(4499), Decimal(729)])
    assert not says("first 4,499, then 2373", [Decimal(4499), Decimal(729)])


@given(st.text(st.sampled_from("0123456789.,eE+-()% 五a")))
def test_any_text_is_read(text):
    for number in numbers_in(text):
        assert same_number(number, number)

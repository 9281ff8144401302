"""Numbers in words, compared as numbers."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind_jax.tools.answers import is_right, marked, numbers_in, same_number, says


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


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("48/2 = 24\n48+24 = 72\n#### 72", "72"),
        (r"so \boxed{1} is wrong, \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed{{a}{b}} {c}", "{a}{b}"),
        (r"\boxed{never closed", "never closed"),
        ("#### 5 clips\nand 6 more", "5 clips"),
        ("<answer>\n5\n</answer> or 6", "5"),
        ("<answer>1</answer><answer>2</answer>", "2"),
        ("The answer is 5.\nNot 6", "5."),
        ("Final Answer : B", "B"),
        ("答案是：9页。", "：9页。"),
        ("nothing marks 5", ""),
        ("answer is", ""),
        ("</answer> 5 <answer>", ""),
        ("", ""),
    ],
)
def test_the_final_answer_that_is_marked(text, found):
    assert marked(text) == found


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("It is 6.", "6", True),
        ("It is 36.", "6", False),
        ("6, 7, 8, 9", "6", False),
        ("48 + 24 = 72", "72", True),
        ("The answer is 72, which is half of 144.", "72", True),
        ("The answer is 1. The answer is 72.", "1", False),
        (r"\boxed{71} and then 72", "72", False),
        ("72", "48/2 = 24\n48+24 = 72\n#### 72", True),
        ("It costs $1,234.50", "1234.5", True),
        ("20 %", "20%", True),
        ("7.0", "7", True),
        ("7.4", "7", False),
        ("-5", "5", False),
        ("Ｉt is ７", "7", True),
        ("", "6", False),
        ("no number", "6", False),
        ("Paris.", "paris", True),
        ("The answer is Paris!", "Paris", True),
        ("It is Paris", "Paris", False),
        ("Not Paris", "Paris", False),
        ("B", "(B)", True),
        ("AB", "B", False),
        ("", "Paris", False),
        ("", "?", False),
        ("还剩 2/6。", "2/6", True),
        ("还剩 1/3。", "2/6", True),
        ("还剩 2/6 和 1/2。", "2/6", False),
        (r"\boxed{\frac{2}{6}}", "2/6", True),
        ("12/6", "2/6", False),
        ("2/0", "2/6", False),
        ("2/6", r"\boxed{\dfrac{2}{6}}", True),
        ("还剩 2/6。", "6", False),
        ("The answer is 1/2.", "1", False),
        ("48/2 = 24", "24", True),
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        ("0.50", r"$\frac{1}{2}$", True),
        ("0.33", "1/3", False),
        ("on 16/9/2020", "2020", True),
    ],
)
def test_whether_an_answer_is_right(answer, expected, right):
    assert is_right(answer, [expected]) is right


def test_of_several_numbers_each_is_said_and_few_others():
    question, expected = "9575-5076, 6818-4445, 9**3", ["4499", "2373", "729"]
    assert is_right("9575-5076 = 4499, 6818-4445 = 2373, 9**3 = 729", expected, question)
    assert is_right("729, 2373 and 4,499", expected)
    assert not is_right("729 and 4499", expected, question)
    assert not is_right(" ".join(map(str, range(5000))), expected, question)
    for several in (["Paris", "London"], ["1", "2/6"], []):
        with pytest.raises(ValueError, match="one text, or numbers"):
            is_right("Paris and London", several)


PIECES = st.sampled_from(
    ["####", r"\boxed{", "}", "{", "<answer>", "</answer>", "answer is ", "答案是", "1", "/", "2.5", "\n", "e9", "frac"]
)


@given(st.lists(PIECES, max_size=30).map("".join), st.one_of(st.lists(PIECES, max_size=5).map("".join), st.text()))
def test_any_answer_is_judged(answer, expected):
    assert is_right(answer, [expected]) in (True, False)
    if not is_right("", [expected]):  # what is expected says something
        assert is_right(expected, [expected])

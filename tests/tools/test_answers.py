"""Numbers in words, compared as numbers."""

import time
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


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        *((chinese, digits, True) for chinese, digits in [
            ("一共有一百二十三个。", "123"), ("两个", "2"), ("答案：二十", "20"), ("百分之五十", "50%"),
            ("三分之二", "2/3"), ("一万两千", "12000"), ("两千三百", "2300"), ("一千零一", "1001"),
            ("一亿两千万", "120000000"), ("3.5万", "35000"),
            ("二〇二四", "2024"), ("负三点五", "-3.5"), ("答案是5", "五"), ("还剩十二元。", "12"),
        ]),
        *((words, digits, False) for words, digits in [
            ("万一出错怎么办", "1"), ("千万别去", "10000000"), ("十分高兴", "10"), ("第一名", "1"),
            ("我有七八个", "78"),
            ("我一点也不知道", "1"), ("1万", "1"),
        ]),
        *((latex, expected, True) for latex, expected in [
            (r"\boxed{\text{Paris}}", "Paris"), (r"\boxed{\textbf{(C)}}", "C"), (r"\boxed{x = 5}", "x=5"),
            (r"\boxed{x=5}", "5"),
            (r"\boxed{5\text{ cm}^2}", "5"), (r"\frac12", "1/2"), (r"\frac{1}{-2}", "-0.5"), (r"-1\frac{1}{2}", "-1.5"),
            (r"\frac{1,000}{2}", "500"), (r"\boxed{\frac{2\pi}{3}}", r"\dfrac{2 \pi}{3}"), (r"\sqrt2", r"\sqrt{2}"),
            (r"3 \times 10^{5}", "300000"), (r"10^{-3}", "0.001"), (r"\boxed{2^{10}}", "1024"), (r"50\%", "50"),
            (r"45^\circ", "45"), (r"\left(1,2\right)", "(1, 2)"), (r"1,\!234", "1234"), ("1{,}234", "1234"),
        ]),
        (r"\frac{1}{0}", "0", False),
        ("(1,2)", "(2,1)", False),
        *((number, "1234.5", True) for number in ["1 234.5", "1\u202f234.5", "１，２３４．５", "1'234.50"]),
        ("1 234", "234", False),
        ("100 200 300", "300", False),
        ("1½", "1.5", True),
        ("2 1/2", "1/2", False),
        (".5", "0.5", True),
        (".5", "5", False),
        ("3²", "9", True),
        *((text, "-5", True) for text in ["(−5)", "- 5", "–5", "negative 5", "minus 5", "x = -5"]),
        ("3–5", "-5", False),
        ("10 minus 5 is 5", "5", True),
        *((text, "5 km", True) for text in ["It is 5 km.", "5", "5 kilometres", r"\boxed{5\,\text{km}}"]),
        *((text, "5 km", False) for text in ["5 cm", "6 km", "5 kg"]),
        ("12", "12 Angry Men", False),
        ("5", "5x", False),
        ("90 degrees", "90°", True),
        *((text, "50%", True) for text in ["0.5", "1/2", "50 percent", "50"]),
        *((text, "50%", False) for text in ["0.5%", "5000%", "5"]),
        ("The answer is 2+3 = 5", "5", True),
        ("#### 48+24=72", "72", True),
        ("The answer is 5, because 2+2=4", "5", True),
        ("The answer is 5.00.", "5", True),
    ],
)  # fmt: skip
def test_numbers_in_every_notation(answer, expected, right):
    assert is_right(answer, [expected]) is right


def test_a_long_text_is_read_at_once():
    started = time.process_time()
    for piece in ("1 ", "一", "1/", r"\frac{1}{", "2^", "10^", "点二", "{", "= ", "a b ", "-", "1,234 "):
        is_right(piece * (100_000 // len(piece)), ["5 km"])
    assert time.process_time() - started < 20


PIECES = st.sampled_from(
    ["####", r"\boxed{", "}", "{", "<answer>", "</answer>", "answer is ", "答案是", "1", "/", "2.5", "\n", "e9", "frac"]
)


@given(st.lists(PIECES, max_size=30).map("".join), st.one_of(st.lists(PIECES, max_size=5).map("".join), st.text()))
def test_any_answer_is_judged(answer, expected):
    assert is_right(answer, [expected]) in (True, False)
    if not is_right("", [expected]):  # what is expected says something
        assert is_right(expected, [expected])

"""Schemas of functions, against transformers' own; arguments against schemas."""

from typing import Any, Literal

import pytest

from minimind_jax.errors import UserError
from minimind_jax.tools.builtin import BUILTIN
from minimind_jax.tools.schema import fitted, schema_of


def book(city: str, nights: int, budget: float = 100.0, kind: Literal["hotel", "hostel"] = "hotel",
         wishes: list[str] | None = None, more: dict | None = None, breakfast: bool = False) -> str:  # fmt: skip
    """Books a room.

    It is paid later.

    Args:
        city: where it is,
            with its country
        nights: how many
        budget: for one night
        kind: of house
        wishes: of the guest
        more: whatever else there is
        breakfast: whether it is wanted

    Returns:
        The number of the booking.
    """
    return f"{city} {nights}"


def test_a_schema_is_what_transformers_makes_of_the_function():
    utils = pytest.importorskip("transformers.utils")
    expected = utils.get_json_schema(book)["function"]
    found = schema_of(book)["function"]
    defaults = {name: told.pop("default", "none") for name, told in found["parameters"]["properties"].items()}
    expected.pop("return", None)
    for told in expected["parameters"]["properties"].values():
        if "enum" in told:
            told.setdefault("type", "string")
    expected["description"] = " ".join(expected["description"].split())
    assert found == expected
    assert defaults == {
        "city": "none", "nights": "none", "budget": 100.0, "kind": "hotel", "wishes": None, "more": None,
        "breakfast": False,
    }  # fmt: skip


def test_sphinx_docstrings_are_read_too():
    def look(word: str, exact: bool = True):
        """Looks a word up.

        :param word: what is looked up
        :param exact: whether in this spelling only
        :return: what it means
        """

    told = schema_of(look)["function"]
    assert told["description"] == "Looks a word up."
    descriptions = [schema["description"] for schema in told["parameters"]["properties"].values()]
    assert descriptions == ["what is looked up", "whether in this spelling only"]


def test_our_own_tools_tell_all_their_parameters():
    for function in BUILTIN.values():
        told = schema_of(function)["function"]
        assert told["description"]
        assert all(schema["description"] and schema["type"] for schema in told["parameters"]["properties"].values())


def without_hint(x):
    pass


def with_rest(*words: str):
    pass


def with_odd_hint(x: complex):
    pass


def with_odd_default(x: str = object()):
    pass


async def later(x: str):
    pass


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (without_hint, "parameter x has no type hint"),
        (with_rest, "by their names"),
        (with_odd_hint, "complex"),
        (with_odd_default, "default"),
        (later, "asynchronous"),
    ],
)
def test_a_function_that_a_model_could_not_call_is_refused(function, words):
    with pytest.raises(UserError, match=words):
        schema_of(function)


def take(number: float, count: int, names: list[str], kind: Literal["a", "b"] = "a", any: Any = None) -> str:
    """Takes all kinds."""


GOOD = {"number": 1, "count": 2, "names": ["x"]}


@pytest.mark.parametrize("more", [{}, {"count": 2.0}, {"kind": "b"}, {"any": {"deep": [1]}}, {"number": 1e308}])
def test_arguments_that_fit(more):
    given = fitted(schema_of(take)["function"]["parameters"], GOOD | more)
    assert given == GOOD | more and type(given["count"]) is int


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (None, "arguments must be of type object, not null"),
        ([], "not array"),
        ("{}", "not string"),
        ({}, "the argument number is missing"),
        (GOOD | {"count": 2.5}, "count must be of type integer, not number"),
        (GOOD | {"count": True}, "count must be of type integer, not boolean"),
        (GOOD | {"count": "2"}, "count must be of type integer, not string"),
        (GOOD | {"number": float("nan")}, "number is no finite number"),
        (GOOD | {"number": float("inf")}, "number is no finite number"),
        (GOOD | {"names": ["x", None]}, r"names\[1\] must be of type string, not null"),
        (GOOD | {"kind": "c"}, "kind must be one of a, b"),
        (GOOD | {"x" * 99: 1}, "there is no argument 'x{40}'; there are number, count"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_words(arguments, words):
    with pytest.raises(ValueError, match=words):
        fitted(schema_of(take)["function"]["parameters"], arguments)


def test_what_may_be_null_may_be_left_out():
    def find(word: str | None) -> str:
        """Finds."""

    assert fitted(schema_of(find)["function"]["parameters"], {}) == {"word": None}


def test_a_null_that_does_not_fit_is_as_if_it_were_left_out():
    def count(word: str, most: int = 3, least: int | None = 1) -> int:
        """Counts."""

    schema = schema_of(count)["function"]["parameters"]
    assert fitted(schema, {"word": "a", "most": None, "least": None}) == {"word": "a", "least": None}
    with pytest.raises(ValueError, match="word is missing"):
        fitted(schema, {"word": None})


def test_a_whole_number_may_have_any_length():
    assert fitted({"type": "number"}, 10**400) == 10**400

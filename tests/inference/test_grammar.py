"""Grammars of strangers: what cannot be followed is refused, what only looks large is not."""

import json
import re

import jsonschema
import pytest
from bound_answers import drawn, ours, text_of

from minimind_jax.errors import UserError
from minimind_jax.inference.constrain import Grammars
from minimind_jax.inference.grammar import json_object, json_schema, lark, regex, tool_calls


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    tokenizer = ours(tmp_path_factory.mktemp("tokenizer"))
    grammars = Grammars(tokenizer)
    yield tokenizer, grammars
    grammars.close()


def deep(levels):
    return json.loads('{"type":"object","properties":{"a":' * levels + "{}" + "}}" * levels)


def chain(links):
    steps = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(links)}
    return {"$ref": "#/$defs/d0", "$defs": {**steps, f"d{links}": {"type": "string"}}}


REFUSED = {
    "a type that there is not": (lambda: json_schema({"type": "strng"}), "Invalid type"),
    "a keyword that is not supported": (lambda: json_schema({"type": "array", "contains": {}}), "contains"),
    "a format that is unknown": (lambda: json_schema({"type": "string", "format": "odd"}), "Unknown format"),
    "one on another machine": (lambda: json_schema({"$ref": "http://127.0.0.1:9/a.json"}), "does not fetch"),
    "a file": (lambda: json_schema({"$ref": "file:///etc/passwd"}), "does not fetch"),
    "itself and no more": (lambda: json_schema({"$ref": "#"}), "no text fits"),
    "no number between": (lambda: json_schema({"type": "integer", "minimum": 5, "maximum": 1}), "minimum"),
    "too many values": (lambda: json_schema({"enum": [f"value {i}" for i in range(10**5)]}), "longer than 50,000"),
    "too many parts": (lambda: json_schema({"allOf": [{"pattern": f"a{i}"} for i in range(99)]}), "took "),
    "too deep": (lambda: json_schema(deep(200)), "recursion limit"),
    "too long a chain": (lambda: json_schema(chain(1000)), "ended its own process"),
    "half a character": (lambda: json_schema({"const": "\ud800"}), "JSON"),
    "an open bracket": (lambda: regex("(a"), "invalid regex"),
    "a look ahead": (lambda: regex("a(?=b)"), "invalid regex"),
    "nothing": (lambda: regex(r"[^\s\S]"), "no text fits"),
    "a rule that there is not": (lambda: lark("start: foo"), "unknown name"),
    "no start": (lambda: lark("a: b"), "start"),
    "a rule that has no end": (lambda: lark('start: start "a"'), "no text fits"),
    "brackets": (lambda: lark("start: " + "(" * 20000 + '"a"' + ")" * 20000), "nested"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_followed_is_refused_and_the_process_lives(own, what):
    form, message = REFUSED[what]
    with pytest.raises(UserError, match=f"(?s)^response_format: .*({message})"):
        own[1].constraint(form(), where="response_format")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "maxLength": 10**9},
        {"type": "array", "items": {"type": "integer"}, "maxItems": 10**9},
        {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"},
        {"type": "string", "pattern": "^(a|aa)+$"},
        {"enum": [f"value number {i}" for i in range(1000)]},
        deep(40),
        chain(50),
        {**json_object().parts[0]["json_schema"], "x-guidance": {"whitespace_pattern": " *", "lenient": True}},
    ],
)
def test_large_numbers_cost_nothing(own, schema):
    tokenizer, grammars = own
    constraint = grammars.constraint(json_schema(schema), 90)
    ids, ended = drawn(tokenizer, constraint, 0, 90)
    assert ended
    jsonschema.validate(json.loads(text_of(tokenizer, ids)), schema)
    assert "  " not in re.sub('"[^"]*"', "", text_of(tokenizer, ids))


def test_parameters_that_are_no_object_are_refused(own):
    with pytest.raises(UserError, match="tool 'f': parameters must be"):
        tool_calls([{"name": "f", "parameters": {"type": "string"}}], own[1].tag)

"""Grammars of strangers: what cannot be followed is refused, what only looks large is not."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest
from bound_answers import drawn, text_of

from minimind_jax.data.tools import parse_calls
from minimind_jax.errors import UserError
from minimind_jax.inference import constrain
from minimind_jax.inference.constrain import Grammars, tokens_of
from minimind_jax.inference.grammar import json_object, json_schema, lark, regex, tool_calls
from minimind_jax.inference.request import Busy


def deep(levels):
    return json.loads('{"type":"object","properties":{"a":' * levels + "{}" + "}}" * levels)


def chain(links):
    steps = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(links)}
    return {"$ref": "#/$defs/d0", "$defs": {**steps, f"d{links}": {"type": "string"}}}


REFUSED = {
    "a type that there is not": (lambda: json_schema({"type": "strng"}), "Invalid type"),
    "a keyword that is not supported": (lambda: json_schema({"type": "array", "contains": {}}), "contains"),
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


def test_who_asks_while_hostile_grammars_are_tried_does_not_wait_for_ever(own, monkeypatch):
    monkeypatch.setattr(constrain, "_AT_ONCE", 1)
    monkeypatch.setattr(constrain, "_WAIT_SECONDS", 0.1)
    grammars, hostile = Grammars(own[0]), REFUSED["too many parts"][0]()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(grammars.constraint, hostile)
        while not grammars._trials:
            time.sleep(0.01)
        with pytest.raises(Busy, match="ask again"):
            grammars.constraint(regex("new"))
        assert isinstance(first.exception(), UserError)
    assert grammars.constraint(regex("new"))
    grammars.close()


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


TAMED = [
    ({"type": "string", "format": "password"}, '"x"', "1"),
    ({"type": "array", "items": {"type": "integer"}, "uniqueItems": False}, "[1, 1]", '["a"]'),
    ({"$schema": "https://example.com/own", "type": "boolean"}, "true", "1"),
    ({"type": "number"}, "-12.5", "1e5"),
    ({"type": "number"}, "-12.5", "9" * 16),
    ({"type": "number", "minimum": -5}, "5", "9" * 16),
    ({"type": "integer"}, "-12", "9" * 16),
    ({"type": ["integer", "null"]}, "null", "9" * 16),
    ({"type": "integer", "multipleOf": 5}, "15", "9" * 15 + "5"),
    ({"type": "integer", "maximum": 2**53 - 1}, "9" * 15, "9" * 17),
    ({}, '{"a": [1.5, null, {"b": "c"}]}', "1e999"),
    ({"title": "Any", "default": None}, "[1]", "[1e999]"),
    ({"type": "object"}, '{"a": 1}', '{"a": {"b": 1e999}}'),
    ({"type": "array"}, "[[1], true]", "[1e999]"),
    ({"type": "array", "prefixItems": [{"type": "null"}]}, "[null, 1]", "[null, 1e999]"),
    ({"properties": {"a": True}, "required": ["a"]}, '{"a": {"b": 1}}', '{"a": 1e999}'),
    ({"properties": {"a": {"description": "b"}}}, '{"a": 1}', '{"a": 1e999}'),
    ({"anyOf": [{"description": "b"}, {"type": "null"}]}, "2", "1e999"),
    ({"minLength": 2}, '"ab"', '"a"'),
    ({"additionalProperties": True, "type": "object"}, '{"a": 1}', '{"a": 1e999}'),
    ({"enum": [1, "a"]}, "1", "2"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {}}}, "1", "1e999"),
    ({"type": "number", "minimum": 3}, "4.5", "2"),
    ({"type": "number", "maximum": 10**18}, "1000000000000000", '"a"'),
    ({"type": "object", "properties": {"a": {}}}, '{"a": [1]}', '{"b": 1}'),
    ({"type": "object", "properties": {"a": {}}, "additionalProperties": True}, '{"b": 1}', "[]"),
    ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, '{"a":1,"b": 1}', '{"a": 1}'),
    ({"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}], "type": "object"}, '{"a": 1, "b": 2}', "1"),
    (
        {"type": "object", "properties": {"k": {}}, "anyOf": [{"properties": {"x": {}}, "required": ["x"]}]},
        '{"k": 1, "x": 2}',
        '{"k": 1}',
    ),
    ({"const": {"format": "password", "properties": {"a": 1}}}, '{"format":"password","properties":{"a":1}}', "{}"),
]


@pytest.mark.parametrize(("schema", "fits", "does_not"), TAMED)
def test_what_a_schema_leaves_open_is_narrowed_and_nothing_else(own, schema, fits, does_not):
    tokenizer, grammars = own
    jsonschema.validate(json.loads(fits), {key: value for key, value in schema.items() if key != "$schema"})
    assert follows(grammars.constraint(json_schema(schema)), tokenizer, fits)
    assert not follows(grammars.constraint(json_schema(schema)), tokenizer, does_not)


def follows(constraint, tokenizer, text):
    """Whether the text may be made, and end."""
    for token in tokenizer.encode(text):
        if token not in tokens_of(constraint.mask()):
            return False
        constraint.accept(token)
    return bool({*tokens_of(constraint.mask())} & {*tokenizer.end_ids})


def test_what_a_tool_wants_beyond_that_is_left_out_and_noted(own):
    tokenizer, grammars = own
    parameters = {
        "type": "object",
        "properties": {"ids": {"type": "array", "uniqueItems": True, "items": {"type": "integer"}}},
        "required": ["ids"],
    }
    form = tool_calls([{"name": "f", "parameters": parameters}], grammars.tag, required=True, parallel=False)
    constraint = grammars.constraint(form, 80)
    assert ["uniqueItems" in note for note in constraint.notes] == [True]
    _, [call] = parse_calls(text_of(tokenizer, drawn(tokenizer, constraint, 1, 80)[0]))
    assert all(isinstance(number, int) for number in call.arguments["ids"])


@pytest.mark.parametrize(
    "pattern", [r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$", r"^(?<=a)b", r"^(a|b)\1$", r"\bword\b", r"a\\\bb"]
)  # fmt: skip
def test_a_pattern_that_cannot_be_followed_is_left_to_the_tool_and_refused_of_a_form(own, pattern):
    tokenizer, grammars = own
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": pattern}}, "required": ["a"]}
    form = tool_calls([{"name": "f", "parameters": schema}], grammars.tag, required=True, parallel=False)
    constraint = grammars.constraint(form, 80)
    assert [pattern in note for note in constraint.notes] == [True]
    _, [call] = parse_calls(text_of(tokenizer, drawn(tokenizer, constraint, 1, 80)[0]))
    assert isinstance(call.arguments["a"], str)
    with pytest.raises(UserError, match=r"not supported"):
        grammars.constraint(json_schema(schema))


def test_patterns_that_only_look_so_are_followed(own):
    tokenizer, grammars = own
    schema = {"type": "object", "properties": {"a": {"pattern": r"^(?:\\b|[(]?!)$", "type": "string"}}}
    form = json_schema(schema, lenient=True)
    assert not form.notes
    assert follows(grammars.constraint(form), tokenizer, r'{"a": "\\b"}')
    assert not follows(grammars.constraint(form), tokenizer, r'{"a": "b"}')


def test_a_schema_that_fits_leaves_nothing_to_note(own):
    _, grammars = own
    assert grammars.constraint(json_schema({"type": "string"})).notes == []


def test_parameters_that_are_no_object_are_refused(own):
    with pytest.raises(UserError, match="tool 'f': parameters must be"):
        tool_calls([{"name": "f", "parameters": {"type": "string"}}], own[1].tag)

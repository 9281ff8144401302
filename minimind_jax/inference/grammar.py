"""What an answer must be, as grammars that llguidance reads: JSON, a regular expression, a choice, calls of tools.

Its Lark is described in llguidance's docs/syntax.md. A tag such as <tool_call> is one token in most tokenizers, and
then no text can hold it; where it is none, it is spelled.
"""

import importlib
import json
import random
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Literal, NamedTuple

from minimind_jax.data.messages import CLOSE_THINK, OPEN_THINK
from minimind_jax.errors import UserError

OPEN_CALL, CLOSE_CALL = "<tool_call>", "</tool_call>"

# A model that draws at random never ends a run of white space, so there is at most the blank that json.dumps writes.
_AS_JSON_DUMPS = {"item_separator": ", ?", "key_separator": ": ?", "whitespace_flexible": False}
_FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
_SAYS_MORE = {"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref", "if", "not"}
_MERGED = {"$ref", "enum", "const", "allOf", "anyOf", "oneOf"}  # which say what a schema without a type is
_KINDS = ("string", "number", "boolean", "null", "object", "array")
_ANY = {"$ref": "#/$defs/x-any"}
_ANY_VALUE = {"type": [*_KINDS], "items": _ANY, "additionalProperties": _ANY}
# What Rust's `regex` does not have: look-around, references, edges of words, control letters.
_BEYOND_REGEX = re.compile(r"(?<!\\)(?:\\\\)*(?:\(\?<?[=!]|\\[1-9bBck])")
SPECIAL = b"\xff"  # llguidance's sign that a token is no text
_WALK = 24  # tokens
_STACK = 1 << 20  # bytes: a grammar that fits into it fits into the stack of any thread


class Form(NamedTuple):
    """What an answer must be."""

    rule: str  # the right side of a Lark rule
    rules: str = ""  # others
    parts: tuple[dict[str, Any], ...] = ()  # grammars that these name
    calls: bool = False  # tools may be called
    is_free: bool = False  # it is words that may end anywhere, until a call begins
    notes: tuple[str, ...] = ()  # what of a schema is left out


Tag = Callable[[str], int | None]  # the token that a tag is, or None


def llguidance() -> ModuleType:
    """The library; no other part needs it. Raises UserError where it is not installed."""
    try:
        return importlib.import_module("llguidance")
    except ImportError as error:
        raise UserError(
            "answers of a given form need llguidance, which is not installed: pip install 'llguidance>=1.9'"
        ) from error


def json_object() -> Form:
    """Any JSON object."""
    return json_schema({"type": "object"})


def json_schema(schema: Mapping[str, Any], name: str = "json", lenient: bool = False) -> Form:
    """JSON that a schema accepts, on one line.

    Where the schema says nothing of it, objects with properties have no others, and numbers stay between -1e15 and
    1e15, without an exponent. lenient: keywords and patterns that llguidance does not know are left out, with a note;
    else they are an error of the constraint.
    """
    left_out: list[str] = []
    options = {**_AS_JSON_DUMPS, "lenient": lenient, "coerce_one_of": lenient}
    try:
        text = json.dumps(schema, ensure_ascii=False)
        closes = not any(f'"{key}"' in text for key in ("allOf", "unevaluatedProperties"))
        tame = _tame(schema, closes, left_out if lenient else None)
    except RecursionError:
        raise UserError("the schema is nested too deeply") from None
    if "json-schema.org" not in str(tame.get("$schema")):
        tame.pop("$schema", None)  # the name of a vocabulary elsewhere, which nobody fetches
    if isinstance(tame.get("$defs", {}), Mapping):
        tame["$defs"] = {**tame.get("$defs", {}), "x-any": _between(_ANY_VALUE)}
    parts = ({"name": name, "json_schema": {**tame, "x-guidance": options}},)
    return Form(f"@{name}", parts=parts, notes=tuple(left_out))


def _tame(schema: Any, closes: bool, left_out: list[str] | None) -> Any:
    """The schema as a model needs it that is not sure of itself; whatever the result accepts, the schema accepts.

    A number such as 1e999 is JSON, and none that a program can hold. Objects are open by JSON Schema's default, which
    few mean. A format that is not known to llguidance says nothing of the text (JSON Schema: an annotation). A keyword
    that is null is none: so some programs write what is not set. closes: objects may be closed; parts of one that is
    put together may not. left_out: takes the patterns and types that cannot be followed; None leaves them in.
    """
    if not isinstance(schema, Mapping):
        return _ANY if schema is True and closes else schema
    schema = {key: value for key, value in schema.items() if value is not None or key in ("const", "default")}
    known = schema.get("properties")
    for key in schema.keys() & {"items", "additionalProperties"}:
        schema[key] = _tame(schema[key], closes, left_out)
    for key in schema.keys() & {"properties", "patternProperties", "$defs", "definitions"}:
        if isinstance(schema[key], Mapping):
            inside = {name: inner for name, inner in schema[key].items() if inner is not None}
            schema[key] = {name: _tame(inner, closes, left_out) for name, inner in inside.items()}
    for key in schema.keys() & {"prefixItems", "anyOf", "oneOf", "allOf"}:
        if isinstance(schema[key], list):
            schema[key] = [_tame(inner, closes and not known, left_out) for inner in schema[key]]
    if schema.get("uniqueItems") is False:
        del schema["uniqueItems"]
    if schema.get("format") not in _FORMATS:
        schema.pop("format", None)
    if left_out is not None:
        if _BEYOND_REGEX.search(str(schema.get("pattern", ""))):
            left_out.append(f"the pattern {schema.pop('pattern')}")
        if isinstance(schema.get("type"), str) and schema["type"] not in ("integer", *_KINDS):
            left_out.append(f"the type {schema.pop('type')!r}")
    if closes and "type" not in schema and not schema.keys() & _MERGED:
        schema["type"] = [*_KINDS]
    kinds = schema["type"] if isinstance(schema.get("type"), list) else [schema.get("type")]
    if any(kind in ("number", "integer") for kind in kinds) and not schema.keys() & {"enum", "const"}:
        schema = _between(schema)
    if closes and isinstance(known, Mapping) and not schema.keys() & _SAYS_MORE:
        required = schema.get("required") or []
        if isinstance(required, list) and all(name in known for name in required):
            schema["additionalProperties"] = False
    if closes and not schema.keys() & _MERGED:
        for kind, key in (("array", "items"), ("object", "additionalProperties")):
            if kind in kinds:
                schema.setdefault(key, _ANY)
    return schema


def _between(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema of numbers with bounds on both sides, where those it has leave room for that."""
    own = [value for key, value in schema.items() if key.lower().endswith("imum")]
    for side, bound in (("minimum", -(10**15)), ("maximum", 10**15)):
        if side not in schema and f"exclusive{side.title()}" not in schema:
            if all(isinstance(value, int | float) and abs(value) < 10**15 for value in own):
                schema = {**schema, side: bound}
    return schema


def regex(pattern: str) -> Form:
    r"""The whole answer matches. In the syntax of Rust's `regex`: no look-around, no references; \d is 0 to 9."""
    return Form("REGEX", f"REGEX: /{llguidance().regex_to_lark(pattern, 'd')}/")


def choice(texts: Sequence[str]) -> Form:
    """One of the texts."""
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError("expected a list of one or more texts to choose from")
    return Form("CHOICE", f"CHOICE: {' | '.join(map(json.dumps, dict.fromkeys(texts)))}")


def lark(text: str) -> Form:
    """A grammar in llguidance's Lark, which begins at `start`."""
    return Form("@lark", parts=({"name": "lark", "lark_grammar": text},))


def tool_calls(
    tools: Sequence[Mapping[str, Any]], tag: Tag, required: bool = False, name: str = "", parallel: bool = True
) -> Form:
    """Words and then calls of the tools, as our template and many others write them, each with arguments that its
    schema accepts.

    required: calls without words. name: of the only tool that may be called. Without tools: words that call none.
    What cannot be enforced of a schema is left out, since a tool says itself what is wrong with a call.
    Raises UserError for a name that no tool has.
    """
    offered = [tool.get("function") or tool for tool in tools]
    names = [tool["name"] for tool in offered]
    if name and name not in names:
        raise UserError(f"there is no tool {name[:60]!r} to call; there are {', '.join(names) or 'none'}")
    kept = [tool for tool in offered if name in ("", tool["name"])]
    if not kept:
        return Form("WORDS", _words(OPEN_CALL), is_free=True)
    rules, parts, notes = [], [], []
    for index, tool in enumerate(kept):
        form = json_schema(_arguments(tool), f"arguments{index}", lenient=True)
        begin = json.dumps({"name": tool["name"]}, ensure_ascii=False)[:-1] + ', "arguments": '
        rules.append(f"{json.dumps(begin)} {form.rule} {json.dumps('}')}")
        parts += form.parts
        notes += form.notes
    line_break = json.dumps("\n")
    lines = [
        f"call: {_shown(OPEN_CALL, tag)} inside",
        f"inside: {line_break} ({' | '.join(rules)}) {line_break} {_shown(CLOSE_CALL, tag)}",
        f"more: ({line_break}? call)* {line_break}?" if parallel else "more:",
    ]
    if required:
        return Form("call more", "\n".join(lines), tuple(parts), calls=True, notes=tuple(notes))
    lines += [_until("words_and_tag", OPEN_CALL, tag), _words(OPEN_CALL)]
    rule = "WORDS | words_and_tag inside more"
    return Form(rule, "\n".join(lines), tuple(parts), calls=True, is_free=True, notes=tuple(notes))


def _arguments(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a tool's arguments."""
    schema = tool.get("parameters") or {"properties": {}}
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise UserError(f"the tool {tool['name'][:60]!r}: parameters must be a JSON schema of an object")
    return {"type": "object", **schema}


def whole(form: Form, tag: Tag, thinking: Literal["no", "open", "may"] = "no") -> str:
    """The grammar of an answer: `form` alone, behind a think block that the prompt has opened, or that may open."""
    lines = [f"body: {form.rule}", form.rules]
    if thinking == "no":
        lines.append("start: body")
    else:
        opened = f"({_shown(OPEN_THINK, tag)} thought)?" if thinking == "may" else "thought"
        lines += [f"start: {opened} body", "thought: until_thought /\\n{0,2}/"]
        lines.append(_until("until_thought", CLOSE_THINK, tag, "THOUGHT"))
    return json.dumps({"grammars": [{"lark_grammar": "\n".join(lines)}, *form.parts]}, ensure_ascii=False)


def _words(tag: str, name: str = "WORDS") -> str:
    """A terminal of any text without the tag."""
    return f"{name}: /(?s:.*)/ & ~/(?s:.*){_pattern(tag)}(?s:.*)/"


def _until(rule: str, text: str, tag: Tag, name: str = "WORDS") -> str:
    """A rule of any text up to the tag, and the tag."""
    if tag(text) is None:
        return f"{rule}[lazy]: /(?s:.*){_pattern(text)}/"
    own = "" if name == "WORDS" else "\n" + _words(text, name)
    return f"{rule}: {name} {_shown(text, tag)}{own}"


def _shown(text: str, tag: Tag) -> str:
    token = tag(text)
    return json.dumps(text) if token is None else f"<[{token}]>"


def _pattern(tag: str) -> str:
    return tag.replace("/", r"\/")


# Untrusted grammars ---------------------------------------------------------------------------------------------------


def limits() -> Any:
    """What one grammar may take of each step."""
    return llguidance().LLParserLimits(
        max_items_in_row=1000, step_max_items=20_000, step_lexer_fuel=150_000, max_lexer_states=50_000,
        max_grammar_size=100_000, initial_lexer_fuel=500_000, verbose_errors=False,
    )  # fmt: skip


class Letters:
    """A tokenizer of single bytes, and of marks at their own ids; llguidance asks it for the tokens of a text."""

    bos_token_id, special_token_ids = None, ()

    def __init__(self, size: int, marks: Mapping[int, str]):
        free = (i for i in range(size + 257) if i not in marks)
        self.ids = [next(free) for _ in range(257)]  # of the bytes, and of an end
        self.eos_token_id = self.ids[256]
        self.tokens = [b""] * (size + 257)
        for byte, i in enumerate(self.ids[:256]):
            self.tokens[i] = bytes([byte])
        for i, text in marks.items():
            self.tokens[i] = SPECIAL + text.encode()

    def __call__(self, data: bytes) -> list[int]:
        return [self.ids[byte] for byte in data]


def tried(grammar: str, size: int, marks: list) -> str:
    """What is wrong with a grammar; "" if nothing was found in a few steps at random.

    size: of the vocabulary. marks: [id, text] of the tokens that are no words. To be called in a process that may be
    ended: a hundred patterns in `allOf` take all memory, a thousand $ref behind one another the stack, and no limit of
    llguidance's holds them.
    """
    letters, found = Letters(size, dict(marks)), []

    def walk() -> None:
        library, rng = llguidance(), random.Random(0)
        tokens = library.LLTokenizer(library.TokenizerWrapper(letters))
        matcher = library.LLMatcher(tokens, grammar, limits=limits(), log_level=0)
        for _ in range(_WALK):
            allowed = matcher.compute_logit_bias()
            if matcher.is_stopped():
                break
            matcher.consume_token(rng.choice([i for i in [*letters.ids, *dict(marks)] if allowed[i]]))
        found.append(matcher.get_error())

    before = threading.stack_size(_STACK)
    thread = threading.Thread(target=walk)
    thread.start()
    threading.stack_size(before)
    thread.join()
    return found[0]

"""Tokenizers of every kind, forms of answers, a model that draws at random, and who reads what it wrote."""

import json
import random

import jsonschema
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from minimind_jax.data.tokenizer import Tokenizer, train_bpe
from minimind_jax.data.tools import parse_calls
from minimind_jax.inference.constrain import tokens_of

TEXTS = [
    "The cat sat on the mat, the dog on the log.",
    '{"name": "cat", "age": 3}',
    "你好，世界。今天天气很好 🐱",
    "a/b",
] * 3
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["c", "f"]}},
    "required": ["city"],
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "现在"}},
    {"name": "free", "parameters": {"type": "object", "additionalProperties": {"type": "number"}}},
]
SCHEMAS = {
    "wanting": {  # whose strings want something before they may end
        "type": "object",
        "properties": {
            "mail": {"type": "string", "pattern": r"^[^ @]+@[^ @]+\.[^ @]+$"},
            "last": {"type": "string", "pattern": "[0-9]$"},
            "any": {"type": "string", "pattern": "@"},
        },
        "additionalProperties": False,
    },
    "ticket": {
        "type": "object",
        "properties": {
            "label": {"enum": ["billing", "bug", "其他"]},
            "why": {"type": "string"},
            "score": {"type": "number", "minimum": 0, "maximum": 1},
        },
        "required": ["label", "why", "score"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {
            "items": {"type": "array", "items": {"$ref": "#/$defs/item"}, "maxItems": 9},
            "count": {"type": "integer", "minimum": 1, "maximum": 99},
        },
        "required": ["items", "count"],
        "$defs": {
            "item": {
                "type": "object",
                "properties": {"name": {"type": "string", "minLength": 1}, "size": {"type": ["number", "null"]}},
                "required": ["name", "size"],
                "additionalProperties": False,
            }
        },
    },
    "recursive": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "boolean"},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
    },
    "patterns": {
        "type": "object",
        "properties": {
            "mail": {"type": "string", "pattern": r"^[a-z]{2,8}@[a-z]+\.(com|cn)$"},
            "day": {"type": "string", "format": "date"},
        },
        "required": ["mail", "day"],
    },
    "open": {"type": "object", "properties": {"a": {"type": "array", "minItems": 2}}, "required": ["a"]},
    "list": {"type": "array", "minItems": 1, "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]}},
}


def without_our_tags(folder, backend, special=("<s>", "</s>")):
    backend.add_special_tokens(list(special))
    backend.add_tokens(["  ", "    "])  # added, but words
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return Tokenizer.load(folder)


def ours(folder):
    return train_bpe(TEXTS, folder, vocab_size=340)


def byte_level(folder):
    """As on the hub: another order of ids, no tags, and two spellings of a blank."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    backend.train_from_iterator(TEXTS, trainer)
    return without_our_tags(folder, backend)


def sentencepiece(folder):
    """Bytes as <0x41>, a blank as ▁ and one more in front of every text."""
    words = ["▁", *(f"<0x{byte:02X}>" for byte in range(256)), *'abcdeint":{},0123', "▁the", '":', "你"]
    backend = tokenizers.Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token=None)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace()])
    return without_our_tags(folder, backend)


def text_of(tokenizer, ids):
    return b"".join(tokenizer.byte_pieces[i] for i in ids).decode(errors="replace")


def drawn(tokenizer, constraint, seed, limit):
    """Ids without the end, and whether there was one."""
    rng, ids = random.Random(seed), []
    while len(ids) < limit:
        allowed = tokens_of(constraint.mask())
        assert allowed and max(allowed) < tokenizer.vocab_size, "padding, or nothing at all, is allowed"
        token = rng.choice(allowed)
        constraint.accept(token)
        if token in tokenizer.end_ids:
            return ids, True
        ids.append(token)
        if constraint.ended:
            return ids, True
    return ids, False


def schema_of(name):
    tools = {tool.get("function", tool)["name"]: tool.get("function", tool).get("parameters") for tool in TOOLS}
    return tools[name] or {"type": "object", "maxProperties": 0}


def checked(text):
    """The words and the names of the calls in an answer, all of them valid."""
    words, calls = parse_calls(text)
    for call in calls:
        assert not call.error, (call.error, text)
        jsonschema.validate(call.arguments, schema_of(call.name))
    return words, [call.name for call in calls]


def late_fault(harmless, harmful):
    """A grammar of which one of two letters leads to more than can be followed."""
    return f'start: "{harmless}" | "{harmful}" many\nmany: {" ".join(["part?"] * 1500)}\npart: "b" | "c"'

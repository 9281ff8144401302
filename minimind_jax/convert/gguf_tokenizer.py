"""A tokenizer as llama.cpp reads it: words and their types, merges, and the name of the rule that splits a text.

llama.cpp knows rules by name only. So a tokenizer is recognised by everything in tokenizer.json that has a say in a
text's tokens, and refused where llama.cpp would get others.
"""

import json
from typing import Any, NamedTuple

import tokenizers

from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's types: only the third's text is printed and special

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN35 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}" + _REST.replace(r"\p{L}", r"\p{L}\p{M}")
_WORDS, _BYTES, _DIGITS = "words", "bytes", "digits"
# The steps of a pre-tokenizer, and whether whole words are taken before merges: llama.cpp's name.
_RULES = {
    ((_WORDS,), False): "gpt-2",
    ((_DIGITS, _WORDS), False): "smollm",
    ((_QWEN2, _BYTES), False): "qwen2",
    ((_QWEN35, _BYTES), False): "qwen35",
    ((_LLAMA3, _BYTES), False): "dbrx",
    ((_LLAMA3, _BYTES), True): "llama-bpe",
}


class Words(NamedTuple):
    """pre: the rule that splits a text. tokens, types: of every id of the model. merges: in order, "left right".
    unknown_id: of the unknown token. notes: where llama.cpp's tokens may differ."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    unknown_id: int
    notes: list[str]


def gguf_words(tokenizer: Tokenizer, vocab_size: int) -> Words:
    """The tokenizer of a model with `vocab_size` ids; those that are no word's are unused.

    Raises UserError for a tokenizer that llama.cpp would split texts differently for.
    """
    file = str(tokenizer.folder / "tokenizer.json")
    content = json.loads(tokenizers.Tokenizer.from_file(file).to_str())  # with every key, as the library names it today
    words = {i: word for word, i in tokenizer.vocabulary().items()}
    added = {token["id"]: token for token in content["added_tokens"]}
    ids = range(vocab_size)
    return Words(
        _rule(content, file),
        [words.get(i, f"[PAD{i}]") for i in ids],
        [_type(added.get(i), i in words) for i in ids],
        [" ".join(pair) for pair in content["model"]["merges"]],
        tokenizer.vocabulary().get(content["model"]["unk_token"], tokenizer.pad_id),
        _notes(content),
    )


def _type(added: dict[str, Any] | None, is_word: bool) -> int:
    if added is None:
        return NORMAL if is_word else UNUSED
    looks_special = added["content"].startswith("<|") and added["content"].endswith("|>")
    return CONTROL if added["special"] or looks_special else USER_DEFINED


def _rule(content: dict[str, Any], where: str) -> str:
    """llama.cpp's name of the rule that splits a text. Raises UserError."""
    model, normalizer = content["model"], content["normalizer"]
    if model["type"] != "BPE":
        raise UserError(f"{where}: model.type is {model['type']}; only byte-level BPE can be written as GGUF")
    changed = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    for name in changed:
        if model[name]:
            raise UserError(f"{where}: model.{name} is {model[name]!r}, which llama.cpp's byte-level BPE does not have")
    if normalizer and normalizer["type"] != "NFC":
        raise UserError(f"{where}: normalizer is {normalizer['type']}, which llama.cpp's byte-level BPE does not have")
    pre = content["pre_tokenizer"] or {"type": "none"}
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    ignores_merges = bool(model["ignore_merges"])
    found = _RULES.get((tuple(map(_step, steps)), ignores_merges))
    if found is None:
        told = " + ".join(_told(step) for step in steps) + (" with model.ignore_merges" if ignores_merges else "")
        raise UserError(
            f"{where}: pre_tokenizer is {told}, none of those that can be written for llama.cpp, which would split "
            f"texts differently (known: {', '.join(_RULES.values())}); use the Hugging Face folder elsewhere, or "
            "llama.cpp's own convert_hf_to_gguf.py, if it knows this tokenizer"
        )
    return found


def _step(part: dict[str, Any]) -> str | None:
    """One step of a pre-tokenizer as `_RULES` names it; None for others."""
    if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
        return _WORDS if part["use_regex"] else _BYTES
    if part["type"] == "Digits" and part["individual_digits"]:
        return _DIGITS
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return part["pattern"].get("Regex")
    return None


def _told(part: dict[str, Any]) -> str:
    values = [f"{key} {value!r}" for key, value in part.items() if key not in ("type", "trim_offsets")]
    return f"{part['type']} ({', '.join(values)})" if values else part["type"]


def _notes(content: dict[str, Any]) -> list[str]:
    flags = ("lstrip", "rstrip", "single_word")
    bound = [token["content"] for token in content["added_tokens"] if any(token[flag] for flag in flags)]
    notes = []
    if content["normalizer"]:
        notes.append("the tokenizer composes characters (NFC) and llama.cpp does not: compose texts that are not")
    if bound:
        notes.append(
            f"{len(bound)} tokens, such as {bound[0]!r}, take spaces beside them or only whole words "
            f"({', '.join(flags)}); llama.cpp takes their text alone"
        )
    return notes

"""The bytes that a token's stored spelling stands for."""

import functools
import json
import re
from collections.abc import Callable

import tokenizers


def bytes_of_tokens(backend: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """The function from a stored token to its bytes, of a byte-level tokenizer or one of the SentencePiece kind."""
    is_byte_level = '"ByteLevel"' in json.dumps(json.loads(backend.to_str())["decoder"])
    return _byte_level_piece if is_byte_level else _sentencepiece_piece


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _byte_level_piece(token: str) -> bytes:
    table = _byte_of_character()
    if all(character in table for character in token):
        return bytes(table[character] for character in token)
    return token.encode()  # an added token, stored as it is spelled


def _sentencepiece_piece(token: str) -> bytes:
    if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
        return bytes([int(match[1], 16)])
    return token.replace("▁", " ").encode()

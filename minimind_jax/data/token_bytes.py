"""The bytes that a token's stored spelling stands for."""

import json
import re
from collections.abc import Callable

import tokenizers


def bytes_of_tokens(backend: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """The function from a stored token to its bytes, of a byte-level tokenizer or one of the SentencePiece kind."""
    # GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from U+0100 on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}

    def of_byte_level(token: str) -> bytes:
        is_spelled = any(character not in alphabet for character in token)  # an added token
        return token.encode() if is_spelled else bytes(alphabet[character] for character in token)

    def of_sentencepiece(token: str) -> bytes:
        byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()

    is_byte_level = '"ByteLevel"' in json.dumps(json.loads(backend.to_str())["decoder"])
    return of_byte_level if is_byte_level else of_sentencepiece

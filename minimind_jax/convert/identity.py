"""Hashes that tell models and tokenizers by what they are, wherever their folders are."""

import hashlib
import json
import os
from pathlib import Path

from minimind_jax.convert.load import base_folder
from minimind_jax.data.labelled_images import Wordless
from minimind_jax.data.tokenizer import TOKENIZER_FILES, Tokenizer
from minimind_jax.folders import is_adapter, tokenizer_folder

WHOLE_BYTES = 2**26  # files up to this are read whole
BLOCKS, BLOCK_BYTES = 256, 2**16  # of larger ones so many blocks, spread evenly: training changes every tensor


def weights_hash(folder: Path) -> str:
    """A hash of a model's weights: of their files' sizes and bytes, or blocks of bytes; "" without any."""
    found = hashlib.blake2b(digest_size=8)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        return ""
    for file in files:
        size = os.stat(file).st_size
        found.update(f"{file.name} {size}".encode())
        with open(file, "rb") as stream:
            if size <= WHOLE_BYTES:
                found.update(stream.read())
                continue
            for block in range(BLOCKS):
                stream.seek(block * (size - BLOCK_BYTES) // (BLOCKS - 1))
                found.update(stream.read(BLOCK_BYTES))
    if is_adapter(folder):
        found.update(weights_hash(base_folder(folder)).encode())
    return found.hexdigest()


def words_hash(tokenizer: Tokenizer | Wordless) -> str:
    """A hash of a tokenizer's words and their ids; its template has no part in it."""
    words = sorted(tokenizer.vocabulary().items())
    return hashlib.blake2b(json.dumps(words).encode(), digest_size=8).hexdigest()


def tokenizer_hash(folder: Path) -> str:
    """A hash of a tokenizer's files; "" where there is none."""
    folder = tokenizer_folder(folder)
    if not (folder / "tokenizer.json").is_file():
        return ""
    found = hashlib.blake2b(digest_size=8)
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            found.update(f"{name} {len(content)}".encode() + content)
    return found.hexdigest()

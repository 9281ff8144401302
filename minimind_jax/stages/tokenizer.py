"""Stage: train a byte-level BPE tokenizer on text or conversation records and write a Hugging Face tokenizer folder.

MiniMind's own tokenizer is what makes models compatible with its releases; train one only for another language or a
demonstration.
"""

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from minimind_jax.config import TokenizerConfig
from minimind_jax.data.jsonl import Record, expand_paths, iter_records
from minimind_jax.data.records import parse_conversation, parse_text
from minimind_jax.data.template import render
from minimind_jax.data.tokenizer import TOKENIZER_FILES, StreamDecoder, Tokenizer, train_bpe
from minimind_jax.errors import UserError

SELF_TEST_TEXTS = {
    "English": (
        "The lighthouse keeper wrote down the weather every evening. Most days were calm, with a light wind from the "
        "west; in 1907 a storm broke two windows and put out the lamp for an hour."
    ),
    "Chinese": (
        "小城的图书馆建在河边，每到傍晚，读书的人便沿着石阶走下来，看夕阳落在水面上。"
        "馆里有三万多册书，其中最老的一本印于1762年，讲的是如何种茶。"
    ),
    "mixed": "用 Python 写一个 function：def add(a, b): return a + b，然后 print(add(1, 2))。🙂",
}
_SELF_TEST_TALK = [
    {"role": "user", "content": "你好, who are you?"},
    {"role": "assistant", "content": "A small model."},
]


def train_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Reads the records, trains, checks itself and puts the folder in place; prints what it finds.

    A folder that is cut off half way never appears under config.output. Raises UserError for broken records (or skips
    and counts them, as config.on_error says) and for an output folder that holds other files.
    """
    output = Path(config.output)
    _check_replaceable(output)
    skipped: list[UserError] = []
    on_bad = skipped.append if config.on_error == "skip" else None
    records = _round_robin([iter_records([file], on_bad) for file in _files(config)])
    records = itertools.islice(records, config.max_records or None)

    output.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        tokenizer = train_bpe(_texts(records, skipped, config), workplace / "new", config.vocab_size)
        if skipped:
            print(f"{len(skipped)} records skipped; the first: {skipped[0]}")
        if tokenizer.vocab_size < config.vocab_size:
            print(
                f"The text holds too few different words for {config.vocab_size} tokens: "
                f"{tokenizer.vocab_size} were made. Give more data, or lower vocab_size."
            )
        _self_test(tokenizer)
        if output.exists():
            os.replace(output, workplace / "old")
        os.replace(workplace / "new", output)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    print(f"{tokenizer.vocab_size} tokens written to {output}")
    return Tokenizer.load(output)


def _files(config: TokenizerConfig) -> list[Path]:
    if not config.data:
        raise UserError("data is empty; expected files, folders or globs of records, as in --data pretrain.jsonl")
    return expand_paths(config.data)


def _check_replaceable(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; output must be a folder to write")
    others = sorted(p.name for p in output.iterdir() if p.name not in TOKENIZER_FILES) if output.is_dir() else []
    if others:
        raise UserError(f"{output} holds other files ({', '.join(others[:3])}); choose a new folder as output")


def _round_robin(iterators: list[Iterator[Record]]) -> Iterator[Record]:
    """One record of each file in turn, so that max_records does not leave the later files out."""
    while iterators:
        left = []
        for iterator in iterators:
            record = next(iterator, None)
            if record is not None:
                yield record
                left.append(iterator)
        iterators = left


def _texts(records: Iterator[Record], skipped: list[UserError], config: TokenizerConfig) -> Iterator[str]:
    used = 0
    for record in records:
        try:
            text = _text(record)
        except UserError as error:
            if config.on_error == "stop":
                raise
            skipped.append(error)
            continue
        used += 1
        yield text
    if not used:
        raise UserError(f"no usable record in {', '.join(config.data)}; the first was skipped because of {skipped[0]}")


def _text(record: Record) -> str:
    if "conversations" not in record.value:
        return parse_text(record)
    messages = parse_conversation(record).messages
    return "\n".join(part for m in messages for part in (m.get("reasoning_content"), m["content"]) if part)


def _self_test(tokenizer: Tokenizer) -> None:
    for name, text in {**SELF_TEST_TEXTS, "template": render(_SELF_TEST_TALK)}.items():
        ids = tokenizer.encode(text)
        decoder = StreamDecoder(tokenizer, skip_special_tokens=False)
        streamed = "".join(decoder.push(i) for i in ids)
        if tokenizer.decode(ids, skip_special_tokens=False) != text or streamed != text:
            raise RuntimeError(f"the tokenizer changes the {name} test text: {streamed!r}")
        if name == "template":
            print(text, end="")
        else:
            print(f"{name}: {len(text)} characters, {len(ids)} tokens, {len(text) / len(ids):.2f} characters per token")

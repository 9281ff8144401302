"""Stage: train a byte-level BPE tokenizer on text or conversation records and write a Hugging Face tokenizer folder.

MiniMind's own tokenizer is what makes models compatible with its releases; train one only for another language or a
demonstration.
"""

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from minimind_jax.config import TokenizerConfig
from minimind_jax.data.jsonl import Record, expand_paths, iter_records
from minimind_jax.data.records import parse_conversation, parse_text
from minimind_jax.data.template import render
from minimind_jax.data.tokenizer import TOKENIZER_FILES, StreamDecoder, Tokenizer, train_bpe
from minimind_jax.errors import UserError
from minimind_jax.stages.tokenizer_origin import ORIGIN, check_origin, origin_of, write_origin

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

    A folder that is cut off half way never appears under config.output. A tokenizer that is there is kept: told if it
    is of the same settings and records. Raises UserError if it is another (unless config.overwrite), for broken records
    (or skips and counts them, as config.on_error says), for an output folder that holds other files or cannot be
    written.
    """
    output = Path(config.output)
    _check_replaceable(output)
    origin = origin_of(config, _files(config))
    if (output / "tokenizer.json").is_file() and not config.overwrite:
        check_origin(output, origin)
        print(f"{output} holds the tokenizer of these settings and records already")
        return Tokenizer.load(output)
    skipped: dict[str, None] = {}  # messages, each once although a file may be read again

    def skip(error: UserError) -> None:
        if config.on_error == "stop":
            raise error
        skipped[str(error)] = None

    records = _some_of_each(_files(config), config.max_records, skip)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        workplace = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise UserError(f"cannot write output {output}: {error.strerror or error}; choose another folder") from error
    try:
        tokenizer = train_bpe(_texts(records, skip, skipped, config.data), workplace / "new", config.vocab_size)
        if skipped:
            print(f"{len(skipped)} records skipped; the first: {next(iter(skipped))}")
        if tokenizer.vocab_size < config.vocab_size:
            print(
                f"The text holds too few different words for {config.vocab_size} tokens: "
                f"{tokenizer.vocab_size} were made. Give more data, or lower vocab_size."
            )
        _self_test(tokenizer)
        write_origin(workplace / "new", origin)
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
    others = (
        sorted(p.name for p in output.iterdir() if p.name not in (*TOKENIZER_FILES, ORIGIN)) if output.is_dir() else []
    )
    if others:
        raise UserError(f"{output} holds other files ({', '.join(others[:3])}); choose a new folder as output")


def _some_of_each(files: list[Path], limit: int, on_bad: Callable[[UserError], None]) -> Iterator[Record]:
    """Up to `limit` records (0 for all), as many of each file as there are, so that none is left out.

    One file is open at a time. What short files leave of the limit, the longer ones get when they are read again.
    """
    if not limit:
        yield from iter_records(files, on_bad)
        return
    taken = 0  # of each of the files
    while files:
        share, longer = max(1, limit // len(files)), []
        for file in files:
            count = 0
            with contextlib.closing(iter_records([file], on_bad)) as records:
                for record in itertools.islice(records, taken, taken + min(share, limit)):
                    yield record
                    count += 1
            limit -= count
            if not limit:
                return
            if count == share:
                longer.append(file)
        files, taken = longer, taken + share


def _texts(
    records: Iterator[Record], on_bad: Callable[[UserError], None], skipped: Iterable[str], data: Sequence[str]
) -> Iterator[str]:
    used = 0
    for record in records:
        try:
            text = _text(record)
        except UserError as error:
            on_bad(error)
            continue
        used += 1
        yield text
    if not used:
        raise UserError(
            f"no usable record in {', '.join(data)}; the first was skipped because of {next(iter(skipped))}"
        )


def _text(record: Record) -> str:
    if "conversations" not in record.value:
        return parse_text(record, "--on_error")
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

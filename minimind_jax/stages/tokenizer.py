"""Stage: train a byte-level BPE tokenizer on text or conversation records and write a Hugging Face tokenizer folder.

MiniMind's own tokenizer is what makes models compatible with its releases; train one only for another language or a
demonstration.
"""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from minimind_jax.config.sections import FilesConfig, ReadingConfig
from minimind_jax.config.stages import TokenizerConfig
from minimind_jax.data.cache_folder import cache_root, file_identities
from minimind_jax.data.formats import detect
from minimind_jax.data.jsonl import READING, Record, expand_paths, iter_records
from minimind_jax.data.kinds import KINDS, Wanted
from minimind_jax.data.template import render
from minimind_jax.data.tokenizer import TOKENIZER_FILES, StreamDecoder, Tokenizer, train_bpe
from minimind_jax.errors import UserError, disk_errors
from minimind_jax.progress import progress
from minimind_jax.training.run import plain

TEST_TEXTS = {
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
TEST_TALK = [{"role": "user", "content": "你好, who are you?"}, {"role": "assistant", "content": "A small model."}]
ORIGIN = "made_from.json"  # in its folder, by which the same command asked again is told from another
MAX_WORD = 1000  # characters of one class, as GPT-2's pattern splits
_CLASSES = (r"[^\W\d_]", r"\d", r"\s", r"(?:[^\w\s]|_)")
_LONG_WORD = re.compile(f"({'|'.join(f'{one}{{{MAX_WORD}}}' for one in _CLASSES)})")
_LONG_RUN = re.compile(rf"\S{{{MAX_WORD}}}|\s{{{MAX_WORD}}}")  # finds quickly that there are none


def train_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Reads the records, trains, checks itself and puts the folder in place; prints what it finds.

    A folder that is cut off half way never appears under config.output. A tokenizer that is there is kept: told if it
    is of the same settings and records. Raises UserError if it is another (unless config.overwrite), for broken records
    (or skips and counts them, as config.on_error says), for an output folder that holds other files or cannot be
    written.
    """
    output = Path(config.output)
    _check_replaceable(output)
    if not config.data:
        raise UserError("data is empty; expected files, folders or globs of records, as in --data pretrain.jsonl")
    files = expand_paths(config.data)
    origin = _origin(config, files)
    if (output / "tokenizer.json").is_file() and not config.overwrite:
        _check_origin(output, origin)
        print(f"{output} holds the tokenizer of these settings and records already")
        return Tokenizer.load(output)
    skipped: dict[str, None] = {}  # messages, each once although a file may be read again
    told: Counter[str] = Counter()

    def skip(error: UserError) -> None:
        if config.on_error == "stop":
            raise error
        skipped[str(error)] = None

    with disk_errors(f"cannot write output {output}", "choose another folder"):
        output.parent.mkdir(parents=True, exist_ok=True)
        workplace = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        workplace.rmdir()  # it can be written; made again after the training, so that a kill leaves nothing
    try:
        with progress("counting records"):
            total, records = _draw(files, config.max_records, skip, config)
        drawn = min(total, config.max_records or total)
        with progress("training the tokenizer", drawn) as advance:
            texts = _texts(records, config, skip, advance, told)
            tokenizer = train_bpe(texts, workplace / "new", config.vocab_size)
        _report(config, tokenizer, told, total, list(skipped))
        _self_test(tokenizer)
        (workplace / "new" / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n", "utf-8")
        if output.exists():
            os.replace(output, workplace / "old")
        os.replace(workplace / "new", output)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    print(f"{tokenizer.vocab_size} tokens written to {output}")
    return Tokenizer.load(output)


def _report(config: TokenizerConfig, tokenizer: Tokenizer, told: Counter[str], total: int, skipped: list[str]) -> None:
    """Says what was read. Raises UserError if it was nothing."""
    if not told["used"]:
        raise UserError(f"no usable record in {', '.join(config.data)}; the first was skipped because of {skipped[0]}")
    are_all = not config.max_records or config.max_records >= total
    more = "" if are_all else ", spread over all files (max_records sets how many, 0 is all)"
    print(f"{told['used']:,} of {total:,} records used{more}")
    if skipped:
        print(f"{len(skipped)} records skipped; the first: {skipped[0]}")
    if told["cut"]:
        print(
            f"{told['cut']:,} records with words of more than {MAX_WORD:,} characters, or as many spaces, which were "
            "cut for the training"
        )
    if tokenizer.vocab_size < config.vocab_size:
        data = "Give more data" if are_all else "Raise max_records"
        print(
            f"The text holds too few different words for {config.vocab_size} tokens: "
            f"{tokenizer.vocab_size} were made. {data}, or lower vocab_size."
        )


def _check_replaceable(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; output must be a folder to write")
    there = {file.name for file in output.iterdir()} if output.is_dir() else set()
    if others := sorted(there - {*TOKENIZER_FILES, ORIGIN}):
        raise UserError(f"{output} holds other files ({', '.join(others[:3])}); choose a new folder as output")


def _draw(
    files: list[Path], limit: int, on_bad: Callable[[UserError], None], reading: ReadingConfig = READING
) -> tuple[int, Iterator[Record]]:
    """How many records there are, and up to `limit` of them (0 for all): as many of each file as there are, and spread
    over it from its beginning to its end, so that nothing is left out.

    The files are read twice, for all that is kept is numbers; one is open at a time. Always the same ones are drawn.
    """
    # Broken ones are told when they are read again.
    counts = [sum(1 for _ in iter_records([file], lambda error: None, reading)) for file in files]
    total = sum(counts)
    if not limit or limit >= total:
        return total, iter_records(files, on_bad, reading)

    def drawn() -> Iterator[Record]:
        for file, count, share in zip(files, counts, _shares(counts, limit), strict=True):
            if share:
                with contextlib.closing(iter_records([file], on_bad, reading)) as records:
                    places = _spread(count, share, random.Random(count))
                    yield from itertools.compress(records, (number in places for number in range(count)))

    return total, drawn()


def _shares(counts: Sequence[int], limit: int) -> list[int]:
    """How many to take of each: as many of one as of another, as far as they go."""
    shares = [0] * len(counts)
    for done, number in enumerate(sorted(range(len(counts)), key=counts.__getitem__)):
        shares[number] = min(counts[number], -(-limit // (len(counts) - done)))
        limit -= shares[number]
    return shares


def _spread(count: int, share: int, rng: random.Random) -> set[int]:
    """One number below `count` of each of `share` equal stretches: nothing that repeats itself can hide from it."""
    edges = [i * count // share for i in range(share + 1)]
    return {rng.randrange(first, end) for first, end in itertools.pairwise(edges)}


def _texts(
    records: Iterator[Record],
    reading: ReadingConfig,
    on_bad: Callable[[UserError], None],
    advance: Callable[[int], None],
    told: Counter[str],
) -> Iterator[str]:
    """The texts of the records, long words in pieces. told: gets how many records were `used`, and how many of these
    `cut`, since they have a word of MAX_WORD characters or more."""
    for record in records:
        advance(1)
        try:
            pieces = _cut_words(text_of(record, reading))
        except UserError as error:
            on_bad(error)
            continue
        told.update(used=1, cut=len(pieces) > 1)
        yield from pieces


def _cut_words(text: str) -> list[str]:
    """The text, cut inside words, or stretches of spaces, longer than MAX_WORD: merging in one takes the square of its
    length."""
    if not _LONG_RUN.search(text):
        return [text]
    return [piece for piece in _LONG_WORD.split(text) if piece]


def text_of(record: Record, reading: ReadingConfig = READING) -> str:
    """What the tokenizer learns from of a text, a conversation or a pair. Raises UserError."""
    kind = KINDS[detect(record.value, reading) or "text"]
    return kind.words(kind.parse(record, Wanted(reading, flag="--on_error")))


def _self_test(tokenizer: Tokenizer) -> None:
    for name, text in {**TEST_TEXTS, "template": render(TEST_TALK)}.items():
        ids = tokenizer.encode(text)
        decoder = StreamDecoder(tokenizer, skip_special_tokens=False)
        streamed = "".join(decoder.push(i) for i in ids)
        if tokenizer.decode(ids, skip_special_tokens=False) != text or streamed != text:
            raise RuntimeError(f"the tokenizer changes the {name} test text: {streamed!r}")
        if name == "template":
            print(text, end="")
        else:
            print(f"{name}: {len(text)} characters, {len(ids)} tokens, {len(text) / len(ids):.2f} characters per token")


# What it was made from ------------------------------------------------------------------------------------------------


def _origin(config: TokenizerConfig, files: Sequence[Path]) -> dict[str, Any]:
    """The settings that decide the tokens, as JSON has them, and a hash of each file of records."""
    decide = {key: value for key, value in plain(config).items() if key not in ("output", "overwrite")}
    return {**decide, "data": [content for *_, content in file_identities(files, cache_root(FilesConfig()))]}


def _check_origin(folder: Path, origin: dict[str, Any]) -> None:
    """Raises UserError unless the tokenizer in a folder was made from `origin`."""
    try:
        found = json.loads((folder / ORIGIN).read_text("utf-8"))
        differing = [key for key in sorted({*origin, *found}) if origin.get(key) != found.get(key)]
    except (OSError, ValueError, TypeError):
        differing = [f"no {ORIGIN} in it"]
    if differing:
        raise UserError(
            f"{folder} holds another tokenizer ({', '.join(differing)}), and what was trained with it needs it; choose "
            "another output, or pass --overwrite true to replace it"
        )

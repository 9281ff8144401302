"""Lines of data files -> tokenised documents, in processes of their own.

The processes import this module, so it must not import JAX (directly or not).
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from minimind_jax.config.sections import ReadingConfig
from minimind_jax.data.documents import Document
from minimind_jax.data.jsonl import is_picture, iter_lines, parse_line
from minimind_jax.data.kinds import KINDS, KindName, Wanted
from minimind_jax.data.labelled_images import Wordless
from minimind_jax.data.template import Dice, unchanged
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import TemplateFault, UserError

CHUNK_BYTES = 1 << 19  # of raw lines a process gets at once
BYTES_PER_PROCESS = 4 << 20  # less than this is not worth a process of its own

Line = tuple[int, Path, int, bytes | dict]  # number of the record, file, line, what `iter_lines` gave


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Turns lines into documents; travels to the processes, which load the tokenizer themselves."""

    kind: KindName
    tokenizer_folder: str
    dice: Dice | None
    skip: bool
    wanted: Wanted

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | Wordless:
        return Tokenizer.load(self.tokenizer_folder) if self.tokenizer_folder else Wordless()

    def document(self, line: Line, told: Counter) -> Document:
        """The document of a line; told gets what is told of it. Raises UserError with file and line."""
        number, file, line_number, raw = line
        record, kind = parse_line(raw, file, line_number, told), KINDS[self.kind]
        parsed = kind.parse(record, self.wanted)
        notes: set[str] = set()
        roll = self.dice.roll(number) if self.dice else unchanged
        try:
            document = kind.encode(self.tokenizer, parsed, roll, notes.add)
            if kind.rendered and not document.trained.any():
                raise UserError("nothing to train on; expected an assistant message with content")
        except UserError as error:  # of the template, which knows no files
            raise type(error)(f"{record.where}: {error}") from error
        record.told.update((str(file), note) for note in notes)
        # of what is rendered as it was before anything was drawn
        said = repr(parsed).encode("utf-8", "surrogatepass") if kind.rendered else document.ids.tobytes()
        digest = hashlib.blake2b(b"".join([said, *document.pictures]), digest_size=8).digest()
        return dataclasses.replace(document, key=int.from_bytes(digest))

    def encode(self, lines: list[Line]) -> "Chunk":
        """The documents of the lines; a broken line raises its UserError, or is noted if this encoder skips."""
        documents, numbers, errors, told = [], [], [], Counter()
        for line in lines:
            try:
                documents.append(self.document(line, told))
                numbers.append(line[0])
            except TemplateFault:  # which is not the record's
                raise
            except UserError as error:
                if not self.skip:
                    raise
                errors.append(str(error))
        turns = [d.turn_starts if KINDS[self.kind].rendered else [] for d in documents]
        pictures = [picture for d in documents for picture in d.pictures]
        arrays = {
            "tokens": _joined([d.ids for d in documents], np.int32),
            "trained": _joined([d.trained for d in documents], bool),
            "records": np.array(numbers, np.int64),
            "keys": np.array([d.key for d in documents], np.uint64),
            "turn_starts": _joined(turns, np.int64),
            "values": np.array([d.values for d in documents], np.float32),
            "picture_starts": _joined([d.picture_starts for d in documents], np.int64),
            "content": np.frombuffer(b"".join(pictures), np.uint8),
        }
        sizes = {
            "offsets": [len(d.ids) for d in documents],
            "turn_offsets": list(map(len, turns)),
            "picture_offsets": [len(d.pictures) for d in documents],
            "content_offsets": list(map(len, pictures)),
        }
        return Chunk(arrays, sizes, errors, told)


def _joined(parts: list, dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(part, dtype) for part in parts)])


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Documents end to end, as a cache of tokens holds them."""

    arrays: dict[str, np.ndarray]  # what goes behind the files of a cache (see `TokenCache`), by their names
    sizes: dict[str, list[int]]  # of what offsets count there: tokens, turns, pictures, their bytes
    errors: list[str]  # of the records that were skipped
    told: Counter  # of the others (see `jsonl.Record`)


_process_encoder: Encoder | None = None


def _start_process(encoder: Encoder) -> None:
    global _process_encoder
    _process_encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_in_process(lines: list[Line]) -> Chunk:
    return _process_encoder.encode(lines)


def encode_all(encoder: Encoder, chunks: Iterator[list[Line]], workers: int) -> Iterator[Chunk]:
    """Encoded chunks in order; at most two a process are under way, so memory stays bounded."""
    if workers == 1:
        yield from map(encoder.encode, chunks)
        return
    # spawn: a fork of a process that runs JAX's threads may hang
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_process, initargs=(encoder,))
    under_way = collections.deque()
    try:
        for chunk in chunks:
            with _hidden_main_module():
                under_way.append(pool.submit(_encode_in_process, chunk))  # the first ones start the processes
            if len(under_way) >= 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a tokenising process died, most likely for want of memory; --data.tokenizer_workers 1 does without them"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_main_module = threading.Lock()  # of two threads that tokenise, one could put back what the other has hidden


@contextlib.contextmanager
def _hidden_main_module():
    """Spawned processes import the program's main file anew: a script without `if __name__ == "__main__":` would start
    its whole run again in each. Ours need nothing from it, so they are not told which it is."""
    with _main_module:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def process_count(asked: int, total_bytes: int) -> int:
    """Processes for this much data: as many as asked for, or up to one a core."""
    if asked:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 1 + total_bytes // BYTES_PER_PROCESS)


def read_chunks(files: list[Path], advance: Callable[[int], None], reading: ReadingConfig) -> Iterator[list[Line]]:
    """Lines of all files in groups of about CHUNK_BYTES; `advance` hears of the bytes of the files that are read."""
    number, lines, size = 0, [], 0
    for file in files:
        told = 0
        for line_number, raw in iter_lines(file, reading):
            length = len(raw) if isinstance(raw, bytes) else sum(map(_size, raw.values()))
            length = file.stat().st_size if is_picture(file) else length
            lines.append((number, file, line_number, raw))
            number, size = number + 1, size + length
            if size >= CHUNK_BYTES:
                yield lines
                step = min(size, file.stat().st_size - told)  # a compressed file is smaller than its lines
                advance(step)
                lines, size, told = [], 0, told + step
        advance(file.stat().st_size - told)
    if lines:
        yield lines


def _size(value: Any) -> int:
    """About as many bytes as a cell of a table has."""
    if isinstance(value, list | dict):
        return sum(map(_size, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, bytes) else len(str(value))

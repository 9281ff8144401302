"""Every source rendered and tokenised once, into memory-mapped files that every epoch, run and process then shares.

A cache is a folder named after what it was made from: the files (path, size, hash of the bytes), the tokenizer with its
template, how this version renders conversations, and the settings that change tokens. It is written under another name,
by one process at a time, and renamed when it is whole; so a change of any of these makes a new cache and a killed build
leaves nothing that looks like one.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import numpy as np
from rich.filesize import decimal

from minimind_jax.config.sections import FilesConfig
from minimind_jax.data import cache_folder
from minimind_jax.data.formats import VERSION as FORMATS_VERSION
from minimind_jax.data.jsonl import expand_paths, reading_of, tell_left_out, told_lines
from minimind_jax.data.kinds import KINDS, KindName, Wanted
from minimind_jax.data.labelled_images import Wordless
from minimind_jax.data.labels import Classes
from minimind_jax.data.pictures import MARKER, Marker, StoredPictures
from minimind_jax.data.template import Dice
from minimind_jax.data.tokenise import Chunk, Encoder, encode_all, process_count, read_chunks
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError, disk_errors
from minimind_jax.progress import progress as show_progress

KEPT_MESSAGES = 100  # of skipped records; all are counted
# Files of places in other files, and what they count, as `info` calls it.
OFFSETS = {"offsets": "tokens", "turn_offsets": "turns", "picture_offsets": "images", "content_offsets": "image_bytes"}


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """Tokenised documents, memory-mapped."""

    folder: Path
    kind: KindName
    tokens: np.ndarray  # (tokens,) of all documents, end to end
    trained: np.ndarray | None  # (tokens,) 1 where a token is a target; None in a cache of plain text, where all are
    offsets: np.ndarray  # (documents + 1,) document d is tokens[offsets[d]:offsets[d + 1]]
    records: np.ndarray  # (documents,) number of the record in the files, counted from 0 over all of them
    keys: np.ndarray  # (documents,) see `documents.Document`; none in a cache of an earlier version
    # turn_offsets, turn_starts: document d may be cut at turn_starts[turn_offsets[d]:turn_offsets[d + 1]], counted from
    # its first token
    turn_offsets: np.ndarray
    turn_starts: np.ndarray
    values: np.ndarray  # (documents, width) numbers that belong to each (see `documents.Document`), float32
    pictures: StoredPictures | None  # of the documents, of a kind that has them
    # what else is known: documents, tokens, trained_tokens, skipped, skipped_messages, told (lines about what was
    # ignored), eos_id, pad_id, source
    info: dict[str, Any]
    in_use: BinaryIO  # keeps the folder from being removed as long as this object lives

    def __len__(self) -> int:
        return len(self.records)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """(documents,) tokens of each."""
        return np.diff(self.offsets)

    @property
    def content(self) -> str:
        """A hash of what is in the files, wherever they lie."""
        hashes = [content for *_, content in self.info["source"]["files"]]
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]

    @property
    def made_of(self) -> str:
        """A hash of all that decides the tokens, wherever the files lie."""
        source = {**self.info["source"], "files": self.content}
        return hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:32]

    def turns(self, document: int) -> np.ndarray:
        """Where a document may be cut, counted from its first token."""
        return self.turn_starts[self.turn_offsets[document] : self.turn_offsets[document + 1]]

    def ids(self, document: int, start: int, stop: int) -> np.ndarray:
        """int32 tokens [start, stop) of a document, fewer where it ends before stop."""
        first = self.offsets[document]
        return self.tokens[first + start : min(first + stop, self.offsets[document + 1])].astype(np.int32)

    def is_trained(self, document: int, start: int, stop: int) -> np.ndarray:
        """Which of the tokens [start, stop) of a document are targets, fewer where it ends before stop."""
        first, last = self.offsets[document] + start, min(self.offsets[document] + stop, self.offsets[document + 1])
        return np.ones(last - first, bool) if self.trained is None else self.trained[first:last].astype(bool)


def build_cache(
    kind: KindName,
    paths: Iterable[str | Path],
    tokenizer: Tokenizer | Wordless,
    data: FilesConfig,
    seed: int,
    epoch: int = 0,
    progress: bool = True,
    report_skipped: bool = True,
    classes: Classes | None = None,
    marker: Marker | None = None,
) -> TokenCache:
    """The cache of these files; made if there is none yet, by `data.tokenizer_workers` processes.

    The chances of the template are drawn from the seed and a record's number (and the epoch, with
    `data.redraw_each_epoch`), so the number of processes never changes the result. Memory does not grow with the files.
    classes: of labelled records. marker: of the model that looks at pictures.

    Raises UserError with file and line for a broken record (unless `data.on_error` is skip), for files without any
    usable record, for a cache folder that cannot be written and when a file changes meanwhile.
    """
    pictures = KINDS[kind].in_files
    files = expand_paths(paths, pictures)
    if not files:
        raise UserError("no training data: data.train is empty; give it files, folders or globs")
    wanted = Wanted(reading_of(data), classes, marker=marker or MARKER)
    dice = _dice(kind, data, seed, epoch)
    encoder = Encoder(kind, str(tokenizer.folder), dice, data.on_error == "skip", wanted)
    source = _source(files, encoder, tokenizer, cache_folder.cache_root(data))
    key = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_folder.cache_root(data) / key
    with explained_disk_errors(folder):
        if (cache := _open_cache(folder)) is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(cache_folder.lock_file(folder)):
                if (cache := _open_cache(folder)) is None:  # another process may have made it meanwhile
                    cache = _build(folder, files, encoder, tokenizer, source, data.tokenizer_workers, progress)
                    if progress:
                        _report_stale(cache, data)
    if skipped := cache.info["skipped"]:
        first = cache.info["skipped_messages"][0]
        if data.on_error == "stop":  # made with `skip`, where this error was the first
            raise UserError(first)
        if report_skipped:
            _say(f"Skipped {skipped:,} of {skipped + len(cache):,} records, the first: {first}")
    if progress:
        _report_told(cache.folder, tuple(cache.info["told"]))
        _report_left_out(tuple(map(str, paths)), pictures)
    return cache


def _dice(kind: KindName, data: FilesConfig, seed: int, epoch: int) -> Dice | None:
    """None where nothing is drawn, so that the seed does not matter."""
    if not KINDS[kind].rendered or not any(data.chances.values()):
        return None
    return Dice(seed, epoch if data.redraw_each_epoch else 0, **data.chances)


def _source(files: list[Path], encoder: "Encoder", tokenizer: Tokenizer, root: Path) -> dict[str, Any]:
    return {
        "format": cache_folder.FORMAT_VERSION,
        "kind": encoder.kind,
        "files": cache_folder.file_identities(files, root),
        "tokenizer": tokenizer.fingerprint,
        "rendering": cache_folder.rendering(encoder.kind),
        "formats": FORMATS_VERSION,
        "reading": dataclasses.asdict(encoder.wanted.reading),
        "dice": encoder.dice and dataclasses.asdict(encoder.dice),
        **({"classes": dataclasses.asdict(encoder.wanted.classes)} if encoder.wanted.classes else {}),
        # by its first name, under which caches of before are found
        **({"sight": list(encoder.wanted.marker)} if KINDS[encoder.kind].has_pictures else {}),
    }


def _layout(info: dict[str, Any]) -> dict[str, tuple[int, np.dtype]]:
    """The files of a cache, NAME.bin, by what `info` says of it: numbers in each, and their type."""
    documents, kind = info["documents"], KINDS[info["kind"]]
    counts = {
        "tokens": (info["tokens"], info["token_dtype"]),
        "offsets": (documents + 1, np.int64),
        "records": (documents, np.int64),
        "turn_offsets": (documents + 1, np.int64),
        "turn_starts": (info["turns"], np.int32),
    }
    if info.get("has_keys"):
        counts["keys"] = (documents, np.uint64)
    if kind.rendered:
        counts["trained"] = (info["tokens"], np.uint8)
    if kind.has_values:
        counts["values"] = (documents * info["values_each"], np.float32)
    if kind.has_pictures:
        counts |= {
            "picture_offsets": (documents + 1, np.int64),
            "picture_starts": (info["images"], np.int32),
            "content_offsets": (info["images"] + 1, np.int64),
            "content": (info["image_bytes"], np.uint8),
        }
    return {name: (count, np.dtype(dtype)) for name, (count, dtype) in counts.items()}


def _build(folder, files, encoder, tokenizer, source, asked_workers, progress) -> TokenCache:
    """Writes the cache beside its place and moves it there. The caller holds the lock, so leftovers are stale."""
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    building = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    building.mkdir()
    total = sum(file.stat().st_size for file in files)
    started = time.monotonic()
    try:
        bar = show_progress("tokenising, bytes", total, show=progress)
        with bar as advance, _CacheWriter(building, encoder, tokenizer) as writer:
            workers = process_count(asked_workers, total)
            for chunk in encode_all(encoder, read_chunks(files, advance, encoder.wanted.reading), workers):
                writer.add(chunk)
        if cache_folder.file_identities(files, folder.parent) != source["files"]:
            raise UserError("a data file changed while it was being tokenised; run again when it is complete")
        info = writer.info
        if not info["documents"]:
            names = ", ".join(map(str, files))
            first = f"; the first of them: {info['skipped_messages'][0]}" if info["skipped"] else ""
            raise UserError(f"{names}: no usable record, {info['skipped']} were skipped{first}")
        info_file = open(building / "info.json", "wb")
        info_file.write(json.dumps({**info, "source": source}, indent=1).encode())
        _close_synced(info_file)
        shutil.rmtree(folder, ignore_errors=True)  # only ever a damaged one
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    if progress:
        of_pictures = KINDS[encoder.kind].in_files
        read = "Read {:,} pictures" if of_pictures else "Tokenised {:,} records, {:,} tokens,"
        _say(
            f"{read.format(info['documents'], info['tokens'])} in "
            f"{time.monotonic() - started:.1f} s with {workers} process{'es' if workers > 1 else ''}"
        )
    return _open_cache(folder)


class _CacheWriter(contextlib.AbstractContextManager):
    """Appends chunks to the files of a cache. info: what is in them so far."""

    def __init__(self, folder: Path, encoder: Encoder, tokenizer: Tokenizer):
        kind, image_tokens = KINDS[encoder.kind], encoder.wanted.marker.tokens
        self.info: dict[str, Any] = {
            "kind": encoder.kind,
            **dict.fromkeys(("documents", "tokens", "turns", "trained_tokens", "skipped"), 0),
            "skipped_messages": [],
            "told": [],
            "has_keys": True,
            **({"values_each": 0} if kind.has_values else {}),
            **({"images": 0, "image_bytes": 0, "image_tokens": image_tokens} if kind.has_pictures else {}),
            "token_dtype": "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
            "eos_id": tokenizer.eos_id,
            "pad_id": tokenizer.pad_id,
        }
        self._told: Counter = Counter()
        self._keys, self._values = [], []
        self._types = {name: dtype for name, (_, dtype) in _layout(self.info).items()}
        self._files = {name: open(folder / f"{name}.bin", "wb") for name in self._types}
        for name in OFFSETS:
            self._append(name, np.zeros(1))

    def __exit__(self, *exception):
        self.info["told"] = told_lines(self._told) + list(self._repeats())
        for file in self._files.values():
            _close_synced(file)

    def _append(self, name: str, array: np.ndarray) -> None:
        if name in self._files:
            self._files[name].write(array.astype(self._types[name]).tobytes())

    def _repeats(self) -> Iterator[str]:
        """What is told of records that say the same."""
        keys = np.concatenate([np.zeros(0, np.uint64), *self._keys])
        unique, places = np.unique(keys, return_inverse=True)
        repeats, noun = len(keys) - len(unique), KINDS[self.info["kind"]].noun
        if KINDS[self.info["kind"]].is_labelled and repeats:
            labelled = np.unique(np.column_stack([places, np.concatenate(self._values)]), axis=0)[:, 0]
            if differ := int((np.unique(labelled, return_counts=True)[1] > 1).sum()):
                yield f"{differ:,} of {len(unique):,} different {noun} have several records, and not all the same label"
            repeats = len(keys) - len(labelled)
        if repeats:
            yield f"{repeats:,} of {len(keys):,} {noun} repeat others word for word, and are trained on each time"

    def add(self, chunk: Chunk) -> None:
        info = self.info
        self._keys.append(chunk.arrays["keys"])
        self._values += [chunk.arrays["values"]] if len(chunk.arrays["keys"]) else []
        for name, counted in OFFSETS.items():
            if counted in info:
                self._append(name, info[counted] + np.cumsum(chunk.sizes[name]))
                info[counted] += sum(chunk.sizes[name])
        for name, array in chunk.arrays.items():
            self._append(name, array)
        if "values_each" in info and len(chunk.arrays["values"]):
            info["values_each"] = chunk.arrays["values"].shape[1]
        info["documents"] += len(chunk.arrays["records"])
        info["trained_tokens"] += int(chunk.arrays["trained"].sum())
        info["skipped"] += len(chunk.errors)
        info["skipped_messages"] += chunk.errors[: KEPT_MESSAGES - len(info["skipped_messages"])]
        self._told += chunk.told


def _open_cache(folder: Path) -> TokenCache | None:
    """The cache in a folder, or None if there is no whole one."""
    try:
        in_use = cache_folder.open_in_use(folder / "info.json")
        info = json.loads(in_use.read())
        arrays = {name: _map(folder / f"{name}.bin", *numbers) for name, numbers in _layout(info).items()}
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, KeyError):
        return None
    if any(array is None for array in arrays.values()):
        return None
    values = arrays.pop("values", np.zeros(0, np.float32)).reshape(info["documents"], -1)
    names = ("picture_offsets", "picture_starts", "content_offsets", "content")
    pictures = StoredPictures(*map(arrays.pop, names)) if KINDS[info["kind"]].has_pictures else None
    known = {"values": values, "pictures": pictures, "info": info, "in_use": in_use}
    return TokenCache(folder, info["kind"], **known, **{"trained": None, "keys": np.zeros(0, np.uint64), **arrays})


def _map(path: Path, count: int, dtype: np.dtype) -> np.ndarray | None:
    if path.stat().st_size != count * dtype.itemsize:
        return None
    # a plain view: slicing a memmap object costs many times more
    return np.memmap(path, dtype, mode="r", shape=(count,)).view(np.ndarray) if count else np.zeros(0, dtype)


def _close_synced(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def explained_disk_errors(folder: Path) -> contextlib.AbstractContextManager:
    """Says of errors of the disk that it is the cache in this folder that cannot be written."""
    way_out = "free some space, or set data.cache_dir (or MINIMIND_CACHE) to another folder"
    return disk_errors(f"{folder.parent}: cannot write the cache", way_out)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


_report_left_out = functools.cache(tell_left_out)


@functools.cache  # once, although the stages open a cache more than once
def _report_told(folder: Path, lines: tuple[str, ...]) -> None:
    """What of the records was ignored or guessed."""
    for line in lines:
        _say(line)


def _report_stale(cache: TokenCache, data: FilesConfig) -> None:
    """Says how much space earlier states of these files take, which nothing removes by itself."""
    files = {path for path, *_ in cache.info["source"]["files"]}
    earlier = [c for c in cache_folder.stored_caches(cache.folder.parent) if c.stale and files & set(c.files)]
    if earlier:
        noun = "cache" if len(earlier) == 1 else "caches"
        option = f" --cache_dir {data.cache_dir}" if data.cache_dir else ""
        _say(
            f"{len(earlier)} older {noun} of these files, {decimal(sum(c.size for c in earlier))}, can serve no run "
            f"any more; `minimind data cache --clear stale{option}` frees the space"
        )

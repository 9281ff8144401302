"""What a frozen tower says of pictures, kept on disk, so that it looks at each of them once.

A store is a folder among the caches (see `cache_folder`), named after the tower's weights, its pixels and what is asked
of it. It has a row of numbers for every picture, found by a hash of the picture's bytes: one that is changed is another
one, and equal ones share a row. Rows are only ever added, so that a process that maps them is never disturbed, and one
that is killed leaves what it had made.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from rich.filesize import decimal

from minimind_jax.data import cache_folder
from minimind_jax.data.formats import VERSION as FORMATS_VERSION
from minimind_jax.data.pixels import picture_place, shown
from minimind_jax.data.rows import Batch, Pieces
from minimind_jax.data.token_cache import TokenCache, explained_disk_errors
from minimind_jax.errors import UserError

MOST_BYTES = 2**36  # of a store; one that would be larger begins anew
DIGEST = 16  # bytes of a picture's hash

# Of the pictures with these numbers their rows, some after the others.
Look = Callable[[Sequence[int]], Iterable[np.ndarray]]


class FeatureStore:
    """The rows of a tower.

    root: of the caches. files: with its weights. described: what else decides the numbers, as JSON. shape, dtype: of a
    row.
    """

    def __init__(
        self, root: Path, files: Sequence[Path], described: dict[str, Any], shape: tuple[int, ...], dtype: np.dtype
    ):
        self.shape, self.dtype = shape, np.dtype(dtype)
        made_by = {"kind": "features", "format": cache_folder.FORMAT_VERSION, "formats": FORMATS_VERSION, **described}
        made_by |= {"shape": shape, "dtype": self.dtype.name}
        identities = cache_folder.file_identities(files, root)
        weights = [content for *_, content in identities]
        key = hashlib.sha256(json.dumps([made_by, weights], sort_keys=True).encode()).hexdigest()[:32]
        self.folder = root / key
        info = self.folder / "info.json"
        with explained_disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._writing():
                if not info.exists():
                    text = json.dumps({"kind": "features", "source": {**made_by, "files": identities}}, indent=1)
                    info.write_text(text, "utf-8")
                self._in_use = cache_folder.open_in_use(info)
        self.rows = np.zeros((0, *shape), dtype)

    def fill(self, digests: Sequence[bytes], look: Look) -> np.ndarray:
        """The number of the row of each of these pictures, (pictures,), of which new ones are looked at.

        Raises UserError where there is no room for them, or the disk cannot be written.
        """
        with explained_disk_errors(self.folder), self._writing():
            known = self._known()
            first = {digest: number for number, digest in reversed(list(enumerate(digests)))}
            if (len(known) + len(first.keys() - known.keys())) * self._row_bytes > MOST_BYTES:
                self._begin_anew()
                known = {}
            if new := sorted(number for digest, number in first.items() if digest not in known):
                self._check_room(len(new))
                self._add(len(known), [digests[number] for number in new], look(new))
                known = self._known()
            self.rows = self._map(len(known))
        return np.array([known[digest] for digest in digests], np.int64)

    @property
    def _row_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def _writing(self) -> filelock.BaseFileLock:
        return filelock.FileLock(cache_folder.lock_file(self.folder))

    def _known(self) -> dict[bytes, int]:
        """The row of every picture whose row is whole."""
        digests, features = self.folder / "digests.bin", self.folder / "features.bin"
        if not digests.exists() or not features.exists():
            return {}
        count = min(digests.stat().st_size // DIGEST, features.stat().st_size // self._row_bytes)
        stored = digests.read_bytes()
        return {stored[n * DIGEST : (n + 1) * DIGEST]: n for n in range(count)}

    def _map(self, count: int) -> np.ndarray:
        if not count:
            return np.zeros((0, *self.shape), self.dtype)
        return np.memmap(self.folder / "features.bin", self.dtype, mode="r", shape=(count, *self.shape))

    def _begin_anew(self) -> None:
        for name in ("digests.bin", "features.bin"):  # not cut: others may map them
            (self.folder / name).unlink(missing_ok=True)

    def _check_room(self, count: int) -> None:
        needed, free = count * self._row_bytes, shutil.disk_usage(self.folder).free
        if needed > min(free, MOST_BYTES):
            raise UserError(
                f"what the tower says of {count:,} pictures takes {decimal(needed)}, and {self.folder.parent} has room "
                f"for {decimal(min(free, MOST_BYTES))}; set data.cache_dir to a larger disk, or go on without it: "
                "--vision.train tower of classify, --data.cache_features false of the others"
            )

    def _add(self, count: int, digests: Sequence[bytes], rows: Iterable[np.ndarray]) -> None:
        """Behind the `count` rows that are whole. A row counts when its digest is written."""
        with open(self.folder / "features.bin", "ab") as features, open(self.folder / "digests.bin", "ab") as names:
            features.truncate(count * self._row_bytes)
            names.truncate(count * DIGEST)
            done = 0
            for some in rows:
                features.write(np.ascontiguousarray(some, self.dtype).tobytes())
                features.flush()
                names.write(b"".join(digests[done : done + len(some)]))
                names.flush()
                done += len(some)
            os.fsync(features.fileno())


class Features:
    """Gives rows what a tower said of their pictures, at most `room` of a row, in place of pixels."""

    def __init__(self, store: FeatureStore, room: int):
        self.store, self.room = store, room
        self._rows: dict[Path, np.ndarray] = {}

    def look_at(
        self,
        caches: Sequence[tuple[TokenCache, list[bytes]]],
        look: Callable[[TokenCache, Sequence[int]], Iterable[np.ndarray]],
    ) -> None:
        """Makes what is missing of the pictures of caches, with their digests, whose rows `look` makes of these numbers
        of a cache."""
        starts = np.cumsum([0, *(len(digests) for _, digests in caches)])
        bounds = [(cache, *ends) for (cache, _), *ends in zip(caches, starts, starts[1:], strict=False)]

        def look_in_all(numbers: Sequence[int]) -> Iterator[np.ndarray]:
            for cache, start, stop in bounds:
                if own := [number - start for number in numbers if start <= number < stop]:
                    yield from look(cache, own)

        rows = self.store.fill([digest for _, own in caches for digest in own], look_in_all)
        self._rows = {cache.folder: rows[start:stop] for cache, start, stop in bounds}

    def annotate(self, cache: TokenCache, pieces: Pieces) -> Batch:
        """features: (rows, room, ...), of each row its pictures in the order of their markers, then zeros."""
        found = np.zeros((pieces.row_count, self.room, *self.store.shape), self.store.dtype)
        for row, slot, number in shown(cache, pieces):
            found[row, slot] = self.store.rows[self._rows[cache.folder][number]]
        return {"features": found}


def hash_of(digests: Iterable[bytes]) -> str:
    """Of what is in all of some pictures."""
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


def picture_digests(cache: TokenCache, root: Path) -> list[bytes]:
    """Of each picture a hash of its bytes; those of files are remembered in `root` as long as these are not touched.

    Raises UserError for a file that is there no more, before a run comes to it.
    """
    digests, files = [], {}
    for number in range(len(cache.pictures.marker_starts)):
        picture = cache.pictures.picture(number)
        if isinstance(picture, Path):
            if not picture.exists():
                raise UserError(
                    f"{picture_place(cache, number)}: the picture {picture} is gone since its record was read; put it "
                    "back, or have the records read anew by removing their cache (`minimind data cache`)"
                )
            files[number], picture = picture, b""
        digests.append(hashlib.blake2b(picture, digest_size=DIGEST).digest())
    try:
        for number, (*_, content) in zip(files, cache_folder.file_identities(files.values(), root), strict=True):
            digests[number] = bytes.fromhex(content)
    except OSError as error:
        raise UserError(f"the picture {error.filename} cannot be read any more: {error.strerror}") from error
    return digests

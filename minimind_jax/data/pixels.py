"""The pictures of rows, read when a batch is made: what a model that sees is given beside its tokens."""

import concurrent.futures
import os
from collections.abc import Iterable, Iterator

import numpy as np

from minimind_jax.data.images import read_image
from minimind_jax.data.rows import Batch, Pieces
from minimind_jax.data.token_cache import TokenCache
from minimind_jax.model.config import TowerConfig

DECODERS = 8  # threads at most; decoders work without Python's lock


class Pixels:
    """Reads the pictures of rows for a tower, at most `room` of a row."""

    def __init__(self, tower: TowerConfig, room: int):
        self.tower, self.room = tower, room
        self._threads = concurrent.futures.ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1), "pictures")

    def annotate(self, cache: TokenCache, pieces: Pieces) -> Batch:
        """pixels: uint8 (rows, room, S, S, 3), of each row its pictures in the order of their markers, then zeros.
        Raises UserError as `read`."""
        side, places = self.tower.image_size, list(shown(cache, pieces))
        pixels = np.zeros((pieces.row_count, self.room, side, side, 3), np.uint8)
        for (row, slot, _), found in zip(places, self.read(cache, [number for *_, number in places]), strict=True):
            pixels[row, slot] = found
        return {"pixels": pixels}

    def read(self, cache: TokenCache, numbers: Iterable[int]) -> Iterator[np.ndarray]:
        """uint8 (S, S, 3) of each of these pictures, several at a time. Raises UserError for one that was there when
        the data was tokenised and cannot be read any more."""
        return self._threads.map(
            lambda number: read_image(cache.pictures.picture(number), self.tower, picture_place(cache, number)), numbers
        )


def shown(cache: TokenCache, pieces: Pieces) -> Iterator[tuple[int, int, int]]:
    """(row, its place there, number in the cache) of every picture whose markers begin within its piece."""
    offsets, starts = cache.pictures.offsets, cache.pictures.marker_starts
    used = np.zeros(pieces.row_count, np.int64)
    for row, document, stop in zip(pieces.rows, pieces.documents, pieces.stops, strict=True):
        for number in range(offsets[document], offsets[document + 1]):
            if starts[number] < stop:
                yield row, used[row], number
                used[row] += 1


def picture_place(cache: TokenCache, number: int) -> str:
    """Where a picture of a cache came from, for messages."""
    document = np.searchsorted(cache.pictures.offsets, number, side="right") - 1
    return f"record {cache.records[document] + 1}, image {number - cache.pictures.offsets[document] + 1}"

"""The pictures of rows, read when a batch is made: what a model that sees is given beside its tokens."""

import concurrent.futures
import os
from collections.abc import Iterator

import numpy as np

from minimind_jax.data.images import read_image
from minimind_jax.data.pictures import PictureFile
from minimind_jax.data.rows import Batch, Pieces
from minimind_jax.data.token_cache import TokenCache
from minimind_jax.errors import UserError
from minimind_jax.model.config import TowerConfig

DECODERS = 8  # threads at most; decoders work without Python's lock


class Pixels:
    """Reads the pictures of rows for a tower, at most `room` of a row."""

    def __init__(self, tower: TowerConfig, room: int):
        self.tower, self.room = tower, room
        self._threads = concurrent.futures.ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1), "pictures")

    def annotate(self, cache: TokenCache, pieces: Pieces) -> Batch:
        """pixels: uint8 (rows, room, S, S, 3), of each row its pictures in the order of their markers, then zeros.

        Raises UserError for a picture that was there when the data was tokenised and cannot be read any more.
        """
        side, reads = self.tower.image_size, []
        pixels = np.zeros((pieces.row_count, self.room, side, side, 3), np.uint8)

        def read(row: int, slot: int, picture: PictureFile, where: str) -> None:
            pixels[row, slot] = read_image(picture, self.tower, where)

        for row, slot, number in shown(cache, pieces):
            where = picture_place(cache, number)
            reads.append(self._threads.submit(read, row, slot, cache.pictures.picture(number), where))
        for each in reads:
            each.result()
        return {"pixels": pixels}


def shown(cache: TokenCache, pieces: Pieces) -> Iterator[tuple[int, int, int]]:
    """(row, its place there, number in the cache) of every picture whose markers begin within its piece."""
    offsets, starts = cache.pictures.offsets, cache.pictures.marker_starts
    used = np.zeros(pieces.row_count, np.int64)
    for row, document, stop in zip(pieces.rows, pieces.documents, pieces.stops, strict=True):
        for number in range(offsets[document], offsets[document + 1]):
            if starts[number] < stop:
                yield row, used[row], number
                used[row] += 1


def check_files(cache: TokenCache) -> None:
    """Raises UserError for a picture of a cache whose file is there no more, before a run comes to it."""
    for number, file in cache.pictures.files():
        if not file.exists():
            raise UserError(
                f"{picture_place(cache, number)}: the picture {file} is gone since its record was read; put it back, "
                "or have the records read anew by removing their cache (`minimind data cache`)"
            )


def picture_place(cache: TokenCache, number: int) -> str:
    """Where a picture of a cache came from, for messages."""
    document = np.searchsorted(cache.pictures.offsets, number, side="right") - 1
    return f"record {cache.records[document] + 1}, image {number - cache.pictures.offsets[document] + 1}"

"""Pieces of documents -> the rows of a step, all of them in one gather.

`tests/data/slow_rows.py` says the same row by row and piece by piece, and is what this is compared with.
"""

import dataclasses

import numpy as np

from minimind_jax.data.token_cache import TokenCache

Batch = dict[str, np.ndarray]


@dataclasses.dataclass
class Pieces:
    """Tokens [start, stop) of documents of a cache, end to end in rows of one length; in order.

    rows, segments, documents, starts, stops: (pieces,) the row of each, from 0, and its number in that row, from 0.
    row_count: also of rows without a piece.

    From these follow lengths and begins (pieces,), of which the latter says where each begins in the rows laid end to
    end; segment_ids int32 (rows, T), where the pieces of a row count from 1 and padding is 0; is_padding (rows, T);
    positions int32 (rows, T), of every token its place in its piece, 0 for padding.
    """

    row_count: int
    seq_len: int
    rows: np.ndarray
    segments: np.ndarray
    documents: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    def __post_init__(self):
        self.lengths = self.stops - self.starts
        # What fills the rows: their pieces and, behind those of each, its padding.
        self._place = np.arange(len(self.rows)) + self.rows
        self._runs = runs = np.empty(len(self.rows) + self.row_count, np.int64)
        runs[self._place] = self.lengths
        last = np.bincount(self.rows, minlength=self.row_count).cumsum() + np.arange(self.row_count)
        runs[last] = self.seq_len - np.bincount(self.rows, self.lengths, self.row_count)
        self.begins = (runs.cumsum() - runs).astype(np.int32)[self._place]
        self.segment_ids = self.each((self.segments + 1).astype(np.int32))
        self.is_padding = self.segment_ids == 0
        places = np.arange(self.segment_ids.size, dtype=np.int32).reshape(self.segment_ids.shape)
        self.positions = places - self.each(self.begins)
        self.positions[self.is_padding] = 0

    def each(self, of_piece: np.ndarray) -> np.ndarray:
        """At every place the value of its piece, 0 for padding; (rows, T)."""
        values = np.zeros(len(self._runs), of_piece.dtype)
        values[self._place] = of_piece
        return values.repeat(self._runs).reshape(self.row_count, self.seq_len)

    def sources(self, cache: TokenCache) -> np.ndarray:
        """Where every token stands in the arrays of the cache, 0 for padding; (rows, T)."""
        return self.positions + self.each(cache.offsets[self.documents] + self.starts)


def pack_rows(cache: TokenCache, pieces: Pieces, token_bytes: np.ndarray, reaches_on: bool = True) -> Batch:
    """The rows of these pieces: arrays (rows, T).

    tokens, targets int32: targets[r, t] is the next token of the same document; if `reaches_on`, a piece that was cut
        off has its last target, too: the token the next piece begins with.
    loss_weights float32: 1 where the target is trained, 0 where it is not, where there is none, and on padding.
    positions, segment_ids int32: from 0 in each piece; pieces count from 1, padding is 0.
    target_bytes int32: UTF-8 bytes of the targets that are trained.
    """
    sources = pieces.sources(cache)
    tokens = cache.tokens.take(sources).astype(np.int32)
    tokens[pieces.is_padding] = cache.info["pad_id"]

    following = sources + 1
    targets = cache.tokens.take(following, mode="clip").astype(np.int32)
    trained = ~pieces.is_padding if cache.trained is None else cache.trained.take(following, mode="clip")
    rows = {
        "tokens": tokens,
        "targets": targets,
        "loss_weights": trained.astype(np.float32),
        "positions": pieces.positions,
        "segment_ids": pieces.segment_ids,
        "target_bytes": token_bytes.take(targets) * trained,
    }
    has_end = pieces.lengths > 0
    if reaches_on:
        has_end &= pieces.stops == cache.lengths[pieces.documents]
    without_target = pieces.is_padding.copy()
    without_target.ravel()[(pieces.begins + pieces.lengths - 1)[has_end]] = True
    for name in ("targets", "loss_weights", "target_bytes"):
        rows[name][without_target] = 0
    return rows


def pad_rows(cache: TokenCache, pieces: Pieces, token_bytes: np.ndarray, end_id: int | None = None) -> Batch:
    """MiniMind's rows: of each one piece, the first `seq_len` tokens of a document.

    As `pack_rows`, but a document that was cut off has no target beyond the row, and there are lengths int32 (rows,),
    which say that the rows need no mask. end_id: the token that takes the last place of a row that was cut.
    """
    rows = pack_rows(cache, pieces, token_bytes, reaches_on=False)
    rows["lengths"] = np.count_nonzero(~pieces.is_padding, axis=1).astype(np.int32)
    if end_id is not None:
        cut = pieces.rows[pieces.stops < cache.lengths[pieces.documents]]
        rows["tokens"][cut, -1] = rows["targets"][cut, -2] = end_id
        rows["target_bytes"][cut, -2] = token_bytes[end_id]
    return rows

"""Pieces of documents -> the rows of a step, all of them in one gather.

`tests/data/slow_rows.py` says the same row by row and piece by piece, and is what this is compared with.
"""

import dataclasses
import functools

import numpy as np

from minimind_jax.data.token_cache import TokenCache

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Tokens [start, stop) of documents of a cache, end to end in rows of one length; in order, arrays (pieces,).

    rows: the row of each, from 0. segments: its number in that row, from 0. row_count: also those without a piece.
    """

    row_count: int
    seq_len: int
    rows: np.ndarray
    segments: np.ndarray
    documents: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        return self.stops - self.starts

    @functools.cached_property
    def before(self) -> np.ndarray:
        """Tokens in the pieces before each."""
        return np.cumsum(self.lengths) - self.lengths

    @functools.cached_property
    def begins(self) -> np.ndarray:
        """Where each begins in the rows, which lie end to end: row * seq_len + its place there."""
        first_of_row = np.arange(len(self.rows)) - self.segments
        return self.rows * self.seq_len + self.before - self.before[first_of_row]

    @functools.cached_property
    def positions(self) -> np.ndarray:
        """Of every token its place in its piece; (tokens,), as those below."""
        return np.arange(int(self.lengths.sum())) - np.repeat(self.before, self.lengths)

    @functools.cached_property
    def places(self) -> np.ndarray:
        """Where every token stands in the rows, as `begins`."""
        return self.positions + np.repeat(self.begins, self.lengths)

    def sources(self, cache: TokenCache) -> np.ndarray:
        """Where every token stands in the arrays of the cache."""
        return self.positions + np.repeat(cache.offsets[self.documents] + self.starts, self.lengths)

    def spread(self, values: np.ndarray, padding: float = 0, dtype: type = np.int32) -> np.ndarray:
        """Of every token a value, (tokens, ...), in rows: (rows, T, ...)."""
        found = np.full((self.row_count * self.seq_len, *values.shape[1:]), padding, dtype)
        found[self.places] = values
        return found.reshape(self.row_count, self.seq_len, *values.shape[1:])


def pack_rows(cache: TokenCache, pieces: Pieces, token_bytes: np.ndarray) -> Batch:
    """The rows of these pieces: arrays (rows, T).

    tokens, targets int32: targets[r, t] is the next token of the same document; a piece that was cut off has its last
        target, too: the token the next piece begins with.
    loss_weights float32: 1 where the target is trained, 0 where it is not, where there is none, and on padding.
    positions, segment_ids int32: from 0 in each piece; pieces count from 1, padding is 0.
    target_bytes int32: UTF-8 bytes of the targets that are trained.
    """
    sources = pieces.sources(cache)
    following = cache.tokens.take(sources + 1, mode="clip")
    is_trained = 1 if cache.trained is None else cache.trained.take(sources + 1, mode="clip")
    trained = np.broadcast_to(is_trained, following.shape)
    rows = {
        "tokens": pieces.spread(cache.tokens.take(sources), cache.info["pad_id"]),
        "targets": pieces.spread(following),
        "loss_weights": pieces.spread(trained, dtype=np.float32),
        "positions": pieces.spread(pieces.positions),
        "segment_ids": pieces.spread(np.repeat(pieces.segments + 1, pieces.lengths)),
        "target_bytes": pieces.spread(token_bytes.take(following) * trained),
    }
    ends = (pieces.stops == cache.lengths[pieces.documents]) & (pieces.lengths > 0)
    _without_target(rows, (pieces.begins + pieces.lengths - 1)[ends])
    return rows


def pad_rows(cache: TokenCache, pieces: Pieces, token_bytes: np.ndarray, end_id: int | None = None) -> Batch:
    """MiniMind's rows: of each one piece, the first `seq_len` tokens of a document.

    As `pack_rows`, but a document that was cut off has no target beyond the row. end_id: the token that takes the last
    place of such a row.
    """
    rows = pack_rows(cache, pieces, token_bytes)
    cut = pieces.rows[pieces.stops < cache.lengths[pieces.documents]]
    _without_target(rows, (cut + 1) * pieces.seq_len - 1)
    if end_id is not None:
        rows["tokens"][cut, -1] = rows["targets"][cut, -2] = end_id
        rows["target_bytes"][cut, -2] = token_bytes[end_id]
    return rows


def _without_target(rows: Batch, places: np.ndarray) -> None:
    """places: in the rows, which lie end to end."""
    for name in ("targets", "loss_weights", "target_bytes"):
        rows[name].ravel()[places] = 0

"""The rows of one epoch: how a cache is packed, the order of the rows, and the arrays of any of them."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from grain.experimental import index_shuffle

from minimind_jax.config.sections import FilesConfig
from minimind_jax.data.packing import PackingPlan, plan_best_fit, plan_concat, plan_heads, plan_pad, plan_pairs
from minimind_jax.data.rows import Batch, Pieces, pack_rows, pad_rows
from minimind_jax.data.token_cache import TokenCache
from minimind_jax.seeds import named_seed

# Of a cache and the pieces of some rows: more arrays, (rows, ...) each.
Annotate = Callable[[TokenCache, Pieces], Batch]


@dataclasses.dataclass(frozen=True)
class Epoch:
    """The rows of one epoch.

    documents: (n,) documents of the cache the plan is about. shuffle_seed: of the order of the rows; None for the
    plan's. packing: `data.packing`; for kinds with one of their own, the kind. annotate: adds to rows what belongs to
    their pieces.
    """

    cache: TokenCache
    documents: np.ndarray
    plan: PackingPlan
    shuffle_seed: int | None
    packing: str
    annotate: "Annotate | None" = None

    def rows(self, places: Sequence[int], token_bytes: np.ndarray) -> Batch:
        """The rows at these places of the epoch: arrays (rows, T), all padding beyond the last row."""
        pieces = self._pieces(places)
        if self.packing == "pad":
            end_id = self.cache.info["eos_id"] if self.cache.kind == "text" else None  # text keeps its end token
            rows = pad_rows(self.cache, pieces, token_bytes, end_id)
        else:
            rows = pack_rows(self.cache, pieces, token_bytes)
        return rows | self.annotate(self.cache, pieces) if self.annotate else rows

    def steps(self, rows_per_step: int) -> int:
        """Steps that the rows make, of which the last may not be full."""
        return -(-self.plan.rows // rows_per_step)

    def _pieces(self, places: Sequence[int]) -> Pieces:
        """The pieces of the rows at these places, of which those beyond the last row come last."""
        plan, last, seed = self.plan, self.plan.rows - 1, self.shuffle_seed
        there = [place for place in places if place <= last]
        rows = np.array(there if seed is None else [index_shuffle(place, last, seed, 4) for place in there], np.int64)
        counts = plan.row_starts[rows + 1] - plan.row_starts[rows]
        segments = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        pieces = np.repeat(plan.row_starts[rows], counts) + segments
        return Pieces(
            row_count=len(places),
            seq_len=plan.seq_len,
            rows=np.repeat(np.arange(len(rows)), counts),
            segments=segments,
            documents=self.documents[plan.documents[pieces]],
            starts=plan.starts[pieces],
            stops=plan.stops[pieces],
        )


def plan_epoch(cache: TokenCache, documents: np.ndarray, data: FilesConfig, seed: int, epoch: int) -> Epoch:
    """Packs these documents of a cache for one epoch and draws the order of the rows."""
    lengths = cache.lengths[documents]
    targets = functools.partial(_count_targets, cache, documents)
    places = functools.partial(_turns, cache, documents), data.seq_len, seed, epoch, data.shuffle
    starts = functools.partial(_message_starts, cache, documents)
    if cache.kind == "preference":
        plan = plan_pairs(lengths, *places, starts)
    elif cache.kind == "labelled":
        plan = plan_heads(lengths, data.seq_len, seed, epoch, data.shuffle)
    elif data.packing == "concat":
        plan = plan_concat(lengths, data.seq_len, seed, epoch, data.shuffle, targets)
    elif data.packing == "best_fit":
        is_chat = cache.kind == "conversation"  # of text a last token alone is left untrained, which costs nothing
        plan = plan_best_fit(lengths, *places, *((starts, targets) if is_chat else ()))
    else:
        plan = plan_pad(lengths, data.seq_len, targets)
    shuffle_seed = named_seed(seed, "rows", epoch) % 2**32 if data.shuffle else None
    packing = data.packing if cache.kind in ("text", "conversation") else cache.kind
    return Epoch(cache, documents, plan, shuffle_seed, packing)


def _turns(cache: TokenCache, documents: np.ndarray, index: int) -> np.ndarray:
    return cache.turns(documents[index])


def _message_starts(cache: TokenCache, documents: np.ndarray, index: int) -> np.ndarray:
    """Where messages may begin in a conversation or pair: at every token like that of its first turn, or its second."""
    document = documents[index]
    ids, turns = cache.ids(document, 0, int(cache.lengths[document])), cache.turns(document)
    first = turns[1] if cache.kind == "conversation" and len(turns) > 1 else 0
    return np.flatnonzero((ids == ids[0]) | (ids == ids[first]))


def _count_targets(cache: TokenCache, documents: np.ndarray, pieces, starts, stops) -> np.ndarray:
    """Trained targets of the pieces [start, stop) of these documents, (pieces,); as `pack_rows` weighs them."""
    own = documents[pieces]
    first = cache.offsets[own] + starts + 1
    last = np.minimum(cache.offsets[own] + stops + 1, cache.offsets[own + 1])
    if cache.trained is None:
        return np.maximum(last - first, 0)
    counts, some = np.zeros(len(first), np.int64), np.flatnonzero(last > first)
    some = some[np.argsort(first[some], kind="stable")]  # in the order of the file, which is then read once
    if len(some):
        first, end = first[some], last[some] - 1
        sums = np.add.reduceat(cache.trained, np.stack([first, end], axis=1).ravel(), dtype=np.int64)[::2]
        counts[some] = np.where(first < end, sums, 0) + cache.trained[end]
    return counts

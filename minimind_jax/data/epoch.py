"""The rows of one epoch: how a cache is packed, the order of the rows, and the arrays of any of them."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from grain.experimental import index_shuffle

from minimind_jax.config.sections import FilesConfig
from minimind_jax.data.kinds import KINDS
from minimind_jax.data.packing import Order, PackingPlan, plan_best_fit, plan_concat, plan_pad, plan_pairs, plan_whole
from minimind_jax.data.rows import Batch, Pieces, pack_rows, pad_rows
from minimind_jax.data.token_cache import TokenCache
from minimind_jax.errors import UserError
from minimind_jax.seeds import named_seed

# Of a cache and the pieces of some rows: more arrays, (rows, ...) each.
Annotate = Callable[[TokenCache, Pieces], Batch]


@dataclasses.dataclass(frozen=True)
class Epoch:
    """The rows of one epoch."""

    cache: TokenCache
    documents: np.ndarray  # (n,) documents of the cache the plan is about
    plan: PackingPlan
    seed: int | None  # of the order of the rows, 32 bits; None for that of the plan
    packing: str  # of PACKINGS
    annotate: Annotate | None = None  # adds to rows what belongs to their pieces

    def rows(self, places: Sequence[int], token_bytes: np.ndarray) -> Batch:
        """The rows at these places of the epoch: arrays (rows, T), all padding beyond the last row."""
        pieces = self._pieces(places)
        if self.packing == "pad":
            end_id = self.cache.info["eos_id"] if KINDS[self.cache.kind].cut_freely else None
            rows = pad_rows(self.cache, pieces, token_bytes, end_id)
        else:
            rows = pack_rows(self.cache, pieces, token_bytes)
        return rows | self.annotate(self.cache, pieces) if self.annotate else rows

    def row_at(self, place: int) -> int:
        """The plan's row at a place of the epoch. The order is that of grain's shuffle, which above 65,536 leaves
        the last of 4**k + 1 out and gives another twice; there the last stays in its place."""
        last = self.plan.rows - 1
        is_faulty = last >= 2**16 and last.bit_count() == 1
        if self.seed is None or (is_faulty and place == last):
            return place
        return index_shuffle(place, last - is_faulty, self.seed, 4)

    def steps(self, rows_per_step: int) -> int:
        """Steps that the rows make, of which the last may not be full."""
        return -(-self.plan.rows // rows_per_step)

    def _pieces(self, places: Sequence[int]) -> Pieces:
        """The pieces of the rows at these places, of which those beyond the last row come last."""
        plan = self.plan
        rows = np.array([self.row_at(place) for place in places if place < plan.rows], np.int64)
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


def plan_epoch(
    cache: TokenCache,
    documents: np.ndarray,
    data: FilesConfig,
    seed: int,
    epoch: int,
    packing: str = "",
    annotate: Annotate | None = None,
) -> Epoch:
    """Packs these documents of a cache for one epoch and draws the order of the rows.

    packing: of the kind's; by default its only one, or `data.packing`. annotate: see `Epoch`.
    """
    own = KINDS[cache.kind].packings
    packing = packing or (own[0] if len(own) == 1 else data.packing)
    plan = PACKINGS[packing](_Documents(cache, documents, data), data.seq_len, Order(seed, epoch, data.shuffle))
    order_seed = named_seed(seed, "rows", epoch) % 2**32 if data.shuffle else None
    return Epoch(cache, documents, plan, order_seed, packing, annotate)


class _Documents(NamedTuple):
    """What a plan may ask about the documents of a cache, by their number among these. data: how they are read."""

    cache: TokenCache
    documents: np.ndarray
    data: FilesConfig

    @property
    def lengths(self) -> np.ndarray:
        return self.cache.lengths[self.documents]

    def turns(self, index: int) -> np.ndarray:
        return self.cache.turns(self.documents[index])

    def message_starts(self, index: int, turn: int = 0) -> np.ndarray:
        """Where messages may begin: at every token like that of the first turn, or of this one."""
        document, turns = self.documents[index], self.turns(index)
        ids = self.cache.ids(document, 0, int(self.cache.lengths[document]))
        return np.flatnonzero((ids == ids[0]) | (ids == ids[turns[min(turn, len(turns) - 1)]]))

    def targets(self, pieces: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Trained targets of the pieces [start, stop) of these documents, (pieces,); as `pack_rows` weighs them."""
        cache, own = self.cache, self.documents[pieces]
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


def _best_fit(documents: _Documents, *how) -> PackingPlan:
    if KINDS[documents.cache.kind].cut_freely:  # then a last token alone is left untrained, which costs nothing
        return plan_best_fit(documents.lengths, documents.turns, *how)
    starts = functools.partial(documents.message_starts, turn=1)
    return plan_best_fit(documents.lengths, documents.turns, *how, starts, documents.targets)


def _images(documents: _Documents, *how) -> PackingPlan:
    data, cache = documents.data, documents.cache
    images = cache.pictures.counts(data.seq_len)[documents.documents]
    return plan_whole(documents.lengths, *how, documents.targets, images, data.image_room(cache.info["image_tokens"]))


# Of the documents, data.seq_len and an Order: where everything goes.
PACKINGS: dict[str, Callable[..., PackingPlan]] = {
    "concat": lambda documents, *how: plan_concat(documents.lengths, *how, documents.targets),
    "best_fit": _best_fit,
    "pad": lambda documents, seq_len, *_: plan_pad(documents.lengths, seq_len, documents.targets),
    "pairs": lambda documents, *how: plan_pairs(documents.lengths, documents.turns, *how, documents.message_starts),
    "heads": lambda documents, *how: plan_whole(documents.lengths, *how),
    "images": _images,
}


def describe_cuts(epoch: Epoch) -> str:
    """What is cut or left out of an epoch's documents, in words; "" where nothing is."""
    plan, packing, kind = epoch.plan, epoch.packing, KINDS[epoch.cache.kind]
    lengths = epoch.cache.lengths[epoch.documents]
    told = []
    if plan.cut_documents and packing == "concat":
        if not kind.cut_freely:  # texts are joined and cut on purpose
            told.append(
                f"{plan.cut_documents:,} of {len(lengths):,} {kind.noun} run over the end of a row and are cut there, "
                "wherever that is (data.packing best_fit cuts between turns)"
            )
    elif plan.cut_documents:
        told.append(
            f"{plan.cut_documents:,} of {len(lengths):,} {kind.noun} are longer than data.seq_len {plan.seq_len}: "
            + _what_is_cut(plan, packing)
        )
    if plan.left_out and packing == "images":
        most = epoch.cache.pictures.counts(plan.seq_len)[epoch.documents].max()
        told.append(
            f"{plan.left_out:,} {kind.noun} left out that have more images than data.images_per_row (up to {most})"
        )
    elif plan.left_out:
        told.append(f"{plan.left_out:,} {kind.noun} left out whose answers have no room in a row")
    if plan.untrained:
        unit = {"best_fit": "pieces", "concat": "rows"}.get(packing, kind.noun)
        told.append(f"{plan.untrained:,} {unit} left out in which nothing is trained")
    if plan.dropped_tokens:
        share = plan.dropped_tokens / lengths.sum()
        told.append(f"{plan.dropped_tokens:,} of {lengths.sum():,} tokens ({share:.1%}) lost")
    if told and packing != "concat" and (advice := _advice(lengths, plan.seq_len)):
        told.append(advice)
    return "; ".join(told)


def check_rows(epoch: Epoch, role: str) -> None:
    """Raises UserError when an epoch has no row, with the way out. role: what the data is."""
    if epoch.plan.rows:
        return
    lengths = epoch.cache.lengths[epoch.documents]
    if not len(lengths):
        raise UserError("no document is left to train on; lower data.val_fraction or give more data")
    kind = KINDS[epoch.cache.kind]
    raise UserError(
        f"{role}: nothing is trained in any of {len(lengths):,} {kind.noun}: {kind.why_no_row} at data.seq_len "
        f"{epoch.plan.seq_len}; {_advice(lengths, epoch.plan.seq_len) or 'raise data.seq_len, or mend the data'}"
    )


def _what_is_cut(plan: PackingPlan, packing: str) -> str:
    if packing == "best_fit":
        further = int((plan.starts > 0).sum())
        inside = f", {plan.cut_turns:,} of the cuts inside a turn" * bool(plan.cut_turns)
        return (
            f"cut between turns{inside}; their {further:,} further pieces begin without the system prompt, the tools "
            "and all that was said before"
        )
    return "the beginning of their prompts is cut off" if packing == "pairs" else "their ends are cut off"


def _advice(lengths: np.ndarray, seq_len: int) -> str:
    """The row lengths that would hold 95 % of the documents, and all of them."""
    needed = {share: -int(-np.quantile(lengths, share) // 16) * 16 for share in (0.95, 1.0)}
    if needed[1.0] <= seq_len:
        return ""
    most = f"data.seq_len {needed[0.95]} holds 95 % of them whole, " * (seq_len < needed[0.95] < needed[1.0])
    return f"{most}{needed[1.0]} all" if most else f"data.seq_len {needed[1.0]} holds all of them whole"

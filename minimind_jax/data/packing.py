"""Which tokens of which document go into which row: plans made from lengths alone, before a token is read.

A plan is a pure function of its arguments. A row is a list of pieces, a piece the tokens [start, stop) of a document.
`plan_concat` is for pretraining, `plan_best_fit` for conversations, `plan_pairs` for preferences, `plan_heads` for
labelled texts, `plan_pad` is MiniMind's one document a row.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from minimind_jax.seeds import named_seed


@dataclasses.dataclass(frozen=True)
class PackingPlan:
    """Rows of at most `seq_len` tokens, each a run of pieces.

    row_starts: (rows + 1,) row r holds the pieces row_starts[r] to row_starts[r + 1].
    documents, starts, stops: (pieces,) tokens [start, stop) of that document.
    cut_documents: documents that are in more than one piece, or lost their tail.
    cut_turns: turns longer than a row, which had to be cut inside (`plan_best_fit`).
    dropped_tokens: tokens in no piece (`plan_concat` and `plan_best_fit` drop none).
    left_out: documents in no row (`plan_pairs`).
    """

    seq_len: int
    row_starts: np.ndarray
    documents: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    cut_documents: int = 0
    cut_turns: int = 0
    dropped_tokens: int = 0
    left_out: int = 0

    @property
    def rows(self) -> int:
        return len(self.row_starts) - 1

    @property
    def tokens(self) -> int:
        """Tokens that are in a row."""
        return int((self.stops - self.starts).sum(dtype=np.int64))

    @property
    def efficiency(self) -> float:
        """Share of the rows' places that hold a token."""
        return self.tokens / (self.rows * self.seq_len) if self.rows else 1.0

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        """(document, start, stop) of each piece of a row, in order."""
        where = slice(self.row_starts[row], self.row_starts[row + 1])
        return list(
            zip(self.documents[where].tolist(), self.starts[where].tolist(), self.stops[where].tolist(), strict=True)
        )


def plan_concat(lengths: np.ndarray, seq_len: int, seed: int, epoch: int, shuffle: bool = True) -> PackingPlan:
    """Documents in an order drawn for the epoch, joined end to end and cut where a row ends; nothing is dropped.

    Every row but the last is full. lengths: (documents,) tokens of each.
    """
    lengths = np.asarray(lengths, np.int64)
    order = _document_order(len(lengths), seed, epoch, shuffle)
    ends = np.cumsum(lengths[order])
    total = int(ends[-1]) if len(ends) else 0
    bounds = np.sort(np.concatenate([np.arange(0, total, seq_len), ends]), kind="stable")  # stable merges sorted runs
    bounds = bounds[np.diff(bounds, prepend=-1) > 0]
    begins, stops = bounds[:-1], bounds[1:]
    place = np.searchsorted(ends, begins, side="right")
    origin = (ends - lengths[order])[place]
    return _plan(
        seq_len,
        rows=begins // seq_len,
        documents=order[place],
        starts=begins - origin,
        stops=stops - origin,
        cut_documents=int((np.bincount(place, minlength=1) > 1).sum()),
    )


def plan_best_fit(
    lengths: np.ndarray,
    turn_starts: Callable[[int], np.ndarray],
    seq_len: int,
    seed: int,
    epoch: int,
    shuffle: bool = True,
) -> PackingPlan:
    """Whole documents, the longest first, each into the fullest row that still has room for it.

    Documents longer than a row are cut, at the start of a turn if one lies within the row's length, inside the turn
    (counted in `cut_turns`) if not. Documents of one length are interchangeable: their order is drawn for the epoch,
    so rows are composed anew in each.

    lengths: (documents,) tokens of each. turn_starts: of a document's number, the places where it may be cut.
    """
    lengths = np.asarray(lengths, np.int64)
    fitting = np.flatnonzero(lengths <= seq_len)
    cuts = [
        (doc, *split_at_turns(lengths[doc], turn_starts(doc), seq_len)) for doc in np.flatnonzero(lengths > seq_len)
    ]
    documents = np.concatenate([fitting, *(np.full(len(bounds) - 1, doc) for doc, bounds, _ in cuts)]).astype(np.int64)
    starts = np.concatenate([np.zeros_like(fitting), *(bounds[:-1] for _, bounds, _ in cuts)]).astype(np.int64)
    stops = np.concatenate([lengths[fitting], *(bounds[1:] for _, bounds, _ in cuts)]).astype(np.int64)

    order = _document_order(len(documents), seed, epoch, shuffle)
    order = order[np.argsort(-(stops - starts)[order], kind="stable")]
    rows = _best_fit_decreasing((stops - starts)[order], seq_len)
    by_row = np.argsort(rows, kind="stable")
    order = order[by_row]
    return _plan(
        seq_len,
        rows=rows[by_row],
        documents=documents[order],
        starts=starts[order],
        stops=stops[order],
        cut_documents=len(cuts),
        cut_turns=sum(turns for _, _, turns in cuts),
    )


def plan_pad(lengths: np.ndarray, seq_len: int) -> PackingPlan:
    """One document a row, in order, cut at `seq_len` as MiniMind does; lengths: (documents,) tokens of each."""
    lengths = np.asarray(lengths, np.int64)
    stops = np.minimum(lengths, seq_len)
    return _plan(
        seq_len,
        rows=np.arange(len(lengths)),
        documents=np.arange(len(lengths)),
        starts=np.zeros_like(lengths),
        stops=stops,
        cut_documents=int((lengths > seq_len).sum()),
        dropped_tokens=int((lengths - stops).sum()),
    )


def plan_pairs(
    lengths: np.ndarray,
    bounds: Callable[[int], np.ndarray],
    seq_len: int,
    seed: int,
    epoch: int,
    shuffle: bool = True,
) -> PackingPlan:
    """Pairs of answers, both sides of one in the same row as two pieces, the chosen one first; packed by best fit.

    Where a pair is longer than a row, the beginning of the prompt is cut away on both sides alike, so that the answers
    survive. A pair whose answers leave no room for a token of the prompt is left out.

    lengths: (documents,) tokens of both sides. bounds: of a document's number, (0, tokens of the shared prompt, tokens
    of the chosen side).
    """
    lengths = np.asarray(lengths, np.int64)
    cut = -(-np.maximum(lengths - seq_len, 0) // 2)
    turns = np.array([bounds(document) for document in range(len(lengths))], np.int64).reshape(-1, 3)
    kept = np.flatnonzero(cut < np.maximum(turns[:, 1], 1))
    middle = turns[kept, 2]
    starts = np.stack([cut[kept], middle + cut[kept]], axis=1)
    stops = np.stack([middle, lengths[kept]], axis=1)
    plan = _plan_groups(kept, starts, stops, seq_len, seed, epoch, shuffle)
    return dataclasses.replace(
        plan,
        cut_documents=int((cut[kept] > 0).sum()),
        dropped_tokens=int(lengths.sum() - plan.tokens),
        left_out=len(lengths) - len(kept),
    )


def plan_heads(lengths: np.ndarray, seq_len: int, seed: int, epoch: int, shuffle: bool = True) -> PackingPlan:
    """Documents as one piece each, cut at `seq_len`, packed by best fit; for texts with labels."""
    lengths = np.asarray(lengths, np.int64)
    stops = np.minimum(lengths, seq_len)[:, None]
    plan = _plan_groups(np.arange(len(lengths)), np.zeros_like(stops), stops, seq_len, seed, epoch, shuffle)
    return dataclasses.replace(
        plan,
        cut_documents=int((lengths > seq_len).sum()),
        dropped_tokens=int(lengths.sum() - plan.tokens),
    )


def _plan_groups(documents, starts, stops, seq_len: int, seed: int, epoch: int, shuffle: bool) -> PackingPlan:
    """Best fit of groups that stay together: documents (groups,), the pieces' starts and stops (groups, pieces)."""
    sizes = (stops - starts).sum(axis=1)
    order = _document_order(len(documents), seed, epoch, shuffle)
    order = order[np.argsort(-sizes[order], kind="stable")]
    rows = _best_fit_decreasing(sizes[order], seq_len)
    by_row = np.argsort(rows, kind="stable")
    order, pieces = order[by_row], starts.shape[1]
    return _plan(
        seq_len,
        rows=np.repeat(rows[by_row], pieces),
        documents=np.repeat(documents[order], pieces),
        starts=starts[order].ravel(),
        stops=stops[order].ravel(),
    )


def split_at_turns(length: int, turn_starts: np.ndarray, seq_len: int) -> tuple[np.ndarray, int]:
    """Bounds of the pieces of one long document, each at most `seq_len` long and as long as the turns allow.

    Returns the bounds, from 0 to length, and how often a turn had to be cut inside.
    """
    allowed = np.append(np.asarray(turn_starts, np.int64), length)
    bounds, cut_turns = [0], 0
    while bounds[-1] < length:
        limit = bounds[-1] + seq_len
        best = int(allowed[np.searchsorted(allowed, limit, side="right") - 1]) if allowed[0] <= limit else 0
        if best <= bounds[-1]:
            best, cut_turns = limit, cut_turns + 1
        bounds.append(best)
    return np.array(bounds, np.int64), cut_turns


def _document_order(count: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    if not shuffle:
        return np.arange(count)
    return np.random.default_rng(named_seed(seed, "documents", epoch)).permutation(count)


def _best_fit_decreasing(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Row of each piece, by best fit; `lengths` descend and none is above seq_len.

    Pieces of one length and rows with one amount of room are interchangeable, so they are placed together: the
    tightest rows take as many pieces as fit, since a row that has just taken one is the tightest of all. Which amounts
    of room exist is a set of bits, so the tightest fit is its lowest bit at or above the length. The work is
    bounded by the pieces and by the pairs of a length and a room, not by pieces times rows.
    """
    rows = np.empty(len(lengths), np.int64)
    room_rows: dict[int, list[np.ndarray]] = {}
    room_bits, row_count, done = 0, 0, 0

    def put_back(room: int, row_ids: np.ndarray):
        nonlocal room_bits
        if room and len(row_ids):
            room_rows.setdefault(room, []).append(row_ids)
            room_bits |= 1 << room

    values, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while length and count:
            fits = room_bits >> length
            if fits:
                room = length + (fits & -fits).bit_length() - 1
                row_ids = np.concatenate(room_rows.pop(room))
                room_bits ^= 1 << room
            else:
                room = seq_len
                row_ids = np.arange(row_count, row_count - (-count // (seq_len // length)))
                row_count += len(row_ids)
            each = room // length
            used = min(len(row_ids), -(-count // each))
            placed = min(count, used * each)
            rows[done : done + placed] = np.repeat(row_ids[:used], each)[:placed]
            done, count = done + placed, count - placed
            partly = placed - (used - 1) * each
            put_back(room - each * length, row_ids[: used - 1])
            put_back(room - partly * length, row_ids[used - 1 : used])
            put_back(room, row_ids[used:])
    rows[done:] = 0  # pieces of length 0 take no room
    return rows


def _plan(seq_len: int, rows: np.ndarray, documents: np.ndarray, starts, stops, **counts) -> PackingPlan:
    """A plan from pieces that are sorted by row."""
    row_count = int(rows[-1]) + 1 if len(rows) else 0
    return PackingPlan(
        seq_len=seq_len,
        row_starts=np.searchsorted(rows, np.arange(row_count + 1)),
        documents=documents.astype(np.int32),
        starts=starts.astype(np.int32),
        stops=stops.astype(np.int32),
        **counts,
    )

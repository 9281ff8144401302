"""Which tokens of which document go into which row: plans made from lengths alone, before a token is read.

A plan is a pure function of its arguments: lengths int64 (documents,), the tokens of each; their order; targets, which
count what is trained of a piece. A row is a list of pieces, a piece the tokens [start, stop) of a document.

`plan_concat` is for pretraining, `plan_best_fit` for conversations, `plan_pairs` for preferences, `plan_whole` for
labelled texts and conversations with pictures, `plan_pad` is MiniMind's one document a row.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from minimind_jax.seeds import named_seed

HEADER_TOKENS = 12  # of what a template writes before a message's text, at most

# Of documents, starts and stops (pieces,) the trained targets of each piece.
CountTargets = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
Places = Callable[[int], np.ndarray]  # of a document's number, places in it


def some_everywhere(documents: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """The `CountTargets` of documents in which everything is trained."""
    return np.ones(len(documents), np.int64)


def nowhere(document: int) -> np.ndarray:
    """The `Places` of what is in no document."""
    return np.zeros(0, np.int64)


class Order(NamedTuple):
    """In which order documents are taken: one that is drawn for an epoch, or without `shuffle` their own."""

    seed: int
    epoch: int
    shuffle: bool = True

    def of(self, count: int) -> np.ndarray:
        """Numbers of so many documents."""
        rng = np.random.default_rng(named_seed(self.seed, "documents", self.epoch))
        return rng.permutation(count) if self.shuffle else np.arange(count)


@dataclasses.dataclass(frozen=True)
class PackingPlan:
    """Rows of at most `seq_len` tokens, each a run of pieces."""

    seq_len: int
    row_starts: np.ndarray  # (rows + 1,) row r holds the pieces row_starts[r] to row_starts[r + 1]
    # documents, starts, stops: (pieces,) tokens [start, stop) of that document
    documents: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    all_tokens: int  # of the documents planned
    cut_documents: int = 0  # documents that are in more than one piece, or lost their tail
    cut_turns: int = 0  # turns longer than a row, which had to be cut inside (`plan_best_fit`)
    # pairs without room for their answers and the header before them (`plan_pairs`), conversations with more pictures
    # than a row may have (`plan_whole`)
    left_out: int = 0
    untrained: int = 0  # rows, pieces or documents that are left out because nothing in them is trained

    @property
    def rows(self) -> int:
        return len(self.row_starts) - 1

    @property
    def tokens(self) -> int:
        """Tokens that are in a row."""
        return int((self.stops - self.starts).sum(dtype=np.int64))

    @property
    def dropped_tokens(self) -> int:
        """Tokens that are in none."""
        return self.all_tokens - self.tokens

    @property
    def efficiency(self) -> float:
        """Share of the rows' places that hold a token."""
        return self.tokens / (self.rows * self.seq_len) if self.rows else 1.0


def plan_concat(
    lengths: np.ndarray, seq_len: int, order: Order, targets: CountTargets = some_everywhere
) -> PackingPlan:
    """Documents in their order, joined end to end and cut where a row ends; nothing is dropped but
    rows in which nothing is trained. Every row but the last is full."""
    documents = order.of(len(lengths))
    ends = np.cumsum(lengths[documents])
    total = int(ends[-1]) if len(ends) else 0
    bounds = np.sort(np.concatenate([np.arange(0, total, seq_len), ends]), kind="stable")  # stable merges sorted runs
    bounds = bounds[np.diff(bounds, prepend=-1) > 0]
    begins, stops = bounds[:-1], bounds[1:]
    place = np.searchsorted(ends, begins, side="right")
    origin = (ends - lengths[documents])[place]
    rows, documents, starts = begins // seq_len, documents[place], begins - origin
    cut = int((np.bincount(place, minlength=1) > 1).sum())
    stops = stops - origin
    is_trained = np.bincount(rows, targets(documents, starts, stops)) > 0
    kept = is_trained[rows]
    rows = (np.cumsum(is_trained) - 1)[rows[kept]]
    untrained = int((~is_trained).sum())
    pieces = documents[kept], starts[kept], stops[kept]
    return _plan(lengths, seq_len, rows, *pieces, cut_documents=cut, untrained=untrained)


def plan_best_fit(
    lengths: np.ndarray,
    turn_starts: Places,
    seq_len: int,
    order: Order,
    message_starts: Places = nowhere,
    targets: CountTargets = some_everywhere,
) -> PackingPlan:
    """Whole documents, the longest first, each into the fullest row that still has room for it.

    Documents longer than a row are cut, at the start of a turn if one lies within the row's length, inside the turn
    (counted in `cut_turns`) if not; pieces in which nothing is trained are left out. Documents of one
    length are interchangeable: their order is drawn for the epoch, so rows are composed anew in each. Without
    `shuffle` the documents keep their order, and a row ends where the next one has no room.

    turn_starts: the places where a document may be cut. message_starts: see `split_at_turns`.
    """
    fitting, too_long = np.flatnonzero(lengths <= seq_len), np.flatnonzero(lengths > seq_len)
    cuts = [split_at_turns(lengths[doc], turn_starts(doc), seq_len, message_starts(doc)) for doc in too_long]
    documents = np.repeat(too_long, np.array([len(bounds) - 1 for bounds, _ in cuts], np.int64))
    starts = np.concatenate([bounds[:-1] for bounds, _ in cuts] or [[]]).astype(np.int64)
    stops = np.concatenate([bounds[1:] for bounds, _ in cuts] or [[]]).astype(np.int64)
    kept = targets(documents, starts, stops) > 0
    documents = np.concatenate([fitting, documents[kept]])
    starts = np.concatenate([np.zeros_like(fitting), starts[kept]])
    stops = np.concatenate([lengths[fitting], stops[kept]])
    if not order.shuffle:
        own = np.argsort(documents, kind="stable")
        documents, starts, stops = documents[own], starts[own], stops[own]

    counts = {"cut_documents": len(cuts), "cut_turns": sum(turns for _, turns in cuts)}
    counts["untrained"] = int((~kept).sum())
    return _plan_groups(lengths, documents, starts[:, None], stops[:, None], seq_len, order, **counts)


def plan_pad(lengths: np.ndarray, seq_len: int, targets: CountTargets = some_everywhere) -> PackingPlan:
    """One document a row, in order, cut at `seq_len` as MiniMind does; left out where nothing is trained in the row."""
    documents, stops = np.arange(len(lengths)), np.minimum(lengths, seq_len)
    starts = np.zeros_like(stops)
    reach = np.where(lengths > seq_len, stops - 1, stops)  # one that is cut off has no target behind the row
    kept = targets(documents, starts, reach) > 0
    counts = {"cut_documents": int((lengths > seq_len).sum()), "untrained": int((~kept).sum())}
    return _plan(lengths, seq_len, np.arange(kept.sum()), documents[kept], starts[kept], stops[kept], **counts)


def plan_pairs(
    lengths: np.ndarray, bounds: Places, seq_len: int, order: Order, message_starts: Places = nowhere
) -> PackingPlan:
    """Pairs of answers, both sides of one in the same row as two pieces, the chosen one first; packed by best fit.

    Where a pair is longer than a row, the beginning of the prompt is cut away on both sides alike, so that the answers
    survive, and never inside a message's header. A pair whose answers leave no room for the prompt's last header is
    left out.

    lengths: of both sides together. bounds: of a document's number, (0, tokens of the shared prompt, tokens of the
    chosen side). message_starts: as in `split_at_turns`.
    """
    cut = -(-np.maximum(lengths - seq_len, 0) // 2)
    for document in np.flatnonzero(cut):
        cut[document] = _behind_header(cut[document], message_starts(document))
    turns = np.array([bounds(document) for document in range(len(lengths))], np.int64).reshape(-1, 3)
    kept = np.flatnonzero(cut < np.maximum(turns[:, 1], 1))
    middle = turns[kept, 2]
    starts = np.stack([cut[kept], middle + cut[kept]], axis=1)
    stops = np.stack([middle, lengths[kept]], axis=1)
    counts = {"cut_documents": int((cut[kept] > 0).sum()), "left_out": len(lengths) - len(kept)}
    return _plan_groups(lengths, kept, starts, stops, seq_len, order, **counts)


def plan_whole(
    lengths: np.ndarray,
    seq_len: int,
    order: Order,
    targets: CountTargets = some_everywhere,
    images: np.ndarray | None = None,
    images_per_row: int = 0,
) -> PackingPlan:
    """Documents as one piece each, packed by best fit into rows that hold so many tokens and so many images.

    A document longer than a row loses its end, and what stood there is in no other row: it would be told there of
    images that it does not see. Left out are documents with more images than a row may have, and those in which nothing
    is trained. images: (documents,) of each; None for none.
    """
    images = np.zeros_like(lengths) if images is None else images
    documents, stops = np.arange(len(lengths)), np.minimum(lengths, seq_len)
    fits, is_trained = images <= images_per_row, targets(documents, np.zeros_like(stops), stops) > 0
    kept = np.flatnonzero(fits & is_trained)
    counts = {"cut_documents": int((lengths[kept] > seq_len).sum()), "left_out": int((~fits).sum())}
    counts["untrained"] = int((fits & ~is_trained).sum())
    pieces = kept, np.zeros((len(kept), 1), np.int64), stops[kept, None]
    return _plan_groups(lengths, *pieces, seq_len, order, (images[kept], images_per_row), **counts)


def _plan_groups(lengths, documents, starts, stops, seq_len: int, order: Order, also=None, **counts) -> PackingPlan:
    """Best fit of groups that stay together: documents (groups,), the pieces' starts and stops (groups, pieces).

    Without `shuffle` the groups keep their order. also: what else each group has, (groups,), and how much of it a row
    may hold.
    """
    sizes = (stops - starts).sum(axis=1)
    groups = order.of(len(documents))
    if order.shuffle:
        groups = groups[np.argsort(-sizes[groups], kind="stable")]
        rows = _best_fit_decreasing(sizes[groups], seq_len)
        if also and np.bincount(rows, also[0][groups], 1).max() > also[1]:
            rows = _best_fit_of_two(sizes[groups], seq_len, also[0][groups], also[1])
    else:
        rows = _in_order(sizes, seq_len, *(also or (np.zeros_like(sizes), 0)))
    by_row = np.argsort(rows, kind="stable")
    groups, pieces = groups[by_row], starts.shape[1]
    rows, documents = rows[by_row].repeat(pieces), documents[groups].repeat(pieces)
    return _plan(lengths, seq_len, rows, documents, starts[groups].ravel(), stops[groups].ravel(), **counts)


def split_at_turns(
    length: int, turn_starts: np.ndarray, seq_len: int, message_starts: Sequence[int] = ()
) -> tuple[np.ndarray, int]:
    """Bounds of the pieces of one long document, each at most `seq_len` long and as long as the turns allow.

    message_starts: where messages begin with their headers. A turn that must be cut inside is cut in front of a
    header, not within it.
    Returns the bounds, from 0 to length, and how often a turn had to be cut inside.
    """
    allowed = np.append(np.asarray(turn_starts, np.int64), length)
    bounds, cut_turns = [0], 0
    while bounds[-1] < length:
        limit = bounds[-1] + seq_len
        best = int(allowed[np.searchsorted(allowed, limit, side="right") - 1]) if allowed[0] <= limit else 0
        if best <= bounds[-1]:
            header = _header_around(limit, message_starts)
            best, cut_turns = header if header > bounds[-1] else limit, cut_turns + 1
        bounds.append(best)
    return np.array(bounds, np.int64), cut_turns


def _header_around(place: int, message_starts: Sequence[int]) -> int:
    """Where the header begins that `place` lies within, or may; -1 if it lies in none."""
    before = int(np.searchsorted(message_starts, place, side="left")) - 1
    start = int(message_starts[before]) if before >= 0 else -HEADER_TOKENS
    return start if place - start < HEADER_TOKENS else -1


def _behind_header(place: int, message_starts: np.ndarray) -> int:
    """`place`, or the next place behind the header that it lies within."""
    while (header := _header_around(place, message_starts)) >= 0:
        following = message_starts[message_starts > header]
        place = header + HEADER_TOKENS
        if len(following) and following[0] <= place:  # a short message: the next one begins here
            return int(following[0])
    return place


def _in_order(sizes: np.ndarray, seq_len: int, others: np.ndarray, most: int) -> np.ndarray:
    """Row of each piece where pieces keep their order: a row ends where the next piece has no room, or has more of
    what else a row may hold `most`."""
    rows, row, room, left = np.zeros(len(sizes), np.int64), -1, -1, 0
    for place, (size, other) in enumerate(zip(sizes.tolist(), others.tolist(), strict=True)):
        if size > room or other > left:
            row, room, left = row + 1, seq_len, most
        rows[place], room, left = row, room - size, left - other
    return rows


def _best_fit_of_two(sizes: np.ndarray, seq_len: int, others: np.ndarray, most: int) -> np.ndarray:
    """Row of each piece, by best fit of its size among the rows that also have room for its others, of which a row
    holds `most`; sizes descend. Which rooms there are is a set of bits for each number of others that are left."""
    rows, row_count = np.empty(len(sizes), np.int64), 0
    bits = [0] * (most + 1)
    row_ids: dict[tuple[int, int], list[int]] = {}
    for place, (size, other) in enumerate(zip(sizes.tolist(), others.tolist(), strict=True)):
        fits = ((bits[left] >> size, left) for left in range(other, most + 1))
        found = [(size + (rooms & -rooms).bit_length() - 1, left) for rooms, left in fits if rooms]
        room, left = min(found, default=(seq_len, most))
        if found:
            row = row_ids[room, left].pop()
            if not row_ids[room, left]:
                bits[left] ^= 1 << room
        else:
            row, row_count = row_count, row_count + 1
        rows[place] = row
        row_ids.setdefault((room - size, left - other), []).append(row)
        bits[left - other] |= 1 << (room - size)
    return rows


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


def _plan(lengths, seq_len: int, rows: np.ndarray, documents, starts, stops, **counts) -> PackingPlan:
    """A plan of documents of these lengths from pieces that are sorted by row."""
    row_count = int(rows[-1]) + 1 if len(rows) else 0
    return PackingPlan(
        seq_len=seq_len,
        row_starts=np.searchsorted(rows, np.arange(row_count + 1)),
        documents=documents.astype(np.int32),
        starts=starts.astype(np.int32),
        stops=stops.astype(np.int32),
        all_tokens=int(lengths.sum()),
        **counts,
    )

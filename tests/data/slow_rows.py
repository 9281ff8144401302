"""Rows one by one and piece by piece, as they were built before: what the rows of a step are compared with."""

import numpy as np


def pieces_of(plan, row):
    """(document, start, stop) of each piece of a row of a plan, in order."""
    where = slice(plan.row_starts[row], plan.row_starts[row + 1])
    return list(
        zip(plan.documents[where].tolist(), plan.starts[where].tolist(), plan.stops[where].tolist(), strict=True)
    )


def pack_row(cache, pieces, seq_len, token_bytes):
    """One row from its pieces (document, start, stop): arrays (T,)."""
    row = {name: np.zeros(seq_len, np.int32) for name in ("targets", "positions", "segment_ids", "target_bytes")}
    row["tokens"] = np.full(seq_len, cache.info["pad_id"], np.int32)
    row["loss_weights"] = np.zeros(seq_len, np.float32)
    place = 0
    for segment, (document, start, stop) in enumerate(pieces, start=1):
        ids = cache.ids(document, start, stop + 1)
        trained = cache.is_trained(document, start, stop + 1)[1:]
        here = slice(place, place + stop - start)
        with_target = slice(place, place + len(trained))
        row["tokens"][here] = ids[: stop - start]
        row["targets"][with_target] = ids[1:]
        row["loss_weights"][with_target] = trained
        row["target_bytes"][with_target] = np.where(trained, token_bytes[ids[1:]], 0)
        row["positions"][here] = np.arange(stop - start)
        row["segment_ids"][here] = segment
        place += stop - start
    return row


def pad_row(cache, document, seq_len, token_bytes):
    """MiniMind's row: the first `seq_len` tokens of one document; text keeps its end token when it is cut."""
    row = pack_row(cache, [(document, 0, min(int(cache.lengths[document]), seq_len))], seq_len, token_bytes)
    if cache.lengths[document] > seq_len:
        for name in ("targets", "loss_weights", "target_bytes"):
            row[name][-1] = 0
        if cache.kind == "text":
            row["tokens"][-1] = row["targets"][-2] = cache.info["eos_id"]
            row["target_bytes"][-2] = token_bytes[cache.info["eos_id"]]
    return row


def rows_of(epoch, places, token_bytes):
    """`Epoch.rows`, each of them by itself."""
    rows = []
    for place in places:
        pieces = pieces_of(epoch.plan, epoch.row_at(place)) if place < epoch.plan.rows else []
        pieces = [(int(epoch.documents[document]), start, stop) for document, start, stop in pieces]
        if epoch.packing == "pad" and pieces:
            rows.append(pad_row(epoch.cache, pieces[0][0], epoch.plan.seq_len, token_bytes))
        else:
            rows.append(pack_row(epoch.cache, pieces, epoch.plan.seq_len, token_bytes))
        if epoch.packing == "pad":
            rows[-1]["lengths"] = np.int32(np.sum(rows[-1]["segment_ids"] > 0))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

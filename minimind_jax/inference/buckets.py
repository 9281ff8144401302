"""Lengths rounded up to a few, each being a program that must be compiled; and batches of rows of such lengths."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def bucket(count: int, smallest: int, multiple: int) -> int:
    """The next power of two from `smallest` on; above `multiple`, its next multiple."""
    return round_up(count, multiple) if count > multiple else max(smallest, 1 << (count - 1).bit_length())


def by_length(
    prompts: Sequence[Sequence[int]], rows_of: Callable[[int, int], int], multiple: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batches of prompts whose lengths are neighbours, so that little is padding, from the longest on: (indices of its
    prompts, tokens_BT, lengths_B) of each.

    rows_of: B for a width and the prompts left; a row without a prompt has length 1. multiple: of widths, see `bucket`.
    """
    order = np.argsort([len(ids) for ids in prompts], kind="stable")
    while len(order):
        width = bucket(len(prompts[order[-1]]), smallest=16, multiple=multiple)
        rows = rows_of(width, len(order))
        order, chosen = order[:-rows], order[-rows:]
        tokens_BT, lengths_B = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
        for row, i in enumerate(chosen):
            tokens_BT[row, : len(prompts[i])], lengths_B[row] = prompts[i], len(prompts[i])
        yield chosen, tokens_BT, lengths_B

"""Rows sorted by expert, in tiles that are one expert's each."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Tiles(NamedTuple):
    """Pieces of `size` sorted rows, each of one expert, in order; the last of an expert may reach beyond its rows.
    experts_N, firsts_N, stops_N: the expert, its first row in the tile, and where its rows end. Tiles not needed begin
    behind all rows. needed: tiles up to the last that is. places_P: where each row is in all tiles."""

    size: int
    needed: Array
    experts_N: Array
    firsts_N: Array
    stops_N: Array
    places_P: Array

    @property
    def rows_NS(self) -> Array:
        return self.firsts_N[:, None] + jnp.arange(self.size)

    def count(self, is_part: bool) -> int | Array:
        return self.needed if is_part else len(self.experts_N)

    def cut(self, x_PD: Array) -> Array:
        """(N, S, D), 0 where a row is not the tile's."""
        is_own_NS = self.rows_NS < self.stops_N[:, None]
        return jnp.where(is_own_NS[..., None], x_PD[jnp.minimum(self.rows_NS, len(x_PD) - 1)], 0)

    def join(self, x_NSD: Array) -> Array:
        return x_NSD.reshape(-1, x_NSD.shape[-1])[self.places_P]


def make_tiles(sizes_E: Array, rows: int, size: int) -> Tiles:
    """Tiles of `size` of the rows, sizes_E of them for each expert; others behind these are in no tile."""
    E = sizes_E.shape[0]
    needed_E = -(-sizes_E // size)
    ends_E, starts_E = jnp.cumsum(needed_E), jnp.cumsum(sizes_E) - sizes_E
    tiles_N = jnp.arange(rows // size + E)
    experts_N = jnp.minimum(jnp.searchsorted(ends_E, tiles_N, side="right", method="compare_all"), E - 1)
    firsts_N = starts_E[experts_N] + (tiles_N - (ends_E - needed_E)[experts_N]) * size
    firsts_N = jnp.where(tiles_N < ends_E[-1], firsts_N, rows)
    rows_P = jnp.arange(rows)
    expert_P = jnp.minimum(jnp.sum(rows_P[:, None] >= (starts_E + sizes_E), axis=1), E - 1)
    places_P = rows_P + ((ends_E - needed_E) * size - starts_E)[expert_P]
    return Tiles(size, ends_E[-1], experts_N, firsts_N, (starts_E + sizes_E)[experts_N], places_P)

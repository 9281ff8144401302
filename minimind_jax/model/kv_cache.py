"""Keys and values of the tokens so far, in arrays of a fixed size: the token at position p of a row is in slot p."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from minimind_jax.model.config import ModelConfig, Platform

CPU_BLOCK = 64  # slots that a single query reads at once on a CPU


class LayerCache(NamedTuple):
    """Rotated keys and values of one layer, in the compute dtype.

    The S slots lie in C blocks of s: on a CPU of 64, for there a query reads block after block, and XLA copies each out
    of the array before a product, which is faster from one piece of memory; elsewhere C is 1. Keys have their slots
    last, as their product with a query reads them.
    """

    k_CBKHs: Array
    v_CBKsH: Array

    def write(self, k_BTKH: Array, v_BTKH: Array, positions_BT: Array, rows_B: Array | None = None) -> "LayerCache":
        """The cache with keys and values of tokens at these positions of these rows (0, 1 ... for None); those beyond
        the last slot or the last row are dropped."""
        rows_B1 = (jnp.arange(len(positions_BT)) if rows_B is None else rows_B)[:, None]
        block_BT, slot_BT = jnp.divmod(positions_BT, self.v_CBKsH.shape[3])
        return LayerCache(
            self.k_CBKHs.at[block_BT, rows_B1, :, :, slot_BT].set(k_BTKH.astype(self.k_CBKHs.dtype), mode="drop"),
            self.v_CBKsH.at[block_BT, rows_B1, :, slot_BT].set(v_BTKH.astype(self.v_CBKsH.dtype), mode="drop"),
        )

    def of_rows(self, rows_B: Array | None) -> Callable[[Array], Array]:
        """Takes these rows out of a block, or all of it: for None, and for as many as there are, in their order."""
        if rows_B is None or len(rows_B) == self.k_CBKHs.shape[1]:
            return lambda block: block
        return lambda block: block.at[rows_B].get(mode="clip")

    def join(self) -> tuple[Array, Array]:
        """Keys (B, K, H, S) and values (B, K, S, H)."""
        return _join_blocks(self.k_CBKHs, 3), _join_blocks(self.v_CBKsH, 2)


def _join_blocks(blocks: Array, axis: int) -> Array:
    x = jnp.moveaxis(blocks, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


class KVCache(NamedTuple):
    """The layers' caches. Each layer has arrays of its own: one of all layers would be copied where a layer is read."""

    layers: tuple[LayerCache, ...]

    @classmethod
    def create(cls, config: ModelConfig, rows: int, slots: int, dtype: jnp.dtype, platform: Platform) -> "KVCache":
        """An empty cache for rows of `slots` tokens; on a CPU of as many more as fill the last block."""
        K, H, size = config.num_key_value_heads, config.head_dim, CPU_BLOCK if platform == "cpu" else slots
        shapes = [(-(-slots // size), rows, K, *block) for block in ((H, size), (size, H))]
        layers = tuple(
            LayerCache(*(jnp.zeros(shape, dtype) for shape in shapes)) for _ in range(config.num_hidden_layers)
        )
        return cls(layers)

    def copy_row(self, source: Array, target: Array, count: Array) -> "KVCache":
        """The cache with (at least) the first `count` tokens of row `source` in row `target`, too."""

        def copy(blocks, size):
            def copy_block(index, blocks):
                shape = (1, 1, *blocks.shape[2:])
                block = jax.lax.dynamic_slice(blocks, (index, source, 0, 0, 0), shape)
                return jax.lax.dynamic_update_slice(blocks, block, (index, target, 0, 0, 0))

            return jax.lax.fori_loop(0, (count + size - 1) // size, copy_block, blocks)

        size = self.layers[0].v_CBKsH.shape[3]
        return jax.tree.map(lambda blocks: copy(blocks, size), self)

    def into(self, larger: "KVCache") -> "KVCache":
        """The larger cache with these tokens in it."""
        return jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice(new, old, (0,) * 5), self, larger)

"""Keys and values of the tokens so far, in arrays of a fixed size."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from minimind_jax.model.config import ModelConfig

CPU_BLOCK = 64  # slots that a single query reads at once on a CPU


class LayerCache(NamedTuple):
    """Rotated keys and values of one layer, in the compute dtype.

    The S slots lie in C blocks of s: on a CPU of 64, for there a query reads block after block, and XLA copies each out
    of the array before a product, which is faster from one piece of memory; elsewhere C is 1. Keys have their slots
    last, as their product with a query reads them.
    """

    k_CBKHs: Array
    v_CBKsH: Array

    def write(self, k_BTKH: Array, v_BTKH: Array, index) -> "LayerCache":
        """The cache with the keys and values of T tokens in slots index..index+T of every row."""
        k_BKHT, v_BKTH = k_BTKH.transpose(0, 2, 3, 1), v_BTKH.transpose(0, 2, 1, 3)
        return LayerCache(_write(self.k_CBKHs, k_BKHT, index, 3), _write(self.v_CBKsH, v_BKTH, index, 2))

    def grow(self, more: int) -> "LayerCache":
        """The cache with `more` empty slots behind its own."""

        def grow(blocks, axis):
            widths = [(0, more if i == axis else 0) for i in range(4)]
            return _split_blocks(jnp.pad(_join_blocks(blocks, axis), widths), axis)

        return LayerCache(grow(self.k_CBKHs, 3), grow(self.v_CBKsH, 2))

    def join(self) -> tuple[Array, Array]:
        """Keys (B, K, H, S) and values (B, K, S, H)."""
        return _join_blocks(self.k_CBKHs, 3), _join_blocks(self.v_CBKsH, 2)


def _write(blocks: Array, x: Array, index, axis: int) -> Array:
    """The blocks with x in slots from `index` on; axis: that of the slots in x."""
    x = x.astype(blocks.dtype)
    if x.shape[axis] > 1:
        return _split_blocks(jax.lax.dynamic_update_slice_in_dim(_join_blocks(blocks, axis), x, index, axis), axis)
    start = [0] * blocks.ndim
    start[0], start[axis + 1] = jnp.divmod(index, blocks.shape[axis + 1])
    return jax.lax.dynamic_update_slice(blocks, x[None], start)


def _split_blocks(x: Array, axis: int) -> Array:
    """The axis of S slots becomes two, of which the one of blocks goes first."""
    size = _block_slots(x.shape[axis])
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)


def _join_blocks(blocks: Array, axis: int) -> Array:
    x = jnp.moveaxis(blocks, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _block_slots(slots: int) -> int:
    """Slots of a block of a cache of that many."""
    return math.gcd(slots, CPU_BLOCK) if jax.default_backend() == "cpu" else slots


class KVCache(NamedTuple):
    """The layers' caches, and which token each slot holds. Each layer has arrays of its own: one of all layers would
    be copied where a layer is read.

    positions_BS: int32 position of the token in each slot; -1 for an empty slot or padding, which no query sees.
    """

    layers: tuple[LayerCache, ...]
    positions_BS: Array

    @classmethod
    def create(cls, config: ModelConfig, batch: int, slots: int, dtype=jnp.float32) -> "KVCache":
        """An empty cache for `batch` rows of at most `slots` tokens, padding included."""
        K, H, size = config.num_key_value_heads, config.head_dim, _block_slots(slots)
        shapes = [(slots // size, batch, K, *block) for block in ((H, size), (size, H))]
        layers = tuple(
            LayerCache(*(jnp.zeros(shape, dtype) for shape in shapes)) for _ in range(config.num_hidden_layers)
        )
        return cls(layers, jnp.full((batch, slots), -1, jnp.int32))

    def write_positions(self, positions_BT: Array, index) -> "KVCache":
        """The cache with T tokens announced in slots index..index+T of every row."""
        positions_BT = positions_BT.astype(jnp.int32)
        return self._replace(positions_BS=jax.lax.dynamic_update_slice(self.positions_BS, positions_BT, (0, index)))

    def grow(self, slots: int) -> "KVCache":
        """The cache with that many slots in all, the new ones empty."""
        more = slots - self.positions_BS.shape[1]
        layers = tuple(layer.grow(more) for layer in self.layers)
        return KVCache(layers, jnp.pad(self.positions_BS, ((0, 0), (0, more)), constant_values=-1))

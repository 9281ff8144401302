"""Keys and values of the tokens so far, in arrays of a fixed size."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from minimind_jax.model.config import ModelConfig


class LayerCache(NamedTuple):
    """Rotated keys and values of one layer, in the compute dtype. The slots of a head lie next to each other, so that a
    query reads each head's keys in one run."""

    k_BKSH: Array
    v_BKSH: Array

    def write(self, k_BTKH: Array, v_BTKH: Array, index) -> "LayerCache":
        """The cache with the keys and values of T tokens in slots index..index+T of every row."""

        def put(all_BKSH, new_BTKH):
            new_BKTH = new_BTKH.transpose(0, 2, 1, 3).astype(all_BKSH.dtype)
            return jax.lax.dynamic_update_slice(all_BKSH, new_BKTH, (0, 0, index, 0))

        return LayerCache(put(self.k_BKSH, k_BTKH), put(self.v_BKSH, v_BTKH))


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
        shape = (batch, config.num_key_value_heads, slots, config.head_dim)
        layers = (LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_hidden_layers))
        return cls(tuple(layers), jnp.full((batch, slots), -1, jnp.int32))

    def write_positions(self, positions_BT: Array, index) -> "KVCache":
        """The cache with T tokens announced in slots index..index+T of every row."""
        positions_BT = positions_BT.astype(jnp.int32)
        return self._replace(positions_BS=jax.lax.dynamic_update_slice(self.positions_BS, positions_BT, (0, index)))

    def grow(self, slots: int) -> "KVCache":
        """The cache with that many slots in all, the new ones empty."""
        more = slots - self.positions_BS.shape[1]
        layers = jax.tree.map(lambda x_BKSH: jnp.pad(x_BKSH, ((0, 0), (0, 0), (0, more), (0, 0))), self.layers)
        return KVCache(layers, jnp.pad(self.positions_BS, ((0, 0), (0, more)), constant_values=-1))

"""Keys and values of the tokens so far, in arrays of a fixed size."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from minimind_jax.model.config import ModelConfig


class KVCache(NamedTuple):
    """Rotated keys and values of all layers, and which token each slot holds.

    k_LBSKH, v_LBSKH: in the compute dtype.
    positions_BS: int32 position of the token in each slot; -1 for an empty slot or padding, which no query sees.
    """

    k_LBSKH: Array
    v_LBSKH: Array
    positions_BS: Array

    @classmethod
    def create(cls, config: ModelConfig, batch: int, slots: int, dtype=jnp.float32) -> "KVCache":
        """An empty cache for `batch` rows of at most `slots` tokens, padding included."""
        shape = (config.num_hidden_layers, batch, slots, config.num_key_value_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.full((batch, slots), -1, jnp.int32))

    def write_positions(self, positions_BT: Array, index) -> "KVCache":
        """The cache with T tokens announced in slots index..index+T of every row."""
        positions_BT = positions_BT.astype(jnp.int32)
        return self._replace(positions_BS=jax.lax.dynamic_update_slice(self.positions_BS, positions_BT, (0, index)))

    def write_layer(self, layer, k_BTKH: Array, v_BTKH: Array, index) -> "KVCache":
        """The cache with one layer's new keys and values in slots index..index+T of every row."""

        def write(all_LBSKH, new_BTKH):
            new_LBTKH = new_BTKH[None].astype(all_LBSKH.dtype)
            return jax.lax.dynamic_update_slice(all_LBSKH, new_LBTKH, (layer, 0, index, 0, 0))

        return self._replace(k_LBSKH=write(self.k_LBSKH, k_BTKH), v_LBSKH=write(self.v_LBSKH, v_BTKH))

    def read_layer(self, layer) -> tuple[Array, Array]:
        """Keys and values of one layer, each (B, S, K, H)."""
        return (
            jax.lax.dynamic_index_in_dim(self.k_LBSKH, layer, keepdims=False),
            jax.lax.dynamic_index_in_dim(self.v_LBSKH, layer, keepdims=False),
        )

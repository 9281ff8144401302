"""Documents of packed rows as wholes: sums over their tokens, and what stands at their ends."""

import jax
import jax.numpy as jnp
from jax import Array


def pair_room(seq_len: int) -> int:
    """Places for the documents of a row of pairs: an even number, each document of two tokens at least."""
    return max(2, seq_len // 4 * 2)


def sum_by_segment(values_BT: Array, segment_ids_BT: Array, room: int) -> Array:
    """Sum over the tokens of each document, float32 (B, room): column s is segment s + 1. Padding is segment 0."""
    sums_BS = jax.vmap(lambda values, ids: jax.ops.segment_sum(values, ids, num_segments=room + 1))(
        values_BT.astype(jnp.float32), segment_ids_BT
    )
    return sums_BS[:, 1:]


def last_hidden(hidden_BTD: Array, segment_ids_BT: Array, room: int) -> tuple[Array, Array]:
    """The hidden state at the last token of each document, (B, room, D), and which places hold one, (B, room)."""
    following_BT = jnp.pad(segment_ids_BT[:, 1:], ((0, 0), (0, 1)))
    is_last_BT = (segment_ids_BT > 0) & (segment_ids_BT != following_BT)
    place_BT = jnp.broadcast_to(jnp.arange(segment_ids_BT.shape[1]), segment_ids_BT.shape)
    places_BS = sum_by_segment(jnp.where(is_last_BT, place_BT, 0), segment_ids_BT, room).astype(jnp.int32)
    held_BS = sum_by_segment(is_last_BT, segment_ids_BT, room) > 0
    return jnp.take_along_axis(hidden_BTD, places_BS[:, :, None], axis=1), held_BS

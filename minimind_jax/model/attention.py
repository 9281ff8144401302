"""Causal attention within documents, grouped-query, softmax in float32: one function, two paths.

`reference` is the plain formula over a full boolean mask. `grouped` is the fast one: the G query heads that share a
key/value head become rows of one matrix product per (batch, key/value head), and a block of queries is multiplied
only with the keys that the causal mask lets it see.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

Path = Literal["auto", "reference", "grouped"]
QUERY_BLOCK = 128


def choose_path(path: Path, is_cached: bool) -> Path:
    """The path that `auto` stands for: `grouped` for whole rows; with a cache, whose mask is not a triangle, the
    plain formula."""
    if path == "auto":
        return "reference" if is_cached else "grouped"
    return path


def attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    *,
    segment_ids_BT: Array | None = None,
    query_positions_BT: Array | None = None,
    key_positions_BS: Array | None = None,
    path: Path = "auto",
) -> Array:
    """softmax(q k^T / sqrt(H)) v over the keys a query may see, (B, T, N, H); 0 for a query that sees none.

    Without key positions (S = T): query t sees keys s <= t of its own segment, and nothing in segment 0 (padding);
    all of a row is one segment when segment_ids_BT is None.
    With key positions (a cache): a query at position p sees the keys at positions 0..p; -1 marks an empty slot.
    Query head n uses key/value head n // G, G = N / K.
    """
    is_cached = key_positions_BS is not None
    if choose_path(path, is_cached) == "grouped" and not is_cached:
        return _grouped(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)
    if is_cached:
        mask_BTS = (key_positions_BS[:, None, :] >= 0) & (
            key_positions_BS[:, None, :] <= query_positions_BT[:, :, None]
        )
    else:
        mask_BTS = causal_mask(q_BTNH.shape[1], segment_ids_BT)
    return _reference(q_BTNH, k_BSKH, v_BSKH, mask_BTS)


def causal_mask(length: int, segment_ids_BT: Array | None) -> Array:
    """Which keys each query sees, boolean (B or 1, T, T)."""
    causal_TS = jnp.tril(jnp.ones((length, length), bool))
    if segment_ids_BT is None:
        return causal_TS[None]
    same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return causal_TS & same_BTS & (segment_ids_BT > 0)[:, :, None]


def masked_softmax(scores: Array, mask: Array) -> Array:
    """Softmax over the last axis in float32 where the mask is true, 0 elsewhere and in rows that are all false."""
    scores = jnp.where(mask, scores.astype(jnp.float32), -jnp.inf)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


def _reference(q_BTNH, k_BSKH, v_BSKH, mask_BTS):
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    weights_BKGTS = masked_softmax(scores_BKGTS / math.sqrt(H), mask_BTS[:, None, None])
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    return out_BTKGH.reshape(B, T, N, H)


def _grouped(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BKGTH = (q_BTNH * (1 / math.sqrt(H))).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKTH, v_BKTH = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
    mask_BTS = causal_mask(T, segment_ids_BT)
    blocks = []
    for start in range(0, T, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, T)
        scores = jnp.einsum(
            "BKGTH,BKSH->BKGTS", q_BKGTH[:, :, :, start:stop], k_BKTH[:, :, :stop], preferred_element_type=jnp.float32
        )
        weights = masked_softmax(scores, mask_BTS[:, None, None, start:stop, :stop]).astype(v_BTKH.dtype)
        blocks.append(jnp.einsum("BKGTS,BKSH->BKGTH", weights, v_BKTH[:, :, :stop]))
    out_BKGTH = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=3)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)

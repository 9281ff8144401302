"""Rotary position embedding (arXiv 2104.09864), half-split as in Qwen3, with Hugging Face's context scalings."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from minimind_jax.model.config import ModelConfig, RopeScaling


def rope_tables(config: ModelConfig, positions_BT: Array, length_BT: Array | None = None) -> tuple[Array, Array]:
    """cos and sin of every token's rotation angles, float32, each (B, T, H/2).

    The angle of pair i at position p is p * f_i, with f_i = theta^(-2i/H) rescaled as `config.rope_scaling` says.
    length_BT: length of the document each token is in, as far as it is known; only `dynamic` scaling looks at it.
    YaRN's tables are multiplied by its attention factor.
    """
    scaling = config.rope_scaling
    factor = 1.0
    if scaling is None:
        frequencies = _frequencies(config.rope_theta, config.head_dim)
    elif scaling.rope_type == "linear":
        frequencies = _frequencies(config.rope_theta, config.head_dim) / np.float32(scaling.factor)
    elif scaling.rope_type == "yarn":
        frequencies = _yarn_frequencies(scaling, config.rope_theta, config.head_dim)
        factor = scaling.attention_factor
    else:
        frequencies = _dynamic_frequencies(scaling, config.rope_theta, config.head_dim, length_BT)
    angles_BTh = positions_BT[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles_BTh) * factor, jnp.sin(angles_BTh) * factor


def apply_rope(x_BTNH: Array, cos_BTh: Array, sin_BTh: Array) -> Array:
    """Rotates each pair (x_i, x_{i+H/2}) by its angle; float32 inside, the dtype of x outside."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTh[:, :, None, :], sin_BTh[:, :, None, :]
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1).astype(x_BTNH.dtype)


def document_length(positions_BT: Array, segment_ids_BT: Array | None) -> Array:
    """Length of the document each token is in, (B, T): its largest position in these arrays, plus one."""
    if segment_ids_BT is None:
        return jnp.broadcast_to(jnp.max(positions_BT, axis=1, keepdims=True) + 1, positions_BT.shape)
    same_BTT = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return jnp.max(jnp.where(same_BTT, positions_BT[:, None, :], -1), axis=2) + 1


def _frequencies(theta: float, head_dim: int) -> np.ndarray:
    """theta^(-2i/H) in radians a token, (H/2,), each step rounded to float32 as PyTorch rounds it."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.float32(1) / np.power(float(theta), exponents.astype(np.float64)).astype(np.float32)


def _yarn_frequencies(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """YaRN's blend (arXiv 2309.00071, 3.2): f_i where a pair turns often in the trained context, f_i / factor where it
    turns less than once, a linear ramp over the pairs between."""

    def pair_that_turns(rotations: float) -> float:
        context = scaling.original_max_position_embeddings
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), head_dim - 1)
    width = max(high - low, 0.001)  # a step where both bounds fall on one pair
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / np.float32(width), 0, 1)
    return _frequencies(theta, head_dim) * (1 - ramp + ramp / np.float32(scaling.factor))


def _dynamic_frequencies(scaling: RopeScaling, theta: float, head_dim: int, length_BT: Array) -> Array:
    """NTK-aware scaling, (B, T, H/2): theta grows with the length n once it exceeds the trained context c,
    theta * (factor * n / c - (factor - 1))^(H / (H - 2)); at n <= c nothing changes.

    As in transformers, a key keeps the angle it got when it was written to a cache. Unlike there, n is a token's own
    document's length and not the longest of the batch, so that neither packing nor batching changes a result.
    """
    context = scaling.original_max_position_embeddings
    length = jnp.maximum(length_BT, context).astype(jnp.float32)
    growth = scaling.factor * length / context - (scaling.factor - 1)
    # (theta * g^(H/(H-2)))^(-2i/H) = theta^(-2i/H) * g^(-2i/(H-2)): exactly the trained frequencies where g is 1.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / max(head_dim - 2, 1)
    return _frequencies(theta, head_dim) * growth[..., None] ** -exponents

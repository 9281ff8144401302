"""A head of C scores in place of the language model's: of a reward model (C = 1) or a classifier.

It is one matrix without bias, as in transformers' Qwen3ForSequenceClassification, and lies beside the model's
parameters as `score`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Params = dict[str, Any]

SCORE = "score"


def init_head(key: Array, width: int, scores: int, std: float = 0.02) -> Params:
    """{"score": {"kernel": (D, C)}}, N(0, std)."""
    return {SCORE: {"kernel": std * jax.random.normal(key, (width, scores), jnp.float32)}}


def head_axes() -> Params:
    """Logical axes of `init_head`."""
    return {SCORE: {"kernel": ("embed", None)}}


def scores(params: Params, hidden: Array) -> Array:
    """hidden (..., D) times the head, float32 (..., C), in the full precision of float32 on every device."""
    kernel_DC = params[SCORE]["kernel"].astype(jnp.float32)
    return jnp.matmul(hidden.astype(jnp.float32), kernel_DC, precision=jax.lax.Precision.HIGHEST)

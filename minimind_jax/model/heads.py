"""A head of C scores in place of the language model's: of a reward model (C = 1) or a classifier.

It is one matrix without bias, as in transformers' Qwen3ForSequenceClassification, or of pictures with one, as in
SiglipForImageClassification, and lies beside the model's parameters as `score`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Params = dict[str, Any]

SCORE = "score"


def init_head(key: Array, width: int, scores: int, std: float = 0.02, *, bias: bool = False) -> Params:
    """{"score": {"kernel": (D, C)}}, N(0, std), and with `bias` its "bias" (C,), 0."""
    kernel_DC = std * jax.random.normal(key, (width, scores), jnp.float32)
    return {SCORE: {"kernel": kernel_DC, **({"bias": jnp.zeros(scores, jnp.float32)} if bias else {})}}


def head_axes(*, bias: bool = False) -> Params:
    """Logical axes of `init_head`."""
    return {SCORE: {"kernel": ("embed", None), **({"bias": (None,)} if bias else {})}}


def scores(params: Params, hidden: Array) -> Array:
    """hidden (..., D) times the head, float32 (..., C), in the full precision of float32 on every device."""
    head = params[SCORE]
    kernel_DC, bias_C = head["kernel"].astype(jnp.float32), head.get("bias", 0.0)
    return jnp.matmul(hidden.astype(jnp.float32), kernel_DC, precision=jax.lax.Precision.HIGHEST) + bias_C

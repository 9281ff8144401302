"""Losses: pure functions of arrays that return sums, so that nothing depends on how a batch was cut.

A loss function takes `(params, batch, key)`, one micro-batch and a dropout key (None for no dropout), and returns
`(numerator, denominator, metrics)`: float32 sums over the micro-batch, and for each metric its own pair of sums. The
step adds them over micro-batches and devices and divides once. A metric named min_... or max_... is the smallest or
largest value of the micro-batch (an infinity, if it has none) and 1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Batch = dict[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]
LossFn = Callable[[Any, Batch, jax.Array | None], tuple[jax.Array, jax.Array, Metrics]]


def together(metrics: Metrics) -> Metrics:
    """The metrics of several micro-batches, (n,) each, as those of all of them."""

    def join(name: str, values: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        if name.startswith(("min_", "max_")):
            return (jnp.min if name.startswith("min_") else jnp.max)(values, axis=0), jnp.ones(())
        return jnp.sum(values, axis=0), jnp.sum(counts, axis=0)

    return {name: join(name, *pair) for name, pair in metrics.items()}

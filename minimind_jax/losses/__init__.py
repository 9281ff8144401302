"""Losses: pure functions of arrays that return sums, so that nothing depends on how a batch was cut.

A loss function takes `(params, batch, key)`, one micro-batch and a dropout key (None for no dropout), and returns
`(numerator, denominator, metrics)`: float32 sums over the micro-batch, and for each metric its own pair of sums. The
step adds them over micro-batches and devices and divides once.
"""

from collections.abc import Callable
from typing import Any

import jax

Batch = dict[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]
LossFn = Callable[[Any, Batch, jax.Array | None], tuple[jax.Array, jax.Array, Metrics]]

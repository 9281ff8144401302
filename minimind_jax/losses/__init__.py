"""Losses: pure functions of arrays that return sums, so that nothing depends on how a batch was cut.

A loss function takes `(params, batch, key)`, one micro-batch and a dropout key (None for no dropout), and returns
`(numerator, denominator, metrics)`: float32 sums over the micro-batch, and numbers that say how they are put together
(see `Metric`). The step does so over micro-batches and devices, and divides once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

Batch = dict[str, jax.Array]

_REDUCTIONS = {"sum": jnp.sum, "min": jnp.min, "max": jnp.max}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metric:
    """A number of a micro-batch, and how it becomes that of several: Metric(total, count) is a mean over all of them,
    Metric(total) a sum, Metric(value, by="min") the smallest value.

    count: of what the total is a sum over, 0 where there was nothing. by: how totals are put together; where there was
    nothing they are 0, for `min` infinity and for `max` -infinity. held_out: whether it is worth knowing of held-out
    data, too.
    """

    total: Array
    count: Array | None = None
    by: Literal["sum", "min", "max"] = dataclasses.field(default="sum", metadata={"static": True})
    held_out: bool = dataclasses.field(default=True, metadata={"static": True})

    def joined(self) -> "Metric":
        """That of n micro-batches together, of whose metrics the fields are stacked, (n,)."""
        total = _REDUCTIONS[self.by](self.total, axis=0)
        count = None if self.count is None else jnp.sum(self.count, axis=0)
        return dataclasses.replace(self, total=total, count=count)

    def value(self) -> Array:
        return self.total if self.count is None else self.total / jnp.maximum(self.count, 1)


Metrics = dict[str, Metric]
LossFn = Callable[[Any, Batch, jax.Array | None], tuple[jax.Array, jax.Array, Metrics]]


def together(metrics: Metrics) -> Metrics:
    """The metrics of n micro-batches, stacked, as those of all of them."""
    return {name: metric.joined() for name, metric in metrics.items()}

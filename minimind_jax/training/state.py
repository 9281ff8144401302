"""What training changes: the step, the parameters and the optimizer's state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec


class TrainState(NamedTuple):
    """step: int32 scalar, optimizer steps done. params: float32. opt_state: of the optax optimizer, float32."""

    step: jax.Array
    params: Any
    opt_state: Any


def create_state(params: Any, optimizer: optax.GradientTransformation, shardings: TrainState | None = None):
    """The state before the first step. The optimizer's arrays are made where `shardings` puts them."""

    def create(params):
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return jax.jit(create, out_shardings=shardings)(params)


def state_shardings(optimizer: optax.GradientTransformation, param_shardings: Any, abstract_params: Any) -> TrainState:
    """A TrainState of shardings: the optimizer's arrays lie as their parameters do, everything else is on all devices.

    param_shardings, abstract_params: trees of NamedSharding and of shapes (see `sharding.param_shardings`).
    """
    whole = NamedSharding(jax.tree.leaves(param_shardings)[0].mesh, PartitionSpec())

    def is_masked(node):  # where optax.partition leaves a parameter to another optimizer
        return isinstance(node, optax.MaskedNode)

    opt_shardings = optax.tree.map_params(
        optimizer,
        lambda node, sharding: node if is_masked(node) else sharding,
        jax.eval_shape(optimizer.init, abstract_params),
        param_shardings,
        transform_non_params=lambda _: whole,
        is_leaf=is_masked,
    )
    return TrainState(whole, param_shardings, opt_shardings)

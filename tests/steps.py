"""A training step that moves nothing, to look at its gradient; what tests of steps share."""

import jax
import jax.numpy as jnp
import optax


def no_rates(step):
    return {}


def keep_gradient():
    """An optimizer that moves nothing and whose state is the last gradient it was given."""

    def update(grads, state, params=None, **_):
        return jax.tree.map(jnp.zeros_like, grads), grads

    return optax.GradientTransformationExtraArgs(lambda params: jax.tree.map(jnp.zeros_like, params), update)

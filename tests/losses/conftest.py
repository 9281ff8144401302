"""What tests of losses share."""

import jax
import jax.numpy as jnp
import pytest


@pytest.fixture
def in_float64(monkeypatch):
    """Ours in float64, too: norms, softmax and losses are cast to `jnp.float32`, whose rounding alone puts the gradient
    of a model off by up to 2e-6."""
    monkeypatch.setattr(jnp, "float32", jnp.float64)
    with jax.enable_x64(True):
        yield

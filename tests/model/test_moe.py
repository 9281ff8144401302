"""Routing and the ways to apply experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minimind_jax.model import moe
from minimind_jax.model.config import ModelConfig


def make_config(**changes):
    return ModelConfig(hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_experts=4, **changes)


def make_case(tokens, k, seed=0, experts=4, width=24):
    """Rows, router logits and kernels, float32."""
    keys = jax.random.split(jax.random.key(seed), 5)
    x_MD = jax.random.normal(keys[0], (tokens, 16))
    logits_ME = 3 * jax.random.normal(keys[1], (tokens, experts))
    kernels = tuple(
        0.3 * jax.random.normal(key, shape)
        for key, shape in zip(keys[2:], [(experts, 16, width), (experts, 16, width), (experts, width, 16)], strict=True)
    )
    return make_config(num_experts_per_tok=k), x_MD, logits_ME, kernels


@pytest.mark.parametrize(
    ("path", "tokens", "k", "spread"),
    [
        ("blocked", 101, 1, 1),
        ("blocked", 3, 1, 1),
        ("blocked", 96, 1, 0),
        ("blocked", 700, 2, 0.3),
        ("ragged", 96, 2, 1),
        ("tiled", 101, 1, 1),
        ("tiled", 3, 1, 1),
        ("tiled", 96, 1, 0),
        ("tiled", 700, 2, 0.3),
        ("looped", 101, 1, 1),
        ("looped", 96, 1, 0),
        ("looped", 700, 2, 0.3),
    ],
)
def test_fast_paths_equal_the_reference_in_value_and_gradient(monkeypatch, path, tokens, k, spread):
    if path == "looped":  # what `tiled` does where it would copy too many kernels
        monkeypatch.setattr(moe, "COPIED_BYTES", 0)
        path = "tiled"
    config, x_MD, logits_ME, kernels = make_case(tokens, k)
    # spread 0 sends every token to the same expert and leaves the others empty
    logits_ME = logits_ME * spread + jnp.array([0, 0, 1, 0.5])

    @jax.jit
    def both(x_MD, logits_ME, kernels):
        def total(path, x_MD, logits_ME, kernels):
            out_MD = moe.apply_experts(x_MD, moe.route(config, logits_ME, jnp.ones(tokens)), kernels, path)
            return jnp.sum(jnp.sin(out_MD) * jnp.arange(16)), out_MD

        gradient = jax.value_and_grad(total, argnums=(1, 2, 3), has_aux=True)
        return gradient("reference", x_MD, logits_ME, kernels), gradient(path, x_MD, logits_ME, kernels)

    expected, actual = both(x_MD, logits_ME, kernels)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()) + 1e-9, rtol=1e-5)


@pytest.mark.parametrize("path", ["blocked", "ragged", "tiled"])
def test_bfloat16_runs_wherever_a_path_is_asked_for(path):
    """A CPU has no product of bfloat16 that is written as float32 in every layout."""
    config, x_MD, logits_ME, kernels = make_case(101, 2)

    def total(path, x_MD, kernels):
        out_MD = moe.apply_experts(x_MD, moe.route(config, logits_ME, jnp.ones(101)), kernels, path)
        return jnp.sum(jnp.sin(out_MD.astype(jnp.float32)))

    gradient = jax.jit(jax.grad(total, argnums=(1, 2)), static_argnums=0)
    expected = gradient("reference", x_MD, kernels)
    found = gradient(path, *jax.tree.map(lambda x: x.astype(jnp.bfloat16), (x_MD, kernels)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.linalg.norm(np.float32(a) - b) < 0.03 * np.linalg.norm(b)


@pytest.mark.parametrize("path", ["reference", "ragged", "tiled", "blocked"])
def test_devices_with_a_part_of_the_experts_add_up_to_all_of_them(path):
    config, x_MD, logits_ME, kernels = make_case(96, 2)

    @jax.jit
    def both(x_MD, logits_ME, kernels):
        def total(parts, x_MD, logits_ME, kernels):
            routing = moe.route(config, logits_ME, jnp.ones(96))
            out_MD = 0
            for first in range(0, 4, 4 // parts):
                own = routing._replace(experts_Mk=routing.experts_Mk - first)
                own_kernels = tuple(kernel[first : first + 4 // parts] for kernel in kernels)
                out_MD += moe.apply_experts(x_MD, own, own_kernels, path, is_part=parts > 1)
            return jnp.sum(jnp.sin(out_MD) * jnp.arange(16)), out_MD

        gradient = jax.value_and_grad(total, argnums=(1, 2, 3), has_aux=True)
        return gradient(1, x_MD, logits_ME, kernels), gradient(2, x_MD, logits_ME, kernels)

    expected, actual = both(x_MD, logits_ME, kernels)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()) + 1e-9, rtol=1e-5)

"""Attention: both paths against a formula in float64 NumPy, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minimind_jax.model.attention import attention


def make_inputs(B, T, N, K, H, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(2 * rng.standard_normal((B, T, heads, H)), jnp.float32) for heads in (N, K, K))


def make_segments(B, T, seed=0):
    """Rows of documents of random lengths, the second row with padding at both ends."""
    rng = np.random.default_rng(seed)
    segments = np.cumsum(rng.random((B, T)) < 4 / T, axis=1) + 1
    segments[1, : T // 8] = 0
    segments[1, -T // 5 :] = 0
    return jnp.asarray(segments, jnp.int32)


def numpy_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
    """The definition, one query at a time, in float64."""
    q_BTNH, k_BTKH, v_BTKH = (np.asarray(x, np.float64) for x in (q_BTNH, k_BTKH, v_BTKH))
    out_BTNH = np.zeros_like(q_BTNH)
    B, T, N, H = q_BTNH.shape
    for b in range(B):
        for t in range(T):
            own = [s for s in range(t + 1) if 0 < segment_ids_BT[b, s] == segment_ids_BT[b, t]]
            for n in range(N if own else 0):
                head = n // (N // k_BTKH.shape[2])
                weights = np.exp(k_BTKH[b, own, head] @ q_BTNH[b, t, n] / np.sqrt(H))
                out_BTNH[b, t, n] = weights @ v_BTKH[b, own, head] / weights.sum()
    return out_BTNH


@pytest.mark.parametrize("path", ["reference", "grouped"])
def test_value_is_the_definition_s(path):
    q, k, v = make_inputs(2, 30, 4, 2, 8)
    segment_ids_BT = make_segments(2, 30)
    out_BTNH = attention(q, k, v, segment_ids_BT=segment_ids_BT, path=path)
    np.testing.assert_allclose(out_BTNH, numpy_attention(q, k, v, np.asarray(segment_ids_BT)), atol=2e-6)


@pytest.mark.parametrize(
    ("T", "N", "K", "packed"),
    [(230, 4, 2, True), (230, 4, 2, False), (97, 3, 3, True), (1, 2, 1, False), (40, 6, 1, True)],
)
def test_paths_agree_in_value_and_gradient(T, N, K, packed):
    inputs = make_inputs(2, T, N, K, 16)
    segment_ids_BT = make_segments(2, T) if packed else None
    weights_BTNH = jax.random.normal(jax.random.key(1), inputs[0].shape)

    def total(path, *inputs):
        out_BTNH = attention(*inputs, segment_ids_BT=segment_ids_BT, path=path)
        return jnp.sum(out_BTNH * weights_BTNH), out_BTNH

    @jax.jit
    def both(*inputs):
        gradient = jax.grad(total, argnums=(1, 2, 3), has_aux=True)
        return gradient("reference", *inputs), gradient("grouped", *inputs)

    expected, actual = both(*inputs)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, float(jnp.abs(b).max())))


@pytest.mark.parametrize("path", ["reference", "grouped"])
def test_queries_that_see_nothing_give_zero_and_no_gradient(path):
    inputs = make_inputs(2, 16, 2, 1, 8)
    segment_ids_BT = jnp.zeros((2, 16), jnp.int32).at[0, 4:].set(1)

    def total(*inputs):
        return jnp.sum(attention(*inputs, segment_ids_BT=segment_ids_BT, path=path) ** 2)

    out_BTNH = attention(*inputs, segment_ids_BT=segment_ids_BT, path=path)
    assert not jnp.any(out_BTNH[1]) and not jnp.any(out_BTNH[0, :4]) and jnp.all(out_BTNH[0, 4:] != 0)
    for gradient in jax.grad(total, argnums=(0, 1, 2))(*inputs):
        assert jnp.all(jnp.isfinite(gradient))
        assert not jnp.any(gradient[1]) and not jnp.any(gradient[0, :4])


@pytest.mark.parametrize("path", ["reference", "grouped"])
def test_bfloat16_stays_near_float32_with_large_scores(path):
    inputs = tuple(4 * x for x in make_inputs(1, 64, 2, 1, 16))
    rounded = tuple(x.astype(jnp.bfloat16) for x in inputs)
    out_BTNH = attention(*rounded, path=path)
    assert out_BTNH.dtype == jnp.bfloat16
    expected_BTNH = attention(*(x.astype(jnp.float32) for x in rounded), path="reference")
    # bfloat16 holds 8 bits of the probabilities, of the output, and (grouped) of the scaled queries
    assert float(jnp.max(jnp.abs(out_BTNH - expected_BTNH)) / jnp.max(jnp.abs(expected_BTNH))) < 0.05


def test_cache_positions_say_what_is_seen():
    q, k, v = make_inputs(2, 3, 2, 1, 8)
    all_k, all_v = (jnp.concatenate((x, x + 1), axis=1) for x in (k, v))
    key_positions_BS = jnp.array([[0, 1, 2, -1, -1, -1], [-1, -1, 0, 1, 2, 3]])
    query_positions_BT = jnp.array([[0, 1, 2], [1, 2, 3]])
    out_BTNH = attention(
        q, all_k, all_v, query_positions_BT=query_positions_BT, key_positions_BS=key_positions_BS, path="reference"
    )
    first = attention(q[:1], k[:1], v[:1], path="reference")
    np.testing.assert_allclose(out_BTNH[0], first[0], atol=1e-6)
    keys, values = all_k[1:, 2:4], all_v[1:, 2:4]  # what the query at position 1 of the second row sees
    weights = jax.nn.softmax(jnp.einsum("NH,SH->NS", q[1, 0], keys[0, :, 0]) / np.sqrt(8))
    np.testing.assert_allclose(out_BTNH[1, 0], weights @ values[0, :, 0], atol=1e-6)

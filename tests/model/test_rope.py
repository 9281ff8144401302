"""Rotary tables against MiniMind's and against formulas in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from minimind_jax.model import rope
from minimind_jax.model.config import ModelConfig, RopeScaling


def make_config(scaling=None, head_dim=96, theta=1e6):
    return ModelConfig(hidden_size=768, head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)


def both_halves(table_BTh):
    """The golden tables repeat each pair's value for both halves of the head."""
    return np.concatenate((table_BTh[0], table_BTh[0]), axis=-1)


def test_tables_are_minimind_s(fixtures_dir):
    golden = np.load(fixtures_dir / "losses.npz")
    cos_BTh, sin_BTh = rope.rope_tables(make_config(), jnp.arange(64)[None])
    np.testing.assert_allclose(both_halves(cos_BTh), golden["rope_cos"], atol=1e-6)
    np.testing.assert_allclose(both_halves(sin_BTh), golden["rope_sin"], atol=1e-6)


def test_yarn_tables_are_minimind_s(fixtures_dir):
    golden = np.load(fixtures_dir / "losses.npz")
    scaling = RopeScaling("yarn", 16.0, 2048, attention_factor=1.0)
    cos_BTh, sin_BTh = rope.rope_tables(make_config(scaling), jnp.asarray(golden["yarn_positions"])[None])
    np.testing.assert_allclose(both_halves(cos_BTh), golden["yarn_cos"], atol=1e-6)
    np.testing.assert_allclose(both_halves(sin_BTh), golden["yarn_sin"], atol=1e-6)


def test_yarn_multiplies_the_tables_by_its_attention_factor():
    positions_BT = jnp.arange(50)[None]
    plain = rope.rope_tables(make_config(RopeScaling("yarn", 16.0, 2048, attention_factor=1.0)), positions_BT)
    scaled = rope.rope_tables(make_config(RopeScaling("yarn", 16.0, 2048, attention_factor=1.25)), positions_BT)
    for a, b in zip(scaled, plain, strict=True):
        np.testing.assert_allclose(a, 1.25 * b, rtol=1e-6)


def test_an_attention_factor_that_is_not_given_is_the_paper_s():
    assert RopeScaling("yarn", 16.0, 2048).attention_factor == pytest.approx(0.1 * np.log(16) + 1)
    assert RopeScaling("linear", 16.0, 2048).attention_factor == 1.0
    with pytest.raises(ValueError, match="attention_factor is 0"):
        RopeScaling("yarn", 16.0, 2048, attention_factor=0)
    with pytest.raises(ValueError, match="attention_factor is for yarn"):
        RopeScaling("linear", 16.0, 2048, attention_factor=1.2)


def test_linear_scaling_divides_positions():
    scaled = rope.rope_tables(make_config(RopeScaling("linear", 4.0, 32)), 4 * jnp.arange(64)[None])
    plain = rope.rope_tables(make_config(), jnp.arange(64)[None])
    for a, b in zip(scaled, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("length", [20, 32, 33, 128])
def test_dynamic_scaling_raises_theta_beyond_the_trained_context(length):
    config = make_config(RopeScaling("dynamic", 4.0, 32), head_dim=16, theta=1e4)
    positions_BT = jnp.arange(length)[None]
    cos_BTh, _ = rope.rope_tables(config, positions_BT, rope.document_length(positions_BT, None))
    growth = 4.0 * max(length, 32) / 32 - 3.0
    theta = 1e4 * growth ** (16 / 14)
    expected = np.cos(np.arange(length)[:, None] * theta ** (-np.arange(0, 16, 2) / 16))
    np.testing.assert_allclose(cos_BTh[0], expected, atol=2e-5)


def test_document_length_is_that_of_each_packed_document():
    positions_BT = jnp.array([[0, 1, 2, 0, 1, 0, 0]])
    segment_ids_BT = jnp.array([[1, 1, 1, 2, 2, 3, 0]])
    assert rope.document_length(positions_BT, segment_ids_BT).tolist() == [[3, 3, 3, 2, 2, 1, 1]]
    assert rope.document_length(positions_BT[:, :3], None).tolist() == [[3, 3, 3]]


def test_rotation_keeps_norms_and_depends_on_distance_only():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 96)), jnp.float32) for _ in range(2))

    def score(query_position, key_position):
        rotated = [
            rope.apply_rope(x, *rope.rope_tables(make_config(), jnp.array([[position]])))
            for x, position in ((q, query_position), (k, key_position))
        ]
        np.testing.assert_allclose(jnp.linalg.norm(rotated[0]), jnp.linalg.norm(q), rtol=1e-5)
        return float(jnp.sum(rotated[0] * rotated[1]))

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)

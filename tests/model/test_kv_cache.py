"""Decoding with the key/value cache equals the whole forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minimind_jax.model.config import ComputeConfig, ModelConfig, RopeScaling
from minimind_jax.model.kv_cache import KVCache
from minimind_jax.model.transformer import LanguageModel

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
MODELS = {
    "dense": ModelConfig(**SIZES),
    "moe": ModelConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
    "dynamic": ModelConfig(**SIZES, rope_scaling=RopeScaling("dynamic", 4.0, 64)),
}


@pytest.mark.parametrize("is_start_known", [True, False], ids=["from the start", "at an index"])
@pytest.mark.parametrize("name", MODELS)
def test_left_padded_prompts_then_single_tokens_equal_the_whole_pass(name, is_start_known):
    model = LanguageModel(MODELS[name], ComputeConfig(dtype="float32"))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32), model.abstract_params()
    )
    lengths, prompt, total = np.array([7, 3, 1]), 7, 12
    tokens = jax.random.randint(jax.random.key(1), (3, total), 0, 50)  # row b: its prompt right-aligned at `prompt`
    padding_B = prompt - lengths
    positions = np.arange(total) - padding_B[:, None]
    positions = jnp.asarray(np.where(positions < 0, -1, positions), jnp.int32)

    def step(params, tokens_BT, positions_BT, cache, index):
        output = model.hidden(params, tokens_BT, positions_BT, cache=cache, write_index=index)
        return model.logits(params, output.hidden_BTD), output.cache

    cache = KVCache.create(model.config, 3, total + 4)
    first = jax.jit(step, static_argnums=4) if is_start_known else jax.jit(step)
    logits, cache = first(params, tokens[:, :prompt], positions[:, :prompt], cache, 0)
    step = jax.jit(step)
    parts = [logits]
    for t in range(prompt, total):
        logits, cache = step(params, tokens[:, t : t + 1], positions[:, t : t + 1], cache, t)
        parts.append(logits)
    cached_BTV = jnp.concatenate(parts, axis=1)
    assert cache.positions_BS[:, -1].tolist() == [-1] * 3

    # The same rows without padding, as segments of whole rows.
    segments = jnp.asarray(positions >= 0, jnp.int32)
    whole_BTV = jax.jit(model.apply)(params, tokens, positions, segments)[0]
    for row, padding in enumerate(padding_B):
        np.testing.assert_allclose(cached_BTV[row, padding:], whole_BTV[row, padding:], atol=2e-5)


def test_new_cache_is_empty_and_has_the_dtype_asked_for():
    cache = KVCache.create(MODELS["dense"], 2, 5, jnp.bfloat16)
    assert [(k.shape, v.shape) for k, v in cache.layers] == [((2, 2, 5, 8), (2, 2, 5, 8))] * 2
    assert cache.layers[0].k_BKSH.dtype == jnp.bfloat16
    assert cache.positions_BS.tolist() == [[-1] * 5] * 2


def test_more_slots_are_empty_and_keep_what_was_there():
    config, rng = MODELS["dense"], np.random.default_rng(0)
    k_BTKH, v_BTKH = jnp.asarray(rng.standard_normal((2, 2, 3, 2, 8)), jnp.float32)
    small, large = (KVCache.create(config, 2, slots).layers[0] for slots in (5, 9))
    grown, expected = small.write(k_BTKH, v_BTKH, 1).grow(4), large.write(k_BTKH, v_BTKH, 1)
    np.testing.assert_array_equal(grown.k_BKSH, expected.k_BKSH)
    np.testing.assert_array_equal(grown.v_BKSH, expected.v_BKSH)
    cache = KVCache.create(config, 2, 5).write_positions(jnp.array([[0, 1], [-1, 0]]), 2).grow(9)
    assert cache.positions_BS.tolist() == [[-1, -1, 0, 1, *[-1] * 5], [-1, -1, -1, 0, *[-1] * 5]]

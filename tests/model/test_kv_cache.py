"""Decoding with the key/value cache equals the whole forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minimind_jax.model.config import ComputeConfig, ModelConfig, RopeScaling
from minimind_jax.model.kv_cache import CPU_BLOCK, KVCache
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
    keys_BKHS, values_BKSH = cache.layers[1].join()
    assert len(cache.layers) == 2 and keys_BKHS.shape == (2, 2, 8, 5) and values_BKSH.shape == (2, 2, 5, 8)
    assert keys_BKHS.dtype == values_BKSH.dtype == jnp.bfloat16
    assert cache.positions_BS.tolist() == [[-1] * 5] * 2


@pytest.mark.parametrize(("slots", "more"), [(5, 4), (CPU_BLOCK, CPU_BLOCK), (96, 3 * CPU_BLOCK - 96)])
def test_slots_hold_what_was_written_and_more_of_them_are_empty(slots, more):
    config, rng = MODELS["dense"], np.random.default_rng(0)
    k_BTKH, v_BTKH = jnp.asarray(rng.standard_normal((2, 2, slots - 2, 2, 8)), jnp.float32)
    layer = KVCache.create(config, 2, slots).layers[0].write(k_BTKH[:, :2], v_BTKH[:, :2], 1)
    for t in range(2, slots - 2):
        layer = layer.write(k_BTKH[:, t : t + 1], v_BTKH[:, t : t + 1], t + 1)
    for cache, empty in ((layer, 1), (layer.grow(more), 1 + more)):
        keys_BKHS, values_BKSH = cache.join()
        slots_of = ((0, 0), (1, empty), (0, 0), (0, 0))
        np.testing.assert_array_equal(keys_BKHS.transpose(0, 3, 1, 2), np.pad(k_BTKH, slots_of))
        np.testing.assert_array_equal(values_BKSH.transpose(0, 2, 1, 3), np.pad(v_BTKH, slots_of))


def test_new_slots_have_no_position():
    cache = KVCache.create(MODELS["dense"], 2, 5).write_positions(jnp.array([[0, 1], [-1, 0]]), 2).grow(9)
    assert cache.positions_BS.tolist() == [[-1, -1, 0, 1, *[-1] * 5], [-1, -1, -1, 0, *[-1] * 5]]

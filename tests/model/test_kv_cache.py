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
LENGTHS, PROMPT, STEPS = np.array([7, 3, 1]), 7, 5


def make(name):
    model = LanguageModel(MODELS[name], ComputeConfig(dtype="float32"))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32), model.abstract_params()
    )
    return model, params, jax.random.randint(jax.random.key(1), (3, PROMPT + STEPS), 0, 50)


def whole_logits(model, params, tokens):
    """Of rows in which what is behind a row's tokens is padding."""

    def read(params, tokens):
        output = model.read_rows(params, model.embed(params, tokens), lengths_B=jnp.asarray(LENGTHS + STEPS))
        return model.logits(params, output.hidden_BTD)

    return jax.jit(read)(params, tokens)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_prompts_of_any_length_then_single_tokens_equal_the_whole_pass(name, chunks):
    """The prompts read at once, or in pieces of 3 tokens, the last of which are padding in the shorter rows."""
    model, params, tokens = make(name)

    @jax.jit
    def prompt(params, tokens, lengths, cache):
        hidden, cache = model.read_next(params, model.embed(params, tokens), None, cache, lengths)
        return model.logits(params, hidden), cache

    @jax.jit
    def following(params, tokens, starts, cache, lengths):
        hidden, cache = model.read_next(params, model.embed(params, tokens), starts, cache, lengths)
        return model.logits(params, hidden), cache

    width = -(-PROMPT // chunks)
    expected = np.asarray(whole_logits(model, params, tokens))
    logits, cache = prompt(params, tokens[:, :width], jnp.minimum(LENGTHS, width), model.new_cache(3, PROMPT + STEPS))
    parts = [logits]
    for start in range(width, PROMPT, width):
        piece = jnp.pad(tokens[:, start : start + width], ((0, 0), (0, max(0, start + width - PROMPT))))
        logits, cache = following(params, piece, jnp.full(3, start), cache, jnp.minimum(LENGTHS, start + width))
        parts.append(logits)
    read = np.concatenate(parts, axis=1)
    for step in range(STEPS):
        places = LENGTHS + step
        newest = jnp.take_along_axis(tokens, places[:, None], axis=1)
        logits, cache = following(params, newest, jnp.asarray(places), cache, None)
        np.testing.assert_allclose(logits[:, 0], expected[np.arange(3), places], atol=2e-5)
    if name != "dynamic":  # whose angles follow the length that was known when a token was read
        for row, length in enumerate(LENGTHS):
            np.testing.assert_allclose(read[row, :length], expected[row, :length], atol=2e-5)


def test_dynamic_scaling_looks_at_a_row_s_own_length_and_not_at_its_padding():
    config = ModelConfig(**SIZES, rope_scaling=RopeScaling("dynamic", 4.0, 4))
    model, params = LanguageModel(config, ComputeConfig(dtype="float32")), make("dense")[1]
    tokens = make("dense")[2]
    read = jax.jit(lambda tokens, lengths: model.read_next(
        params, model.embed(params, tokens), None, model.new_cache(len(tokens), PROMPT), lengths)[0])  # fmt: skip
    together = read(tokens[:, :PROMPT], jnp.asarray(LENGTHS))
    rows = jax.jit(lambda tokens, lengths: model.read_rows(
        params, model.embed(params, tokens), lengths_B=lengths).hidden_BTD)(tokens, jnp.asarray(LENGTHS))  # fmt: skip
    for row, length in enumerate(LENGTHS):
        alone = read(tokens[row : row + 1, :length], jnp.asarray([length]))
        np.testing.assert_allclose(together[row, :length], alone[0], atol=2e-5)
        np.testing.assert_allclose(rows[row, :length], alone[0], atol=2e-5)


@pytest.mark.parametrize(("platform", "slots"), [("cpu", 2 * CPU_BLOCK), ("gpu", 66)])
def test_a_new_cache_has_the_dtype_and_the_blocks_of_its_platform(platform, slots):
    cache = KVCache.create(MODELS["dense"], 2, 66, jnp.bfloat16, platform)
    keys_BKHS, values_BKSH = cache.layers[1].join()
    assert len(cache.layers) == 2 and cache.layers[0].join()[1].shape[2] == slots
    assert keys_BKHS.shape == (2, 2, 8, slots) and values_BKSH.shape == (2, 2, slots, 8)
    assert keys_BKHS.dtype == values_BKSH.dtype == jnp.bfloat16


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_slots_hold_what_was_written_and_a_larger_cache_takes_it_over(platform):
    config, rng = MODELS["dense"], np.random.default_rng(0)
    tokens, slots = CPU_BLOCK + 9, 2 * CPU_BLOCK
    k_BTKH, v_BTKH = jnp.asarray(rng.standard_normal((2, 2, tokens, 2, 8)), jnp.float32)
    cache = KVCache.create(config, 2, slots, jnp.float32, platform)
    layer = cache.layers[0]
    for places in (np.arange(66), np.arange(66, 70), np.arange(70, 71), np.arange(71, tokens)):
        positions_BT = jnp.asarray(np.broadcast_to(places, (2, len(places))))
        layer = layer.write(k_BTKH[:, places], v_BTKH[:, places], positions_BT)
    beyond = layer.write(k_BTKH[:, :1], v_BTKH[:, :1], jnp.full((2, 1), slots))
    larger = KVCache((beyond,)).into(KVCache(KVCache.create(config, 2, 2 * slots, jnp.float32, platform).layers[:1]))
    for found in (layer, beyond, larger.layers[0]):
        keys_BKHS, values_BKSH = found.join()
        padding = ((0, 0), (0, found.join()[1].shape[2] - tokens), (0, 0), (0, 0))
        np.testing.assert_array_equal(keys_BKHS.transpose(0, 3, 1, 2), np.pad(k_BTKH, padding))
        np.testing.assert_array_equal(values_BKSH.transpose(0, 2, 1, 3), np.pad(v_BTKH, padding))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_rows_are_written_and_copied_one_by_one(platform):
    config, rng = MODELS["dense"], np.random.default_rng(0)
    tokens = CPU_BLOCK + 9
    k_BTKH, v_BTKH = jnp.asarray(rng.standard_normal((2, 2, tokens, 2, 8)), jnp.float32)
    layer = KVCache.create(config, 4, 2 * CPU_BLOCK, jnp.float32, platform).layers[0]
    positions_BT = jnp.broadcast_to(jnp.arange(tokens), (2, tokens))
    layer = layer.write(k_BTKH, v_BTKH, positions_BT, jnp.array([2, 4]))  # there is no row 4
    count = CPU_BLOCK if platform == "cpu" else tokens
    copied = KVCache((layer,)).copy_row(2, 0, count).layers[0]
    for found in (layer, copied):
        keys_BKHS, values_BKSH = (np.array(x) for x in found.join())
        np.testing.assert_array_equal(keys_BKHS[2, :, :, :tokens], k_BTKH[0].transpose(1, 2, 0))
        np.testing.assert_array_equal(values_BKSH[2, :, :tokens], v_BTKH[0].transpose(1, 0, 2))
        assert not keys_BKHS[[1, 3]].any() and not values_BKSH[[1, 3]].any()
    assert not np.array(layer.join()[0])[0].any()
    np.testing.assert_array_equal(copied.join()[0][0, :, :, :count], k_BTKH[0, :count].transpose(1, 2, 0))
    assert platform != "cpu" or not np.array(copied.join()[0])[0, :, :, count:].any()

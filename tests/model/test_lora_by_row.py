"""Several adapters beside one another, of which each row of a batch uses its own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minimind_jax.convert.peft import rank_table
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.lora import init_adapters, join, make_adapter, merge, stack, without_adapters
from minimind_jax.model.transformer import LanguageModel

CONFIG = ModelConfig(
    vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.1,
)  # fmt: skip
MOE = dataclasses.replace(CONFIG, num_experts=4, num_experts_per_tok=1)
# (rank, projections, ranks of single layers) of adapters that differ in everything; the last one is on no MLP
ADAPTERS = [
    (2, ("all-linear",), {}),
    (5, ("q_proj", "down_proj"), {"layers.1.self_attn.q_proj": 9}),
    (3, ("v_proj",), {}),
]
TOKENS = jax.random.randint(jax.random.key(2), (5, 9), 0, 60)
LENGTHS = jnp.array([8, 3, 5, 1, 6])
CHOSEN = jnp.array([1, -1, 0, 2, 1])


@functools.cache
def make(config=CONFIG):
    model = LanguageModel(config)
    return model, jax.jit(model.init)(jax.random.key(1))


def make_adapters(config, params, choices):
    """Trees of adapters that are not fresh: both matrices drawn."""
    trees = []
    for number, (rank, targets, ranks) in enumerate(choices):
        table = rank_table(config, rank, targets, ranks)
        rng = np.random.default_rng(number)
        fresh = init_adapters(jax.random.key(number), params, table, 3.0 * rank, False)

        def draw(path, leaf, rng=rng):
            return leaf + 0.2 * rng.standard_normal(leaf.shape) * (path[-1].key == "lora_b")

        trees.append(jax.tree_util.tree_map_with_path(draw, fresh))
    return trees


@jax.jit(static_argnums=0)
def generate(model, params, adapter_B):
    """Logits of all tokens of the prompts, and of the token behind each."""
    prompts = model.embed(params, TOKENS[:, :8])
    read, cache = model.read_next(params, prompts, None, model.new_cache(5, 16), LENGTHS, adapter_B=adapter_B)
    news = jnp.take_along_axis(TOKENS, LENGTHS[:, None], axis=1)
    hidden, _ = model.read_next(params, model.embed(params, news), LENGTHS, cache, adapter_B=adapter_B)
    return model.logits(params, read), model.logits(params, hidden)


@pytest.mark.parametrize(
    ("config", "choices"),
    [(CONFIG, ADAPTERS), (MOE, [(4, ("q_proj", "k_proj"), {}), *ADAPTERS[2:], (1, ("o_proj",), {})])],
)
@pytest.mark.parametrize("laid_out", [False, True])
def test_each_row_equals_the_model_with_its_adapter_merged(config, choices, laid_out):
    base, params = make(config)
    trees = make_adapters(config, params, choices)
    adapter, beside = stack(trees)
    model, held = dataclasses.replace(base, adapter=adapter), join(params, beside)
    read, following = generate(model, model.unstack(held) if laid_out else held, CHOSEN)
    rows = [merge(join(params, trees[n])) if n >= 0 else params for n in CHOSEN.tolist()]
    apply, differences = jax.jit(base.apply), []
    for row, (merged, length) in enumerate(zip(rows, LENGTHS.tolist(), strict=True)):
        expected, plain = (apply(p, TOKENS[row : row + 1])[0][0] for p in (merged, params))
        differences.append(float(np.abs(expected[: length + 1] - plain[: length + 1]).max()))
        np.testing.assert_allclose(read[row, :length], expected[:length], atol=1e-5)
        np.testing.assert_allclose(following[row, 0], expected[length], atol=1e-5)
    assert [difference > 1e-2 for difference in differences] == (CHOSEN >= 0).tolist()


def test_without_numbers_all_rows_are_the_base_model_s():
    base, params = make()
    adapter, beside = stack(make_adapters(CONFIG, params, ADAPTERS))
    model, held = dataclasses.replace(base, adapter=adapter), join(params, beside)
    for adapter_B in (None, jnp.full(5, -1)):
        for ours, theirs in zip(generate(model, held, adapter_B), generate(base, params, None), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_the_description_fits_the_tree():
    base, params = make()
    adapter, beside = stack(make_adapters(CONFIG, params, ADAPTERS))
    model, held = dataclasses.replace(base, adapter=adapter), join(params, beside)
    assert dict(adapter.ranks)["q_proj"] == 2 + 9
    assert jax.tree.map(lambda leaf: leaf.shape, held) == jax.tree.map(lambda leaf: leaf.shape, model.abstract_params())
    assert jax.tree.structure(without_adapters(held)) == jax.tree.structure(params)


def test_one_adapter_alone_equals_itself_trained():
    """The tree of one adapter as a run has it, and the same beside no other."""
    base, params = make()
    [tree] = make_adapters(CONFIG, params, ADAPTERS[:1])
    table = rank_table(CONFIG, *ADAPTERS[0])
    alone = generate(dataclasses.replace(base, adapter=make_adapter(table)), join(params, tree), None)
    adapter, beside = stack([tree])
    stacked = generate(dataclasses.replace(base, adapter=adapter), join(params, beside), jnp.zeros(5, int))
    for ours, theirs in zip(stacked, alone, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_several_adapters_are_not_merged_into_one_kernel():
    _, params = make()
    _, beside = stack(make_adapters(CONFIG, params, ADAPTERS))
    with pytest.raises(ValueError, match="several adapters"):
        merge(join(params, beside))

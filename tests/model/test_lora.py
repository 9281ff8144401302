"""Adapters: they change nothing at first, act as their formula says, and merge into the kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minimind_jax.convert.peft import rank_table
from minimind_jax.model.config import ComputeConfig, ModelConfig
from minimind_jax.model.lora import init_adapters, join, make_adapter, merge, scale_of, split, without_adapters
from minimind_jax.model.transformer import LanguageModel

CONFIG = ModelConfig(
    vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.1,
)  # fmt: skip
FLOAT32 = ComputeConfig(dtype="float32")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make(targets=("all-linear",), ranks=None, dropout=0.0, fresh=False, seed=0):
    """(model with adapters, its parameters); both matrices drawn, unless fresh."""
    table = rank_table(CONFIG, 4, targets, ranks or {})
    params = LanguageModel(CONFIG, FLOAT32).init(jax.random.key(1))
    adapters = init_adapters(jax.random.key(seed), params, table, 8.0, False)
    if not fresh:
        own = np.random.default_rng(seed)

        def draw(path, leaf):
            return leaf + 0.1 * own.standard_normal(leaf.shape) * (path[-1].key == "lora_b")

        adapters = jax.tree_util.tree_map_with_path(draw, adapters)
    return LanguageModel(CONFIG, FLOAT32, make_adapter(table, dropout)), join(params, adapters), table


TOKENS = jax.random.randint(jax.random.key(2), (2, 12), 0, 60)


def logits(model, params, **options):
    output = model.read_rows(params, model.embed(params, TOKENS), **options)
    return np.asarray(model.logits(params, output.hidden_BTD))


def test_fresh_adapters_change_nothing():
    model, params, _ = make(fresh=True)
    base = LanguageModel(CONFIG, FLOAT32)
    np.testing.assert_array_equal(logits(model, params), logits(base, without_adapters(params)))


@pytest.mark.parametrize("targets", [("all-linear",), *((name,) for name in ALL)])
def test_merged_equals_unmerged(targets):
    model, params, _ = make(targets)
    merged = merge(params)
    base = LanguageModel(CONFIG, FLOAT32)
    assert jax.tree.structure(merged) == jax.tree.structure(base.abstract_params())
    apart = np.abs(logits(base, merged) - logits(base, without_adapters(params))).max()
    assert apart > 1e-3
    np.testing.assert_allclose(logits(model, params), logits(base, merged), atol=1e-5)


def test_the_formula_in_float64():
    _, params, _ = make(("up_proj",))
    leaf = jax.tree.map(lambda x: np.asarray(x, np.float64), params["layers"]["mlp"]["up_proj"])
    np.testing.assert_allclose(leaf["lora_scale"], 2.0)
    expected = leaf["kernel"] + 2.0 * leaf["lora_a"] @ leaf["lora_b"]
    np.testing.assert_allclose(merge(params)["layers"]["mlp"]["up_proj"]["kernel"], expected, atol=1e-6)


def test_layers_with_ranks_of_their_own_stay_apart():
    """Beyond a layer's rank nothing is ever added: the gradient keeps the zeros."""
    model, params, table = make(("q_proj", "layers.1.mlp.up_proj"), {"layers.2": 2, "layers.0.self_attn.q_proj": 6})
    assert {name: ranks for name, ranks in table.items() if any(ranks)} == {"q_proj": (6, 4, 2), "up_proj": (0, 4, 0)}
    leaf = params["layers"]["attention"]["q_proj"]
    assert leaf["lora_a"].shape == (3, 32, 6)
    np.testing.assert_allclose(leaf["lora_scale"], [8 / 6, 2, 4], rtol=1e-6)
    leaf = {**leaf, "lora_b": leaf["lora_b"] * (np.arange(6) < np.array([6, 4, 2])[:, None])[..., None]}
    params = join(*split(params, lambda path: path[-2:] != ("q_proj", "lora_b"))[:1], {
        "layers": {"attention": {"q_proj": {"lora_b": leaf["lora_b"]}}}
    })  # fmt: skip
    grads = jax.grad(lambda p: jnp.sum(model.apply(p, TOKENS)[0] ** 2))(params)
    found = grads["layers"]["attention"]["q_proj"]
    for layer, rank in enumerate((6, 4, 2)):
        assert np.abs(found["lora_a"][layer, :, :rank]).min() > 0
        np.testing.assert_array_equal(found["lora_a"][layer, :, rank:], 0)
        np.testing.assert_array_equal(found["lora_b"][layer, rank:], 0)
    up = grads["layers"]["mlp"]["up_proj"]
    np.testing.assert_array_equal(up["lora_a"][0], 0)
    assert np.abs(up["lora_a"][1]).max() > 0


def test_rslora_scales_by_the_root_of_the_rank():
    assert scale_of(16, 32, rslora=False) == 2
    assert scale_of(16, 32, rslora=True) == 8
    assert scale_of(0, 32, rslora=True) == 0


def test_dropout_acts_on_the_adapters_alone():
    model, params, _ = make(dropout=0.5)
    same = logits(model, params)
    np.testing.assert_array_equal(same, logits(model, params, dropout_key=None))
    first, again, other = (logits(model, params, dropout_key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    fresh_model, fresh, _ = make(dropout=0.5, fresh=True)
    np.testing.assert_array_equal(logits(fresh_model, fresh, dropout_key=jax.random.key(0)), logits(fresh_model, fresh))


def test_generation_takes_unstacked_adapters():
    model, params, _ = make()
    np.testing.assert_allclose(logits(model, model.unstack(params)), logits(model, params), atol=1e-5)


@pytest.mark.parametrize("function", [merge, without_adapters])
def test_unstacked_adapters_are_neither_merged_nor_taken_off(function):
    model, params, _ = make()
    with pytest.raises(ValueError, match="unstacked for generation"):
        function(model.unstack(params))


@pytest.mark.slow
def test_remat_and_scan_give_the_same_gradients():
    model, params, _ = make()
    own = split(params, lambda path: path[-1] in ("lora_a", "lora_b"))

    def gradient(compute):
        other = LanguageModel(CONFIG, compute, model.adapter)

        def loss(trained):
            full = join(own[1], trained)
            return jnp.mean(other.apply(full, TOKENS)[0] ** 2)

        return jax.grad(loss)(own[0])

    expected = gradient(FLOAT32)
    for changes in ({"remat": "full"}, {"remat": "dots"}, {"scan_unroll": 1}):
        found = gradient(ComputeConfig(dtype="float32", **changes))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_split_and_join_are_inverse():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    kept, rest = split(tree, lambda path: path[-1] in ("d", "e"))
    assert kept == {"a": {"c": {"d": 2}}, "e": 3}
    assert rest == {"a": {"b": 1}}
    assert join(kept, rest) == tree
    with pytest.raises(ValueError, match="in both"):
        join(tree, kept)

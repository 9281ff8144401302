"""Experts laid out for generation on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minimind_jax.model import loose_experts, moe
from minimind_jax.model.config import ComputeConfig, ModelConfig
from minimind_jax.model.linear import TransposedKernel
from minimind_jax.model.loose_experts import LooseKernels
from minimind_jax.model.transformer import LanguageModel

SHAPE = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}


def make_model(**changes):
    model = LanguageModel(ModelConfig(**SHAPE, **HEADS, **changes), platform="cpu")
    return model, jax.jit(model.init)(jax.random.key(0))


def random_case(experts, k, tokens, seed):
    """Rows, a routing with ties (all of a row's weight on one expert, or none) and kernels."""
    rng = np.random.default_rng(seed)
    favoured = rng.permutation(experts)[: max(k, experts // 2)]  # the others are chosen by no row
    chosen = np.stack([rng.permutation(favoured)[:k] for _ in range(tokens)]).astype(np.int32)
    weights = rng.choice([0.0, 1.0, rng.random()], (tokens, k)).astype(np.float32)
    kernels = (rng.normal(0, 0.3, size).astype(np.float32) for size in [(experts, 16, 24)] * 2 + [(experts, 24, 16)])
    x_MD = rng.normal(size=(tokens, 16)).astype(np.float32)
    return jnp.asarray(x_MD), moe.Routing(chosen, weights, jnp.zeros(())), tuple(map(jnp.asarray, kernels))


@pytest.mark.parametrize("apart", [0, 256], ids=["stack", "apart"])
@pytest.mark.parametrize(
    ("experts", "k", "tokens"),
    [(4, 1, 1), (4, 1, 3), (4, 1, 16), (4, 2, 64), (8, 2, 5), (8, 8, 17), (32, 4, 1), (32, 8, 16), (4, 1, 300)],
)
def test_rows_get_what_the_reference_gives(monkeypatch, experts, k, tokens, apart):
    monkeypatch.setattr(loose_experts, "APART", apart)
    monkeypatch.setattr(loose_experts, "WIDE", 1)
    apply = jax.jit(moe.apply_experts, static_argnums=(3, 4))
    for seed in range(3):
        x_MD, routing, kernels = random_case(experts, k, tokens, seed)
        loose = tuple(LooseKernels.of(kernel, 1) for kernel in kernels)
        assert isinstance(loose[0].kernels, tuple) == bool(apart)
        expected = apply(x_MD, routing, kernels, "reference", False)
        np.testing.assert_allclose(apply(x_MD, routing, loose, "auto", False), expected, atol=1e-5)


def test_the_experts_of_a_single_row_are_added_in_float32():
    x_1D, routing, kernels = random_case(8, 8, 1, 0)
    weights_k = np.random.default_rng(1).random(8).astype(np.float32)
    x_1D, *loose = jax.tree.map(
        lambda array: array.astype(jnp.bfloat16), (x_1D, *(LooseKernels.of(kernel, 1) for kernel in kernels))
    )

    @jax.jit
    def apply(experts_k, weights_k):
        routing = moe.Routing(experts_k[None], weights_k[None], jnp.zeros(()))
        return moe.apply_experts(x_1D, routing, loose, "auto")

    experts_k = routing.experts_Mk[0]
    alone_kD = [np.asarray(apply(experts_k[j : j + 1], np.ones(1, np.float32))[0], np.float64) for j in range(8)]
    summed_1D = apply(experts_k, weights_k)
    assert summed_1D.dtype == jnp.bfloat16
    exact_D = weights_k.astype(np.float64) @ np.stack(alone_kD)
    np.testing.assert_allclose(np.asarray(summed_1D[0], np.float64), exact_D, rtol=2**-8)  # one rounding to 8 bits


@pytest.mark.parametrize("apart", [0, 256], ids=["stack", "apart"])
def test_experts_of_other_devices_add_nothing(monkeypatch, apart):
    monkeypatch.setattr(loose_experts, "APART", apart)
    x_MD, routing, kernels = random_case(8, 3, 11, 0)
    total = 0
    for first in (0, 4):
        own = routing._replace(experts_Mk=routing.experts_Mk - first)
        loose = tuple(LooseKernels.of(kernel[first : first + 4], 1) for kernel in kernels)
        total += moe.apply_experts(x_MD, own, loose, "auto", is_part=True)
    np.testing.assert_allclose(total, moe.apply_experts(x_MD, routing, kernels, "reference"), atol=1e-5)


@pytest.mark.parametrize("experts", [4, 160])
def test_a_mixture_generates_what_its_stack_scores(experts):
    """Prompts of unequal length, then a token of each row; 160 experts of 2 layers are too many to stand apart."""
    model, params = make_model(num_experts=experts, num_experts_per_tok=2, moe_intermediate_size=8)
    laid_out = model.unstack(params)
    assert isinstance(laid_out["layers"][0]["mlp"]["experts"]["up_proj"]["kernel"].kernels, tuple) == (experts == 4)
    tokens_BT = jax.random.randint(jax.random.key(1), (3, 9), 0, 60)
    lengths_B = jnp.array([8, 3, 5])

    @jax.jit
    def generate(params):
        prompts = model.embed(params, tokens_BT[:, :8])
        read, cache = model.read_next(params, prompts, None, model.new_cache(3, 16), lengths_B)
        news = jnp.take_along_axis(tokens_BT, lengths_B[:, None], axis=1)
        hidden, _ = model.read_next(params, model.embed(params, news), lengths_B, cache)
        return model.logits(params, read), model.logits(params, hidden)[:, 0]

    expected = jax.jit(model.apply)(params, tokens_BT)[0]
    read, following = generate(laid_out)
    for row, length in enumerate(lengths_B.tolist()):
        np.testing.assert_allclose(read[row, :length], expected[row, :length], atol=1e-5)
        np.testing.assert_allclose(following[row], expected[row, length], atol=1e-5)


def test_an_untied_head_is_laid_out_as_a_tied_one_is():
    model, params = make_model(tie_word_embeddings=False)
    laid_out = model.unstack(params)
    kernel = laid_out["lm_head"]["kernel"]
    assert isinstance(kernel, TransposedKernel)
    assert kernel.kernel_OI.shape == laid_out["embed"]["embedding"].shape == (60, 32)
    np.testing.assert_array_equal(model.head_kernel(laid_out), model.head_kernel(params))
    hidden = jax.random.normal(jax.random.key(1), (2, 1, 32))
    np.testing.assert_allclose(model.logits(laid_out, hidden), model.logits(params, hidden), atol=1e-6)


@pytest.mark.parametrize("changes", [{"num_experts": 4, "num_experts_per_tok": 1}, {"tie_word_embeddings": False}])
def test_parameters_laid_out_are_as_many_as_before(changes):
    model, params = make_model(**changes)
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (params, model.unstack(params))]
    assert sizes[0] == sizes[1]


def test_a_path_that_was_asked_for_keeps_the_stack():
    config = make_model(num_experts=4, num_experts_per_tok=1)[0].config
    model = LanguageModel(config, ComputeConfig(experts="reference"), platform="cpu")
    kernel = model.unstack(jax.jit(model.init)(jax.random.key(0)))["layers"][1]["mlp"]["experts"]["up_proj"]["kernel"]
    assert kernel.shape == (4, 32, 48)

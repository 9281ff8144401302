"""Log-probabilities from hidden states: pieces of the vocabulary give what the whole of it gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minimind_jax.losses import vocabulary
from minimind_jax.losses.language_model import make_language_model_loss
from minimind_jax.losses.vocabulary import piece_size, token_scores
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.transformer import LanguageModel


def formula(hidden_BTD, kernel_VD, targets_BT):
    logits_BTV = jnp.einsum(
        "BTD,VD->BTV", hidden_BTD, kernel_VD.astype(hidden_BTD.dtype), preferred_element_type=jnp.float32
    )
    log_sums_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    return jnp.take_along_axis(logits_BTV, targets_BT[..., None], -1)[..., 0] - log_sums_BT, log_sums_BT


def scores_and_gradients(function, dtype, vocab=1000):
    """Of 2 x 9 tokens; both scores weigh into the gradient."""
    keys = jax.random.split(jax.random.key(0), 5)
    hidden_BTD = jax.random.normal(keys[0], (2, 9, 32)).astype(dtype)
    kernel_VD = jax.random.normal(keys[1], (vocab, 32))
    targets_BT = jax.random.randint(keys[2], (2, 9), 0, vocab).at[0, :2].set([0, vocab - 1])
    weights = [jax.random.normal(key, (2, 9)) for key in keys[3:]]

    def total(hidden_BTD, kernel_VD):
        scores = function(hidden_BTD, kernel_VD, targets_BT)
        return sum(jnp.sum(weight * score) for weight, score in zip(weights, scores, strict=False)), scores[:2]

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(hidden_BTD, kernel_VD)


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of 128 words."""
    monkeypatch.setattr(vocabulary, "WHOLE_BYTES", 0)
    monkeypatch.setattr(vocabulary, "PIECE_BYTES", 0)


# The gradient of the logits is rounded to bfloat16, 8 bits, before its two products.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1.5e-6), ("bfloat16", 8e-3)])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])  # the gradient of the target's logit is added in two ways
@pytest.mark.parametrize("vocab", [128 * 3, 1000, 64])
def test_pieces_and_whole_follow_the_formula(monkeypatch, dtype, tolerance, backend, vocab):
    function = functools.partial(token_scores, platform=backend)
    whole = scores_and_gradients(function, dtype, vocab)
    monkeypatch.setattr(vocabulary, "WHOLE_BYTES", 0)
    monkeypatch.setattr(vocabulary, "PIECE_BYTES", 0)
    pieces = scores_and_gradients(function, dtype, vocab)
    (_, scores), gradients = scores_and_gradients(formula, dtype, vocab)
    for (_, got_scores), got_gradients in (whole, pieces):
        for got, expected in zip(got_scores, scores, strict=True):
            assert got.dtype == jnp.float32
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=2e-6)
        for got, expected in zip(got_gradients, gradients, strict=True):
            assert got.dtype == expected.dtype
            error = jnp.abs(got.astype(jnp.float32) - expected.astype(jnp.float32)).max() / jnp.abs(expected).max()
            assert error < tolerance


def in_float64(hidden_BTD, kernel_VD, targets_BT, temperature):
    """(log-probabilities, logarithmic sums, entropies) by their definitions."""
    logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, kernel_VD) / temperature
    p_BTV = jnp.exp(logits_BTV) / jnp.sum(jnp.exp(logits_BTV), axis=-1, keepdims=True)
    log_probs_BT = jnp.log(jnp.take_along_axis(p_BTV, targets_BT[..., None], -1)[..., 0])
    return log_probs_BT, jnp.log(jnp.sum(jnp.exp(logits_BTV), axis=-1)), -jnp.sum(p_BTV * jnp.log(p_BTV), axis=-1)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("limit", [2**30, 0], ids=["whole", "pieces"])
def test_temperature_and_entropy_are_their_formulas(monkeypatch, limit, temperature):
    monkeypatch.setattr(vocabulary, "WHOLE_BYTES", limit)
    monkeypatch.setattr(vocabulary, "PIECE_BYTES", limit)
    rng = np.random.default_rng(0)
    hidden_BTD, kernel_VD = rng.standard_normal((2, 9, 32)), 0.5 * rng.standard_normal((1000, 32))
    targets_BT, weights = rng.integers(0, 1000, (2, 9)), rng.standard_normal((3, 2, 9))

    def with_gradients(function):
        def total(*inputs):
            scores = function(*inputs, targets_BT)
            return sum(jnp.sum(weight * score) for weight, score in zip(weights, scores, strict=True)), tuple(scores)

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))

    inputs = jnp.float32(hidden_BTD), jnp.float32(kernel_VD)
    (_, found), gradients = with_gradients(lambda *given: token_scores(*given, "cpu", temperature, True))(*inputs)
    with jax.enable_x64(True):
        exact = with_gradients(lambda *given: in_float64(*given, temperature))
        (_, wanted), wanted_gradients = jax.device_get(exact(hidden_BTD, kernel_VD))
    for got, expected in zip((*found, *gradients), (*wanted, *wanted_gradients), strict=True):
        assert got.dtype == jnp.float32 and expected.dtype == np.float64
        np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())


def test_a_certain_token_has_no_entropy(small_pieces):
    hidden_BTD, kernel_VD = jnp.full((1, 2, 4), 100.0), jnp.zeros((300, 4)).at[7].set(100.0)
    scores, pull = jax.vjp(
        lambda hidden: token_scores(hidden, kernel_VD, jnp.array([[7, 3]]), "cpu", 1.0, True), hidden_BTD
    )
    np.testing.assert_array_equal(scores.entropies_BT, 0)
    assert all(np.isfinite(leaf).all() for leaf in pull(jax.tree.map(jnp.ones_like, scores)))


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_of_a_model_in_pieces(small_pieces, monkeypatch, tied):
    model = LanguageModel(ModelConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                      num_key_value_heads=1, tie_word_embeddings=tied))  # fmt: skip
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 8), 0, 300)
    ones_BT = jnp.ones((2, 8), jnp.int32)
    batch = {"tokens": tokens_BT, "targets": jnp.roll(tokens_BT, -1, 1), "segment_ids": ones_BT,
             "loss_weights": ones_BT, "positions": jnp.cumsum(ones_BT, 1) - 1}  # fmt: skip
    params = model.init(jax.random.key(0))

    def gradient():
        loss_fn = make_language_model_loss(model, z_loss=1e-2)
        return jax.jit(jax.value_and_grad(lambda params: loss_fn(params, batch, None)[0]))(params)

    pieces = gradient()
    monkeypatch.setattr(vocabulary, "WHOLE_BYTES", 2**30)
    for got, expected in zip(jax.tree.leaves(pieces), jax.tree.leaves(gradient()), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6 * float(jnp.abs(expected).max()))


def test_logits_are_whole_where_they_fit():
    assert piece_size(8 * 340, 6400) == 6400
    assert piece_size(32 * 2048, 6400) == 1024
    assert piece_size(8 * 1024, 151936) == 8192
    assert piece_size(2**24, 151936) == 128


def test_the_loss_of_qwen3_fits_in_memory():
    """8 x 1,024 tokens over 151,936 words in bfloat16: the logits alone take 4.6 GiB."""
    shape = jax.ShapeDtypeStruct

    def loss(hidden_BTD, kernel_VD, targets_BT):
        return jnp.sum(token_scores(hidden_BTD, kernel_VD, targets_BT, "cpu").log_probs_BT)

    shapes = (shape((8, 1024, 1024), "bfloat16"), shape((151936, 1024), "float32"), shape((8, 1024), "int32"))
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.6 * 2**30

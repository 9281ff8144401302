"""The loss of a tiny model against its formula in float64 NumPy."""

import jax
import numpy as np
import pytest

from minimind_jax.losses.language_model import make_language_model_loss
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.transformer import LanguageModel

DENSE = LanguageModel(ModelConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                  num_key_value_heads=1, intermediate_size=48))  # fmt: skip
MOE = LanguageModel(ModelConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                num_key_value_heads=1, intermediate_size=48, num_experts=4,
                                router_aux_loss_coef=0.01))  # fmt: skip


def make_batch(rng, rows=3, length=10):
    """Two documents a row, the last two positions of it padding, about a third of the targets not trained."""
    segments = np.tile(np.repeat([1, 2, 0], [5, length - 7, 2]), (rows, 1)).astype(np.int32)
    weights = (rng.random((rows, length)) < 0.7) & (segments > 0)
    return {
        "tokens": rng.integers(0, 50, (rows, length)).astype(np.int32),
        "targets": rng.integers(0, 50, (rows, length)).astype(np.int32),
        "loss_weights": weights.astype(np.float32),
        "positions": np.tile(np.r_[0:5, 0 : length - 7, 0, 0], (rows, 1)).astype(np.int32),
        "segment_ids": segments,
        "target_bytes": rng.integers(0, 5, (rows, length)).astype(np.int32),
    }


def log_softmax64(logits):
    logits = np.asarray(logits, np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


@pytest.mark.parametrize("model", [DENSE, MOE], ids=["dense", "moe"])
def test_sums_and_metrics_follow_the_formula(model):
    batch = make_batch(np.random.default_rng(1))
    params = jax.jit(model.init)(jax.random.key(0))
    numerator, denominator, metrics = jax.jit(make_language_model_loss(model, z_loss=1e-2))(params, batch, None)

    logits, output = jax.jit(model.apply)(params, batch["tokens"], batch["positions"], batch["segment_ids"])
    log_probs, weights = log_softmax64(logits), batch["loss_weights"].astype(np.float64)
    nll = -(weights * np.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]).sum()
    log_z = np.asarray(logits, np.float64)[..., 0] - log_probs[..., 0]
    router = float(output.router_loss) * weights.sum()
    assert (router > 0) == model.config.is_moe
    np.testing.assert_allclose(denominator, weights.sum())
    np.testing.assert_allclose(numerator, nll + 1e-2 * (weights * log_z**2).sum() + router, rtol=1e-6)
    expected = {
        "nll": (nll, weights.sum()),
        "router_loss": (router, weights.sum()),
        "bits_per_byte": (nll / np.log(2), (weights * batch["target_bytes"]).sum()),
    }
    assert metrics.keys() == expected.keys()
    for name, pair in expected.items():
        np.testing.assert_allclose(jax.tree.leaves(metrics[name]), pair, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("model", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("padding", [False, True], ids=["nothing_trained", "all_padding"])
def test_nothing_to_train_on_is_zero_and_never_nan(model, padding):
    batch = make_batch(np.random.default_rng(2))
    batch["loss_weights"] = np.zeros_like(batch["loss_weights"])
    if padding:
        batch["segment_ids"] = np.zeros_like(batch["segment_ids"])
    loss_fn = make_language_model_loss(model, z_loss=1e-2)
    params = jax.jit(model.init)(jax.random.key(0))
    value, grads = jax.jit(jax.value_and_grad(lambda p: loss_fn(p, batch, None)[0]))(params)
    assert value == 0
    for grad in jax.tree.leaves(grads):
        np.testing.assert_array_equal(grad, 0)

"""Losses of policies against their formulas as others write them, in float64, values and gradients; and on a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minimind_jax.losses.policy import (
    correction_weights,
    divergences,
    make_policy_loss,
    policy_losses,
    ratios,
    token_log_probs,
)
from minimind_jax.losses.value import value_losses, values
from minimind_jax.model.config import ComputeConfig, ModelConfig
from minimind_jax.model.heads import init_head
from minimind_jax.model.transformer import LanguageModel

CONFIG = ModelConfig(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.2,
)  # fmt: skip
MODEL = LanguageModel(CONFIG, ComputeConfig(dtype="float32", scan_unroll=1))
LOSSES = {
    "clip": {},
    "asymmetric": {"epsilon_low": 0.1, "epsilon_high": 0.28},
    "capped": {"cap": 4.0},
    "dual": {"dual_clip": 3.0},
    "cispo": {"loss": "cispo", "cap": 5.0},
    "sapo": {"loss": "sapo"},
}


def drawn(seed=0, rows=8, columns=12):
    """Log-probabilities near and far from the old ones, advantages of both signs and 0, rows of one token and none."""
    rng = np.random.default_rng(seed)
    log_probs = -rng.gamma(2.0, 1.0, (rows, columns))
    old = log_probs + rng.standard_normal((rows, columns)) * rng.choice([0.01, 0.3, 2.0], (rows, 1))
    old[0, :3] = log_probs[0, :3] + [9.0, -9.0, 0.0]  # ratios far outside
    advantages = np.broadcast_to(rng.standard_normal((rows, 1)) * 2, old.shape).copy()
    advantages[3] = 0
    mask = (rng.random((rows, columns)) < 0.7).astype(np.float64)
    mask[0, :3], mask[1], mask[2] = 1, 0, 0
    mask[2, 5] = 1
    return log_probs, old, advantages, mask


def expected_ratios(log_probs, old, mask, level, fixed):
    """fixed: the log-probabilities that count as constants."""
    if level == "token":
        return np.exp(log_probs - old)
    count = np.maximum(mask.sum(1, keepdims=True), 1)
    if level == "sequence":
        return np.exp(((log_probs - old) * mask).sum(1, keepdims=True) / count) + 0 * old
    return np.exp(((fixed - old) * mask).sum(1, keepdims=True) / count) * np.exp(log_probs - fixed)


def expected_losses(log_probs, old, advantages, mask, level, fixed, *, loss="clip", cap=0, dual_clip=0, **epsilons):
    """As verl and TRL write them."""
    r = expected_ratios(log_probs, old, mask, level, fixed)
    if loss == "sapo":
        tau = np.where(advantages > 0, 1.0, 1.05)
        return -advantages * 4 / tau / (1 + np.exp(-tau * (r - 1)))
    if loss == "cispo":
        return -advantages * np.minimum(expected_ratios(fixed, old, mask, level, fixed), cap) * log_probs
    low, high = epsilons.get("epsilon_low", 0.2), epsilons.get("epsilon_high", 0.2)
    capped = np.minimum(r, cap) if cap else r
    losses = np.maximum(-advantages * capped, -advantages * np.clip(r, 1 - low, 1 + high))
    if dual_clip:
        losses = np.where(advantages < 0, np.minimum(losses, -advantages * dual_clip), losses)
    return losses


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_and_its_gradient_are_the_formula(name, level):
    log_probs, old, advantages, mask = drawn()
    weights = mask * np.random.default_rng(1).random(mask.shape)

    def ours(log_probs, old, advantages, mask, weights):
        found = policy_losses(log_probs, ratios(log_probs, old, mask, level), advantages, **LOSSES[name])
        return jnp.sum(weights * found), found

    def theirs(log_probs, fixed):
        return expected_losses(log_probs, old, advantages, mask, level, fixed, **LOSSES[name])

    given = map(jnp.float32, (log_probs, old, advantages, mask, weights))
    (_, found), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(*given)
    np.testing.assert_allclose(found * mask, theirs(log_probs, log_probs) * mask, rtol=1e-5, atol=1e-6)
    step = 1e-6
    for row, column in np.ndindex(mask.shape):
        moved = np.zeros(mask.shape)
        moved[row, column] = step
        slope = (weights * (theirs(log_probs + moved, log_probs) - theirs(log_probs - moved, log_probs))).sum()
        assert float(gradient[row, column]) == pytest.approx(slope / (2 * step), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_divergences_are_their_formulas(estimator):
    log_probs, reference, *_ = drawn(2)
    d = reference - log_probs
    expected = {"k1": -d, "k2": d**2 / 2, "k3": np.exp(d) - d - 1}[estimator]
    found = divergences(jnp.float32(log_probs), jnp.float32(reference), estimator)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    slope = {"k1": d * 0 + 1, "k2": -d, "k3": 1 - np.exp(d)}[estimator]
    gradient = jax.grad(lambda x: divergences(x, jnp.float32(reference), estimator).sum())(jnp.float32(log_probs))
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-6)


def test_corrections_are_truncated_weights_of_tokens_or_sequences():
    old, sampler, _, mask = drawn(3)
    w = np.exp((old - sampler) * mask)
    given = [*map(jnp.float32, (old, sampler, mask))]
    np.testing.assert_allclose(correction_weights(*given, "none", 2.0), w, rtol=1e-4)
    np.testing.assert_allclose(correction_weights(*given, "token", 2.0), np.minimum(w, 2), rtol=1e-4)
    whole = np.exp(((old - sampler) * mask).sum(1, keepdims=True)) + 0 * old
    np.testing.assert_allclose(correction_weights(*given, "sequence", 2.0), np.minimum(whole, 2), rtol=1e-4)


def test_a_value_loss_is_the_larger_of_two():
    foreseen, old, returns = np.random.default_rng(0).standard_normal((3, 40))
    near = np.clip(foreseen, old - 0.2, old + 0.2)
    expected = np.maximum((foreseen - returns) ** 2, (near - returns) ** 2) / 2
    given = map(jnp.float32, (foreseen, old, returns))
    found, clipped = value_losses(*given, 0.2)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_array_equal(clipped, (near - returns) ** 2 > (foreseen - returns) ** 2)
    found, clipped = value_losses(*map(jnp.float32, (foreseen, old, returns)), 0.0)
    np.testing.assert_allclose(found, (foreseen - returns) ** 2 / 2, rtol=1e-5)
    assert not clipped.any()


def batch_of(tokens, mask, lengths, **more):
    """Rows of episodes; columns of `mask` are those of the targets."""
    tokens = np.asarray(tokens, np.int32)
    following = np.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    segments = (np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None]).astype(np.int32)
    return {
        "tokens": tokens, "targets": following, "segment_ids": segments, "lengths": np.asarray(lengths, np.int32),
        "mask": np.asarray(mask, np.float32), **{name: np.asarray(x, np.float32) for name, x in more.items()},
    }  # fmt: skip


def episodes(seed=0, rows=8, columns=12, **more):
    """A batch in which all optional parts are present, with rows of no and of one trained token."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(6, columns + 1, rows)
    mask = (rng.random((rows, columns)) < 0.6) & (np.arange(columns) < lengths[:, None] - 1)
    mask[1], mask[2] = False, np.arange(columns) == 3
    logs = {
        name: -rng.gamma(2.0, 1.0, mask.shape) * mask
        for name in ("old_log_probs", "sampler_log_probs", "reference_log_probs")
    }
    drawn = {name: rng.standard_normal(mask.shape) * mask for name in ("advantages", "returns", "old_values")}
    weights = {name: rng.random(mask.shape) * mask for name in ("weights", "kl_weights", "value_weights")}
    return batch_of(rng.integers(0, 50, mask.shape), mask, lengths, **logs | drawn | weights | more)


@functools.cache
def parameters():
    policy, critic = (jax.jit(MODEL.init)(jax.random.key(seed)) for seed in (0, 1))
    return {**policy, "critic": {**critic, **init_head(jax.random.key(2), 32, 1)}}


def test_the_loss_is_the_sum_of_its_weighted_parts():
    batch, params = episodes(), parameters()
    options = {"epsilon_high": 0.3, "kl_estimator": "k3", "entropy": 0.02, "temperature": 1.3, "correction": "token"}
    loss_fn = jax.jit(make_policy_loss(MODEL, **options, critic=MODEL))
    numerator, denominator, metrics = loss_fn(params, batch, None)
    hidden = MODEL.read_batch(params, batch).hidden_BTD
    logits = np.asarray(MODEL.logits(params, hidden), np.float64) / 1.3
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    log_probs = np.take_along_axis(log_softmax, batch["targets"][..., None], -1)[..., 0]
    entropies = -(np.exp(log_softmax) * log_softmax).sum(-1)
    critic = params["critic"]
    foreseen = np.asarray(MODEL.read_batch(critic, batch).hidden_BTD) @ np.asarray(critic["score"]["kernel"])[..., 0]
    b = {name: x.astype(np.float64) for name, x in batch.items()}
    losses = expected_losses(
        log_probs, b["old_log_probs"], b["advantages"], b["mask"], "token", log_probs, epsilon_high=0.3
    )
    losses *= np.minimum(np.exp(b["old_log_probs"] - b["sampler_log_probs"]), 2)
    d = b["reference_log_probs"] - log_probs
    near = np.clip(foreseen, b["old_values"] - 0.2, b["old_values"] + 0.2)
    errors = np.maximum((foreseen - b["returns"]) ** 2, (near - b["returns"]) ** 2) / 2
    expected = (b["weights"] * (losses - 0.02 * entropies)).sum()
    expected += (b["kl_weights"] * (np.exp(d) - d - 1)).sum() + (b["value_weights"] * errors).sum()
    assert float(numerator) == pytest.approx(expected, rel=1e-5)
    assert float(denominator) == len(b["mask"])

    def mean(x):
        return pytest.approx((x * b["mask"]).sum() / b["mask"].sum(), rel=1e-5)

    found = {name: float(metric.value()) for name, metric in metrics.items()}
    assert found["loss/policy_avg"] == mean(losses)
    assert found["loss/value_avg"] == mean(errors)
    assert found["kl"] == mean(np.exp(d) - d - 1)
    assert found["entropy"] == mean(entropies)
    assert found["approx_kl"] == mean((log_probs - b["old_log_probs"]) ** 2 / 2)
    assert found["val/ratio"] == mean(np.exp(log_probs - b["old_log_probs"]))
    assert found["sampling/sampling_logp_difference/mean"] == mean(abs(b["old_log_probs"] - b["sampler_log_probs"]))
    assert found["tokens"] == b["mask"].sum()


def test_log_probs_and_values_do_not_see_what_follows_or_pads():
    batch, params = episodes(), parameters()
    longer = {name: np.pad(x, ((0, 0), (0, 7)), constant_values=0) if x.ndim == 2 else x for name, x in batch.items()}
    longer["tokens"][longer["segment_ids"] == 0] = 9
    for function in (lambda b: token_log_probs(MODEL, params, b)[0], lambda b: values(MODEL, params["critic"], b)):
        short, long = function(batch), function(longer)[:, : batch["mask"].shape[1]]
        held = batch["mask"] > 0
        np.testing.assert_allclose(short[held], long[held], atol=1e-5)

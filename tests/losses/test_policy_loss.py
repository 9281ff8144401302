"""Losses of policies against their formulas as others write them, in float64, values and gradients; and on a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from policy_rows import MODEL, OPTIONS, episodes, init_policy_and_critic, step_on, with_more_columns

from minimind_jax.losses.policy import (
    correction_weights,
    divergences,
    policy_losses,
    policy_sum,
    ratios,
)
from minimind_jax.losses.value import value_losses, values
from minimind_jax.losses.vocabulary import target_scores
from minimind_jax.training.step import NOTHING

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
def test_each_loss_and_its_gradient_are_the_formula(in_float64, name, level):
    log_probs, old, advantages, mask = drawn()
    weights = mask * np.random.default_rng(1).random(mask.shape)

    def ours(log_probs, old, advantages, mask, weights):
        found = policy_losses(log_probs, ratios(log_probs, old, mask, level), advantages, **LOSSES[name])
        return jnp.sum(weights * found), found

    def theirs(log_probs, fixed):
        return expected_losses(log_probs, old, advantages, mask, level, fixed, **LOSSES[name])

    given = map(jnp.float32, (log_probs, old, advantages, mask, weights))
    (_, found), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(*given)
    np.testing.assert_allclose(found * mask, theirs(log_probs, log_probs) * mask, rtol=1e-9, atol=1e-9)
    step = 1e-6
    for row, column in np.ndindex(mask.shape):
        moved = np.zeros(mask.shape)
        moved[row, column] = step
        slope = (weights * (theirs(log_probs + moved, log_probs) - theirs(log_probs - moved, log_probs))).sum()
        assert float(gradient[row, column]) == pytest.approx(slope / (2 * step), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
def test_without_old_log_probabilities_the_policy_is_that_of_the_rollout(in_float64, level):
    log_probs, sampler, advantages, mask = (jnp.float32(array) for array in drawn())
    batch = {"mask": mask, "weights": mask, "advantages": advantages, "sampler_log_probs": sampler}
    given = {"epsilon_low": 0.0, "epsilon_high": 0.0, "level": level}

    @functools.partial(jax.grad, has_aux=True)
    def gradient(log_probs, batch):
        total, metrics = policy_sum(log_probs, log_probs, batch, **given)
        return total, metrics["val/ratio"].value()

    without, ratio = jax.jit(gradient)(log_probs, batch)
    known, _ = jax.jit(gradient)(log_probs, {**batch, "old_log_probs": log_probs})
    assert ratio == 1
    np.testing.assert_allclose(without, known, rtol=1e-9)
    counts = mask.sum(1, keepdims=True)
    expected = (advantages * mask).sum(1, keepdims=True) / jnp.maximum(counts, 1) if level == "sequence" else advantages
    np.testing.assert_allclose(without, -expected * mask, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_divergences_are_their_formulas(in_float64, estimator):
    log_probs, reference, *_ = drawn(2)
    d = reference - log_probs
    expected = {"k1": -d, "k2": d**2 / 2, "k3": np.exp(d) - d - 1}[estimator]
    found = divergences(jnp.float32(log_probs), jnp.float32(reference), estimator)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    slope = {"k1": d * 0 + 1, "k2": -d, "k3": 1 - np.exp(d)}[estimator]
    gradient = jax.grad(lambda x: divergences(x, jnp.float32(reference), estimator).sum())(jnp.float32(log_probs))
    np.testing.assert_allclose(gradient, slope, rtol=1e-9, atol=1e-9)


def test_corrections_are_truncated_weights_of_tokens_or_sequences(in_float64):
    old, sampler, _, mask = drawn(3)
    w = np.exp((old - sampler) * mask)
    given = [*map(jnp.float32, (old, sampler, mask))]
    np.testing.assert_allclose(correction_weights(*given, "none", 2.0), w, rtol=1e-9)
    np.testing.assert_allclose(correction_weights(*given, "token", 2.0), np.minimum(w, 2), rtol=1e-9)
    whole = np.exp(((old - sampler) * mask).sum(1, keepdims=True)) + 0 * old
    np.testing.assert_allclose(correction_weights(*given, "sequence", 2.0), np.minimum(whole, 2), rtol=1e-9)


def test_a_value_loss_is_the_larger_of_two(in_float64):
    foreseen, old, returns = np.random.default_rng(0).standard_normal((3, 40))
    near = np.clip(foreseen, old - 0.2, old + 0.2)
    expected = np.maximum((foreseen - returns) ** 2, (near - returns) ** 2) / 2
    given = map(jnp.float32, (foreseen, old, returns))
    found, clipped = value_losses(*given, 0.2)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_array_equal(clipped, (near - returns) ** 2 > (foreseen - returns) ** 2)
    found, clipped = value_losses(*map(jnp.float32, (foreseen, old, returns)), 0.0)
    np.testing.assert_allclose(found, (foreseen - returns) ** 2 / 2, rtol=1e-9)
    assert not clipped.any()


@functools.cache
def parameters():
    return init_policy_and_critic()


def test_the_loss_is_the_sum_of_its_weighted_parts():
    batch, params = episodes(), parameters()
    found, _ = step_on(batch, **OPTIONS)
    logits, hidden = jax.jit(lambda b: (MODEL.apply(params, b)[0], MODEL.apply(params["critic"], b)[1].hidden_BTD))(
        batch["tokens"]
    )
    logits = np.asarray(logits, np.float64) / OPTIONS["temperature"]
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    log_probs = np.take_along_axis(log_softmax, batch["targets"][..., None], -1)[..., 0]
    entropies = -(np.exp(log_softmax) * log_softmax).sum(-1)
    foreseen = np.asarray(hidden, np.float64) @ np.asarray(params["critic"]["score"]["kernel"])[..., 0]
    b = {name: x.astype(np.float64) for name, x in batch.items()}
    ratios = expected_ratios(log_probs, b["old_log_probs"], b["mask"], "sequence", log_probs)
    losses = expected_losses(
        log_probs, b["old_log_probs"], b["advantages"], b["mask"], "sequence", log_probs, epsilon_high=0.3
    )
    apart = (b["old_log_probs"] - b["sampler_log_probs"]) * b["mask"]
    losses *= np.minimum(np.exp(apart.sum(1, keepdims=True)), 2)
    d = b["reference_log_probs"] - log_probs
    k3 = np.exp(d) - d - 1
    near = np.clip(foreseen, b["old_values"] - 0.2, b["old_values"] + 0.2)
    errors = np.maximum((foreseen - b["returns"]) ** 2, (near - b["returns"]) ** 2) / 2
    expected = (b["weights"] * (losses - 0.02 * entropies) + b["kl_weights"] * k3 + b["value_weights"] * errors).sum()
    assert found["loss"] == pytest.approx(expected / len(b["mask"]), rel=1e-5)

    def mean(x):
        return pytest.approx((x * b["mask"]).sum() / b["mask"].sum(), rel=1e-5)

    assert found["loss/policy_avg"] == mean(losses)
    assert found["loss/value_avg"] == mean(errors)
    assert found["kl"] == mean(k3)
    assert found["entropy"] == mean(entropies)
    assert found["approx_kl"] == mean((log_probs - b["old_log_probs"]) ** 2 / 2)
    assert found["val/ratio"] == mean(ratios)
    assert found["sampling/sampling_logp_difference/mean"] == mean(abs(apart))
    assert found["sampling/sampling_logp_difference/max"] == pytest.approx(abs(apart).max(), rel=1e-5)
    assert found["tokens"] == b["mask"].sum()


def test_log_probs_and_values_do_not_see_what_follows_or_pads():
    batch, params = episodes(), parameters()

    @jax.jit
    def found(batch):
        return target_scores(MODEL, params, batch)[0].log_probs_BT, values(MODEL, params["critic"], batch)[0]

    held = batch["mask"] > 0
    for short, long in zip(found(batch), found(with_more_columns(batch, 7)), strict=True):
        np.testing.assert_allclose(short[held], long[:, : held.shape[1]][held], atol=1e-5)


def test_padding_and_micro_batches_change_nothing():
    batch = episodes()
    metrics, gradients = step_on(batch, **OPTIONS)
    other_metrics, other_gradients = step_on(with_more_columns(batch, 5), parts=4, **OPTIONS)
    assert metrics == pytest.approx(other_metrics, rel=1e-5, abs=1e-6)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(other_gradients), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(one).max()))


def test_columns_in_front_of_what_is_trained_may_be_left_out():
    batch, read = episodes(), ("tokens", "segment_ids", "lengths")
    prompt = np.arange(batch["mask"].shape[1]) < 4
    batch |= {name: np.where(prompt, 0, x) for name, x in batch.items() if name not in read}
    metrics, gradients = step_on(batch, **OPTIONS)
    short = {name: x if name in read else x[:, 4:] for name, x in batch.items()}
    other_metrics, other_gradients = step_on(short, parts=2, **OPTIONS)
    assert metrics == pytest.approx(other_metrics, rel=1e-5, abs=1e-6)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(other_gradients), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(one).max()))


@pytest.mark.parametrize(
    ("name", "level"), [*((name, "token") for name in LOSSES), ("clip", "sequence"), ("cispo", "sequence_token")]
)
def test_gradients_are_finite_wherever_the_policy_has_gone(name, level):
    """Rows without a token, ratios of e^+-200, infinities where nothing is trained."""
    log_probs, old, advantages, mask = drawn()
    old[0, :3] += [200, -200, 0]
    old[3:, 4] += 300
    reference, sampler = old - 500 * (mask > 0), old + 500 * (mask > 0)
    nowhere = np.where(mask > 0, 0, -np.inf)
    batch = {
        "mask": mask, "weights": mask, "kl_weights": mask, "advantages": advantages, "old_log_probs": old + nowhere,
        "reference_log_probs": reference + nowhere, "sampler_log_probs": sampler + nowhere,
    }  # fmt: skip
    batch = {key: jnp.float32(value) for key, value in batch.items()}
    options = {"kl_estimator": "k3", "correction": "token", "entropy": 0.1, "level": level, **LOSSES[name]}

    def total(log_probs, entropies):
        return policy_sum(log_probs, entropies, batch, **options)

    given = jnp.float32(log_probs), jnp.float32(-log_probs)
    (value, metrics), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(*given)
    assert np.isfinite(value)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert not any(np.asarray(gradient)[mask == 0].any() for gradient in gradients)
    assert all(np.isfinite(metric.value()) for metric in metrics.values())


@pytest.mark.parametrize("masks", [(), ("mask",)])
def test_a_batch_without_a_trained_token_has_no_gradient(masks):
    batch = episodes()
    for name in ("weights", "kl_weights", "value_weights", *masks):
        batch[name] = 0 * batch[name]
    metrics, gradients = step_on(batch, **OPTIONS)
    assert (metrics["loss"], metrics["grad_norm"], metrics["tokens"], metrics["skipped"]) == (0, 0, 0, NOTHING)
    assert not any(gradient.any() for gradient in jax.tree.leaves(gradients))

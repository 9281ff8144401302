"""Losses of pairs against their formulas in float64, and on packed rows against each answer by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minimind_jax.losses.preference import Answers, answer_log_probs, make_preference_loss, pair_losses
from minimind_jax.losses.reward import bradley_terry, make_reward_loss
from minimind_jax.model.config import ComputeConfig, ModelConfig
from minimind_jax.model.heads import init_head
from minimind_jax.model.transformer import LanguageModel

CONFIG = ModelConfig(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.2,
)  # fmt: skip
MODEL = LanguageModel(CONFIG, ComputeConfig(dtype="float32", scan_unroll=1))
# Compiled whole: each of their operations alone would be a program of its own.
init, apply = map(jax.jit, (MODEL.init, MODEL.apply))
log_probs_of_answers = jax.jit(answer_log_probs, static_argnums=0)


def answers(seed=0, pairs=64):
    """Policy and reference: from near to far apart, ties and answers without tokens among them."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 60, (2, pairs)).astype(np.float64)
    counts[:, :3] = [[0, 5, 0], [4, 0, 0]]
    policy, reference = (-rng.gamma(2.0, 1.0, (2, pairs)) * np.maximum(counts, 0.1) for _ in range(2))
    policy[:, 3], reference[:, 3] = -7.0, -7.0  # a tie
    policy[:, 4], reference[:, 4] = [-2000, -1], [-1, -2000]  # as far apart as can be
    policy[:, 5], reference[:, 5] = [-1, -2000], [-2000, -1]
    policy[:, 6] = -1e-9  # certain answers
    return policy, reference, counts


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def expected(name, policy, reference, counts, beta, e, gamma):
    """The formulas of the module's docstring, float64."""
    n = np.maximum(counts, 1)
    delta = policy - reference
    s = beta * (delta[0] - delta[1])
    mean = policy / n
    if name == "sigmoid":
        return (1 - e) * -log_sigmoid(s) - e * log_sigmoid(-s)
    if name == "robust":
        return ((1 - e) * -log_sigmoid(s) + e * log_sigmoid(-s)) / (1 - 2 * e)
    if name == "hinge":
        return np.maximum(0, 1 - s)
    if name == "ipo":
        return ((delta / n)[0] - (delta / n)[1] - 1 / (2 * beta)) ** 2
    if name == "sigmoid_norm":
        s = beta * ((delta / n)[0] - (delta / n)[1])
        return (1 - e) * -log_sigmoid(s) - e * log_sigmoid(-s)
    if name == "simpo":
        s = beta * (mean[0] - mean[1]) - gamma
        return (1 - e) * -log_sigmoid(s) - e * log_sigmoid(-s)
    mean = np.minimum(mean, -1e-7)
    odds = mean - np.log(-np.expm1(mean))
    return -beta * log_sigmoid(odds[0] - odds[1])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "simpo", "orpo"])
def test_each_loss_is_its_formula(name, smoothing):
    policy, reference, counts = answers()
    options = {"beta": 0.3, "label_smoothing": smoothing, "gamma": 0.7}
    both = (Answers(*map(np.float32, (*sums, *counts))) for sums in (policy, reference))
    found, chosen, rejected = jax.jit(functools.partial(pair_losses, name, **options))(*both)
    wanted = expected(name, policy, reference, counts, 0.3, smoothing, 0.7)
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-6)
    base = policy / np.maximum(counts, 1) if name in ("simpo", "orpo") else policy - reference
    np.testing.assert_allclose([chosen, rejected], 0.3 * base, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "simpo", "orpo"])
def test_gradients_are_finite_at_extremes(name):
    policy, reference, counts = (np.float32(array) for array in answers())

    def total(policy):
        return jnp.sum(pair_losses(name, Answers(*policy, *counts), Answers(*reference, *counts), beta=0.3)[0])

    assert np.isfinite(jax.jit(jax.grad(total))(policy)).all()


def packed():
    """Two rows: pairs of answers of (5, 7) and (4, 4) tokens, and of (9, 6); padding behind them; targets from where
    the prompt of two tokens ends."""
    rng = np.random.default_rng(3)
    rows, T = [[(5, 7), (4, 4)], [(9, 6)]], 24
    batch = {name: np.zeros((2, T), np.int32) for name in ("tokens", "targets", "positions", "segment_ids")}
    batch["loss_weights"] = np.zeros((2, T), np.float32)
    alone = []
    for row, pairs in enumerate(rows):
        place, segment = 0, 0
        for pair in pairs:
            sides = []
            for length in pair:
                ids = rng.integers(1, 50, length)
                here, segment = slice(place, place + length), segment + 1
                batch["tokens"][row, here], batch["positions"][row, here] = ids, np.arange(length)
                batch["segment_ids"][row, here] = segment
                batch["targets"][row, place : place + length - 1] = ids[1:]
                batch["loss_weights"][row, place + 1 : place + length - 1] = 1
                place += length
                sides.append(ids)
            alone.append(sides)
    return batch, alone


@pytest.fixture(scope="module")
def params():
    return init(jax.random.key(0)), init(jax.random.key(1))


def log_prob(params, ids):
    """Of the tokens after the prompt of two, one answer by itself."""
    logits = np.asarray(apply(params, ids[None])[0][0], np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return log_probs[np.arange(1, len(ids) - 1), ids[2:]].sum()


def test_packed_answers_are_those_by_themselves(params):
    batch, alone = packed()
    found, _ = log_probs_of_answers(MODEL, params[0], batch)
    is_pair = np.asarray(found.chosen_count) > 0
    assert is_pair.sum() == 3
    for side, name in enumerate(("chosen", "rejected")):
        wanted = [log_prob(params[0], pair[side]) for pair in alone]
        np.testing.assert_allclose(np.asarray(getattr(found, name))[is_pair], wanted, rtol=1e-5)
        counts = np.asarray(getattr(found, f"{name}_count"))[is_pair]
        np.testing.assert_array_equal(counts, [len(pair[side]) - 2 for pair in alone])


def test_the_loss_is_the_mean_over_pairs(params):
    batch, alone = packed()
    loss_fn = make_preference_loss(
        MODEL, "sigmoid", beta=0.5, sft_weight=0.25, reference=lambda p: (MODEL, p["reference"])
    )
    numerator, pairs, metrics = jax.jit(loss_fn)({**params[0], "reference": params[1]}, batch, None)
    assert float(pairs) == 3
    own, other = (np.array([[log_prob(p, ids) for ids in pair] for pair in alone]) for p in params)
    counts = np.array([[len(ids) - 2 for ids in pair] for pair in alone])
    rewards = 0.5 * (own - other)
    wanted = -log_sigmoid(rewards[:, 0] - rewards[:, 1]) - 0.25 * own[:, 0] / counts[:, 0]
    np.testing.assert_allclose(numerator, wanted.sum(), rtol=1e-5)
    means = {name: float(metric.value()) for name, metric in metrics.items()}
    np.testing.assert_allclose(means["rewards/chosen"], rewards[:, 0].mean(), rtol=1e-4)
    np.testing.assert_allclose(means["rewards/margins"], (rewards[:, 0] - rewards[:, 1]).mean(), rtol=1e-4)
    assert means["rewards/accuracies"] == pytest.approx((rewards[:, 0] > rewards[:, 1]).mean())
    assert means["tokens"] == counts.sum()


def test_the_reference_gets_no_gradient(params):
    batch, _ = packed()
    loss_fn = make_preference_loss(MODEL, "sigmoid", beta=0.5, reference=lambda p: (MODEL, p["reference"]))
    grads = jax.jit(jax.grad(lambda p: loss_fn(p, batch, None)[0]))({**params[0], "reference": params[1]})
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads["reference"]))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(grads["layers"]))


def test_given_log_probabilities_replace_the_reference(params):
    batch, _ = packed()
    both = {**params[0], "reference": params[1]}
    with_model = make_preference_loss(MODEL, "sigmoid", beta=0.5, reference=lambda p: (MODEL, p["reference"]))
    other, _ = log_probs_of_answers(MODEL, params[1], batch)
    sums_BP2 = np.stack([other.chosen, other.rejected], axis=-1)
    given = make_preference_loss(MODEL, "sigmoid", beta=0.5)
    found = jax.jit(given)(params[0], {**batch, "reference_log_probs": sums_BP2}, None)[0]
    np.testing.assert_allclose(found, jax.jit(with_model)(both, batch, None)[0], rtol=1e-6)


def test_a_batch_of_padding_has_no_loss(params):
    batch = {name: np.zeros_like(array) for name, array in packed()[0].items()}
    loss_fn = make_preference_loss(
        MODEL, "sigmoid", beta=0.5, sft_weight=1, reference=lambda p: (MODEL, p["reference"])
    )
    numerator, pairs, _ = jax.jit(loss_fn)({**params[0], "reference": params[1]}, batch, None)
    assert float(numerator) == float(pairs) == 0


# Reward models --------------------------------------------------------------------------------------------------------


def test_bradley_terry_is_its_formula():
    rng = np.random.default_rng(0)
    chosen, rejected, margin = rng.standard_normal((3, 50)) * 5
    chosen[:2], rejected[:2] = [300, -300], [-300, 300]
    found = jax.jit(functools.partial(bradley_terry, centring=0.01))(*map(np.float32, (chosen, rejected, margin)))
    wanted = -log_sigmoid(chosen - rejected - margin) + 0.01 * (chosen + rejected) ** 2
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_scores_are_those_of_the_last_tokens(params):
    batch, alone = packed()
    head = init_head(jax.random.key(5), 32, 1)
    batch["margins"] = np.zeros((2, 12), np.float32)
    batch["margins"][0, 2] = 0.5  # of the second pair of the first row
    numerator, pairs, metrics = jax.jit(make_reward_loss(MODEL, centring=0.01))({**params[0], **head}, batch, None)

    def score(ids):
        last_D = np.asarray(apply(params[0], ids[None])[1].hidden_BTD)[0, -1]
        return (last_D @ np.asarray(head["score"]["kernel"]))[0]

    scores = np.array([[score(ids) for ids in pair] for pair in alone])
    apart = scores[:, 0] - scores[:, 1] - [0, 0.5, 0]
    wanted = -log_sigmoid(apart) + 0.01 * scores.sum(axis=1) ** 2
    assert float(pairs) == 3
    np.testing.assert_allclose(numerator, wanted.sum(), rtol=1e-5)
    assert float(metrics["accuracy"].total) == (scores[:, 0] > scores[:, 1]).sum()
    for name, value in (("min", scores.min()), ("max", scores.max())):
        np.testing.assert_allclose(metrics[f"{name}_reward"].value(), value, rtol=1e-5)

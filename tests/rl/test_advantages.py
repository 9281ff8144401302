"""From rewards to advantages and weights: by their formulas, and where nothing or everything is the same."""

import numpy as np
import pytest

from minimind_jax.rl.advantages import gae, group_advantages, next_beta, reduction_weights, whiten

REWARDS = np.array([1.0, 0.0, 0.0, 3.0, 3.0, 3.0, -1.0, 2.0])
GROUPS = np.array([7, 7, 7, 2, 2, 2, 5, 5])


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("scale", ["none", "group", "batch"])
@pytest.mark.parametrize("kind", ["group", "leave_one_out", "batch"])
def test_advantages_are_rewards_less_a_baseline_over_a_spread(kind, scale, ddof):
    expected = []
    for i, (reward, group) in enumerate(zip(REWARDS, GROUPS, strict=True)):
        own = [r for r, g in zip(REWARDS, GROUPS, strict=True) if g == group]
        others = [r for j, (r, g) in enumerate(zip(REWARDS, GROUPS, strict=True)) if g == group and j != i]
        baseline = np.mean({"group": own, "leave_one_out": others, "batch": REWARDS}[kind])
        spread = {"none": 1, "group": np.std(own, ddof=ddof) + 1e-4, "batch": np.std(REWARDS, ddof=ddof) + 1e-4}[scale]
        expected.append((reward - baseline) / spread)
    found = group_advantages(REWARDS, GROUPS, kind=kind, scale=scale, ddof=ddof)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_the_order_of_episodes_does_not_matter():
    order = np.random.default_rng(0).permutation(len(REWARDS))
    options = {"kind": "group", "scale": "group"}
    whole = group_advantages(REWARDS, GROUPS, **options)
    np.testing.assert_allclose(group_advantages(REWARDS[order], GROUPS[order], **options), whole[order], rtol=1e-12)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("scale", ["none", "group", "batch"])
@pytest.mark.parametrize("kind", ["group", "leave_one_out", "batch"])
@pytest.mark.parametrize("rewards", [[0.1] * 6, [0.7]], ids=["equal", "alone"])
def test_rewards_that_say_nothing_have_no_advantage(rewards, kind, scale, ddof):
    found = group_advantages(np.array(rewards), np.zeros(len(rewards), int), kind=kind, scale=scale, ddof=ddof)
    np.testing.assert_allclose(found, np.zeros(len(rewards)), atol=1e-10)


def by_recursion(rewards, values, gamma, lam):
    """GAE of one episode without gaps: the sum of the discounted errors of temporal differences."""
    following = np.append(values, 0)[1:]
    errors = [r + gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
    return [sum((gamma * lam) ** k * e for k, e in enumerate(errors[t:])) for t in range(len(errors))]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.97, 0.0)])
def test_gae_passes_over_what_others_wrote(gamma, lam):
    rng = np.random.default_rng(0)
    mask = np.array([[0, 1, 1, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0, 0], [0] * 8, [1] * 8])
    rewards, values = rng.standard_normal((2, *mask.shape))
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row, trained in enumerate(mask > 0):
        expected = by_recursion(rewards[row][trained], values[row][trained], gamma, lam)
        np.testing.assert_allclose(advantages[row][trained], expected, rtol=1e-12)
        np.testing.assert_allclose(returns[row][trained], expected + values[row][trained], rtol=1e-12)
    assert not advantages[mask == 0].any()
    assert not returns[mask == 0].any()


@pytest.mark.parametrize("ddof", [0, 1])
def test_whitening_is_of_trained_tokens(ddof):
    rng = np.random.default_rng(0)
    x, mask = rng.standard_normal((3, 5)) * 4 + 2, rng.random((3, 5)) < 0.6
    white = whiten(x, mask, ddof)
    assert abs(white[mask].mean()) < 1e-12
    assert white[mask].std(ddof=ddof) == pytest.approx(1, abs=1e-7)
    assert not white[~mask].any()
    np.testing.assert_allclose(whiten(x, mask, ddof, scale=False)[mask], x[mask] - x[mask].mean(), rtol=1e-12)


@pytest.mark.parametrize("count", [0, 1])
def test_whitening_of_nothing_or_one_is_0(count):
    mask = np.zeros((2, 3))
    mask[0, :count] = 1
    assert not whiten(np.full((2, 3), 5.0), mask).any()


MASK = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]])
PROMPTS = np.array([3, 1, 1, 3])  # of the rows; in another order than they are drawn in


@pytest.mark.parametrize("kept", [[1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]])
def test_reductions_are_means(kept):
    losses, kept = np.random.default_rng(0).standard_normal(MASK.shape), np.array(kept, bool)
    rows = [(row[m > 0], k) for row, m, k in zip(losses, MASK, kept, strict=True)]
    left = [row for row, k in rows if k]
    tokens = np.concatenate([*left, []])
    prompts = [np.concatenate([row for (row, k), own in zip(rows, PROMPTS, strict=True) if k and own == prompt])
               for prompt in sorted(set(PROMPTS[kept]))]  # fmt: skip
    expected = {
        "token": tokens.mean() if len(tokens) else 0,
        "sequence": np.mean([row.mean() if len(row) else 0 for row in left]) if left else 0,
        "prompt": np.mean([own.mean() if len(own) else 0 for own in prompts]) if left else 0,
        "constant": np.mean([row.sum() / 16 for row in left]) if left else 0,
    }
    for reduction, value in expected.items():
        weights = reduction_weights(MASK, kept, reduction, max_new_tokens=16, groups_N=PROMPTS)
        assert (weights * losses).sum() / len(MASK) == pytest.approx(value, abs=1e-12), reduction
        assert not weights[(MASK == 0) | ~kept[:, None]].any()


def test_beta_follows_the_divergence():
    assert next_beta(0.1, 6.0, 6.0, 10_000, 64) == 0.1
    assert next_beta(0.1, 6.6, 6.0, 10_000, 64) == pytest.approx(0.1 * (1 + 0.1 * 64 / 10_000))
    assert next_beta(0.1, 600.0, 6.0, 10_000, 64) == pytest.approx(0.1 * (1 + 0.2 * 64 / 10_000))
    assert next_beta(0.1, 0.0, 6.0, 10_000, 64) == pytest.approx(0.1 * (1 - 0.2 * 64 / 10_000))

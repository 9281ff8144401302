"""Rollouts as batches: advantages by the settings, not by the numbers of the day, and the batches of each step."""

from types import SimpleNamespace

import numpy as np
import pytest

from minimind_jax.config.rl import CriticConfig, PolicyConfig, PPOConfig, RLConfig, RolloutConfig
from minimind_jax.rl.batches import arrays_of, minibatches, with_advantages
from minimind_jax.rl.rollout import Row, describe
from minimind_jax.rl.source import Rollouts

SAMPLED = ([1, 1, 1], [1, 0, 1], [1], [1, 1, 0, 0])  # behind a prompt of two tokens; 0 is what an environment said
REWARDS = (1.0, 0.0, 0.5, 2.0)
PENALTY = {"advantage": "batch", "beta": 0.1, "kl_estimator": "k1", "kl_placement": "reward"}
ROWS = [
    Row(n // 2, [5] * (2 + len(own)), 2, [False] * 2 + [bool(x) for x in own], [0.0] * (2 + len(own)),
        "length" if n == 3 else "stop", reward, {}, 1, 0, 0)
    for n, (own, reward) in enumerate(zip(SAMPLED, REWARDS, strict=True))
]  # fmt: skip


def settings(kind=RLConfig, critic=None, **policy):
    rollout = RolloutConfig(prompts=2, completions=2, max_new_tokens=8)
    return kind(rollout=rollout, policy=PolicyConfig(**policy), critic=critic or CriticConfig())


def advantages(config, divergence=0.0, values=None):
    """(arrays with advantages, those of trained tokens), where each token has diverged by so much."""
    arrays = arrays_of(ROWS, 64)
    logs = {"old_log_probs": 0 * arrays["mask"] + divergence, "reference_log_probs": 0 * arrays["mask"]}
    critic = {} if values is None else {"old_values": 0 * arrays["mask"] + values}
    found = with_advantages(arrays | logs | critic, ROWS, config, config.policy.beta)
    return found, found["advantages"][arrays["mask"] > 0]


def test_a_divergence_of_0_in_the_reward_gives_the_advantages_of_one_that_is_nearly_0():
    """As in the first rollout, of which the policy is still the reference."""
    config = settings(scale="batch", **PENALTY)
    np.testing.assert_allclose(advantages(config)[1], advantages(config, 1e-7)[1], atol=1e-6)


@pytest.mark.parametrize("divergence", [0.0, 0.3])
def test_tokens_are_compared_with_the_mean_of_the_rollout_also_without_a_scale(divergence):
    """To each token what is still to come of the reward less beta k1, across what an environment said."""
    counts = [sum(own) for own in SAMPLED]
    left = [reward - 0.1 * divergence * n for reward, count in zip(REWARDS, counts, strict=True)
            for n in range(count, 0, -1)]  # fmt: skip
    expected = np.array(left) - np.mean(left)
    np.testing.assert_allclose(advantages(settings(scale="none", **PENALTY), divergence)[1], expected, atol=1e-6)
    white = expected / np.sqrt(np.var(expected, ddof=1) + 1e-8)
    np.testing.assert_allclose(advantages(settings(scale="batch", **PENALTY), divergence)[1], white, atol=1e-5)


def test_returns_are_of_advantages_before_they_are_whitened():
    config = settings(PPOConfig, CriticConfig(gamma=1.0, gae_lambda=1.0), advantage="gae", scale="batch")
    found, own = advantages(config, values=0.25)
    returns = found["returns"][found["mask"] > 0]
    assert returns.tolist() == np.repeat(REWARDS, [sum(own) for own in SAMPLED]).tolist()
    assert abs(own.mean()) < 1e-6 and own.std(ddof=1) == pytest.approx(1, abs=1e-5)


def test_the_value_model_learns_alone_at_first_and_not_of_what_is_masked():
    config = settings(PPOConfig, CriticConfig(warmup=1), advantage="gae", scale="batch", overlong="mask", beta=0.1)
    arrays, _ = advantages(config, values=0.0)
    for rollout in (0, 1):
        (batch,) = minibatches(arrays, ROWS, config, rollout, 0.1)
        assert batch["weights"].any() == batch["kl_weights"].any() == (rollout == 1)
        assert not batch["weights"][3].any()
        assert (batch["value_weights"] > 0).tolist() == (batch["mask"] * [[1], [1], [1], [0]] > 0).tolist()


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        (RLConfig, {"reduction": "prompt"}),
        (RLConfig, {"advantage": "leave_one_out", "scale": "none", "reduction": "sequence"}),
        (RLConfig, {"advantage": "batch", "scale": "batch"}),
        (PPOConfig, {"advantage": "gae", "scale": "batch"}),
    ],
)
def test_a_completion_that_has_no_reward_is_as_if_it_were_not_there(kind, policy):
    config = settings(kind, **policy)

    def batch_of(rows):
        arrays = arrays_of(rows, 64)
        arrays["old_values"] = 0.1 + 0 * arrays["mask"]
        (batch,) = minibatches(with_advantages(arrays, rows, config, 0.0), rows, config, 0, 0.0)
        return {name: array for name, array in batch.items() if array.dtype == np.float32}

    found, without = batch_of([ROWS[0]._replace(reward=9.0, unjudged=True), *ROWS[1:]]), batch_of(ROWS[1:])
    for name in found:
        weight = 3 / 4 if "weights" in name else 1  # sums of which are divided by the rows
        np.testing.assert_allclose(weight * found[name][1:], without[name], rtol=1e-6, err_msg=name)
    assert not any(array[0].any() for name, array in found.items() if "weights" in name or name == "advantages")
    none = batch_of([row._replace(unjudged=True) for row in ROWS])
    assert not any(array.any() for name, array in none.items() if "weights" in name or name == "advantages")


def test_every_update_sees_each_row_once_in_steps_whose_weights_are_means():
    config = settings(updates=2, minibatches=2)
    arrays, _ = advantages(config)
    batches = list(minibatches(arrays, ROWS, config, 0, 0.0))
    assert len(batches) == config.stride == 4
    for update in (batches[:2], batches[2:]):
        assert sorted(length for batch in update for length in batch["lengths"]) == sorted(arrays["lengths"])
    assert all(batch["weights"].sum() / 2 == pytest.approx(1) for batch in batches)


def test_columns_of_prompts_alone_have_no_targets():
    rows = [row._replace(tokens=[7] * 40 + row.tokens, sampled=[False] * 40 + row.sampled,
                         logprobs=[0.0] * 40 + row.logprobs) for row in ROWS]  # fmt: skip
    short, long = arrays_of(ROWS, 64), arrays_of(rows, 64)
    assert long["tokens"].shape[1] > 40 > long["targets"].shape[1]
    for name in ("targets", "sampler_log_probs"):
        assert long[name][long["mask"] > 0].tolist() == short[name][short["mask"] > 0].tolist()
    columns = long["tokens"].shape[1] - long["mask"].shape[1] + np.nonzero(long["mask"])[1]
    assert columns.tolist() == (np.nonzero(short["mask"])[1] + 40).tolist()


@pytest.mark.parametrize(
    ("lost", "reward", "taught"), [([0], 2.5 / 3, 0.5), ([0, 3], 0.25, 0), ([0, 1, 2, 3], None, 0)]
)
def test_what_is_told_is_of_the_completions_that_have_a_reward(lost, reward, taught):
    """Also where of each prompt one is left, which has nothing to be compared with; and nothing where there is none,
    though other functions have had something to say."""
    told = describe([row._replace(unjudged=n in lost) for n, row in enumerate(ROWS)])
    assert told.get("reward") == (reward and pytest.approx(reward)) and told["frac_reward_zero_std"] == 1 - taught
    assert ("reward" in told) == ("reward_std" in told)


@pytest.mark.parametrize(
    ("kind", "warmup", "told"), [(PPOConfig, 2, True), (PPOConfig, 0, False), (RLConfig, 2, False)]
)
def test_rollouts_that_leave_the_policy_alone_are_told_before_the_first_step(kind, warmup, told):
    """A short run of PPO may be nothing else."""
    advantage = {"advantage": "gae", "scale": "batch"} if kind is PPOConfig else {}
    config = settings(kind, CriticConfig(warmup=warmup), **advantage)
    player = SimpleNamespace(tasks=SimpleNamespace(train=[0] * 19))
    facts = Rollouts.facts(SimpleNamespace(config=config, stride=config.stride, player=player), 2 * config.stride)
    assert ("the first 2 train the value model alone" in facts["steps"]) == told

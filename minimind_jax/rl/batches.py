"""Rollouts as batches: arrays of fixed shapes, advantages, and the weight of every token in the loss.

See `losses.policy` for what the arrays mean; their columns are aligned to what is predicted.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from minimind_jax.config.rl import RLConfig
from minimind_jax.data.rows import Batch
from minimind_jax.inference.buckets import round_up
from minimind_jax.losses.policy import divergences
from minimind_jax.rl.advantages import gae, group_advantages, reduction_weights, whiten
from minimind_jax.rl.rollout import Row
from minimind_jax.seeds import named_seed

NARROWEST = 16  # columns of a batch


def arrays_of(rows: Sequence[Row], seq_len: int) -> Batch:
    """The rows side by side: what a model reads, (N, T) and lengths (N,), and of the last C columns, in front of which
    nothing is trained, the targets, which of them are trained, and the sampler's log-probabilities."""
    width = min(width_of(max(len(row.tokens) for row in rows)), seq_len)
    arrays = {name: np.zeros((len(rows), width), np.int32) for name in ("tokens", "targets", "segment_ids")}
    arrays |= {name: np.zeros((len(rows), width), np.float32) for name in ("mask", "sampler_log_probs")}
    for n, row in enumerate(rows):
        length, ahead = len(row.tokens), slice(1, None)
        arrays["tokens"][n, :length], arrays["segment_ids"][n, :length] = row.tokens, 1
        arrays["targets"][n, : length - 1] = row.tokens[ahead]
        arrays["mask"][n, : length - 1] = row.sampled[ahead]
        arrays["sampler_log_probs"][n, : length - 1] = row.logprobs[ahead]
    untrained = int(np.argmax(arrays["mask"].any(axis=0)))
    for name in ("targets", "mask", "sampler_log_probs"):
        arrays[name] = arrays[name][:, -width_of(width - untrained) :]
    return {**arrays, "lengths": np.array([len(row.tokens) for row in rows], np.int32)}


def width_of(longest: int) -> int:
    """Columns for rows of so many tokens: four widths between two powers of two, for each is a program."""
    return round_up(longest, max(NARROWEST, 1 << (longest - 1).bit_length() >> 3))


def with_advantages(arrays: Batch, rows: Sequence[Row], config: RLConfig, beta: float) -> Batch:
    """The arrays of a rollout with `advantages` (N, T), and of a value model its `returns`.

    arrays: with the log-probabilities and values that they follow from, where they do. beta: weight of the divergence
    from the reference, which may be taken off the rewards. Rows that have no reward get no advantage, and have no part
    in those of others.
    """
    policy, kept_N = config.policy, np.array([not row.unjudged for row in rows])
    rewards_N, mask_NT = np.array([row.reward for row in rows]), arrays["mask"] * kept_N[:, None]
    costs_NT = np.zeros(mask_NT.shape)
    if of_tokens := policy.beta > 0 and policy.kl_placement == "reward":
        log_probs, reference = (arrays[f"{who}_log_probs"].astype(np.float64) for who in ("old", "reference"))
        costs_NT = beta * np.asarray(divergences(log_probs, reference, "k1")) * mask_NT
    if policy.advantage in ("group", "leave_one_out") or (policy.advantage == "batch" and not of_tokens):
        given = rewards_N - costs_NT.sum(axis=1), np.array([row.group for row in rows])
        found_N, options = np.zeros(len(rows)), {"scale": policy.scale, "ddof": policy.ddof}
        if kept_N.any():
            found_N[kept_N] = group_advantages(*(x_N[kept_N] for x_N in given), kind=policy.advantage, **options)
        return {**arrays, "advantages": (found_N[:, None] * mask_NT).astype(np.float32)}
    values_NT, critic = arrays.get("old_values", np.zeros(mask_NT.shape)), config.critic
    discounts = (critic.gamma, critic.gae_lambda) if config.has_critic else (1.0, 1.0)
    found_NT, returns_NT = gae(_at_end(rewards_N, mask_NT) - costs_NT, values_NT, mask_NT, *discounts)
    if policy.advantage == "batch" or policy.scale != "none":
        found_NT = whiten(found_NT, mask_NT, policy.ddof, scale=policy.scale != "none")
    more = {"returns": returns_NT} if config.has_critic else {}
    return {**arrays, **{name: x.astype(np.float32) for name, x in {"advantages": found_NT, **more}.items()}}


def _at_end(rewards_N: np.ndarray, mask_NT: np.ndarray) -> np.ndarray:
    """The rewards at the last trained token of each row."""
    last_N = mask_NT.shape[1] - 1 - np.argmax(mask_NT[:, ::-1] > 0, axis=1)
    found_NT = np.zeros(mask_NT.shape)
    found_NT[np.arange(len(mask_NT)), last_N] = rewards_N
    return found_NT * (mask_NT > 0)


def minibatches(arrays: Batch, rows: Sequence[Row], config: RLConfig, rollout: int, beta: float) -> Iterator[Batch]:
    """The batch of every optimizer step of a rollout: all its rows in each update, in an order drawn anew."""
    policy = config.policy
    kept_N = np.array([not row.unjudged and (policy.overlong == "keep" or row.finish == "stop") for row in rows])
    groups_N = np.array([row.group for row in rows])
    for update in range(policy.updates):
        order = np.arange(len(rows))
        if policy.minibatches > 1:
            np.random.default_rng(named_seed(config.seed, "minibatches", rollout, update)).shuffle(order)
        for chosen in np.split(order, policy.minibatches):
            batch = {name: array[chosen] for name, array in arrays.items()}
            yield batch | _weights(batch["mask"], kept_N[chosen], groups_N[chosen], config, rollout, beta)


def _weights(
    mask_NT: np.ndarray, kept_N: np.ndarray, groups_N: np.ndarray, config: RLConfig, rollout: int, beta: float
) -> Batch:
    policy, critic = config.policy, config.critic
    weights_NT = reduction_weights(mask_NT, kept_N, policy.reduction, config.rollout.max_new_tokens, groups_N)
    found = {"weights": weights_NT}
    if policy.beta and policy.kl_placement == "loss":
        found["kl_weights"] = beta * weights_NT
    if config.has_critic:
        everything = reduction_weights(mask_NT, kept_N, "token", config.rollout.max_new_tokens)
        found["value_weights"] = critic.weight * everything
        if rollout < critic.warmup:
            found |= {name: 0 * weights_NT for name in found if name != "value_weights"}
    return {name: array.astype(np.float32) for name, array in found.items()}

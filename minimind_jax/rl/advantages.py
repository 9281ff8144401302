"""From rewards to what each token is trained with: advantages, and the weights that make sums into means.

Float64 NumPy. Whatever is a statistic is one of all that is given: give the episodes of all processes.
"""

from typing import Literal

import numpy as np

Array = np.ndarray


def group_advantages(
    rewards_N: Array,
    groups_N: Array,
    *,
    kind: Literal["group", "leave_one_out", "batch"],
    scale: Literal["none", "group", "batch"],
    ddof: int = 1,
    eps: float = 1e-4,
) -> Array:
    """The advantage of each episode, (N,): (reward - baseline) / (spread + eps).

    kind: of the baseline, the mean reward of its group (GRPO, arXiv 2402.03300), of the others in its group (RLOO,
    arXiv 2402.14740; 0 is the advantage of one that is alone) or of all. scale: of the spread, the standard deviation
    of the rewards of its group, or of all; `none` does not divide. groups_N: numbers of groups. ddof: the deviation is
    the root of sum of squares / (n - ddof); of one reward it is 0.
    """
    rewards_N = np.asarray(rewards_N, np.float64)
    _, groups_N = np.unique(groups_N, return_inverse=True)
    sizes_N, means_N, spreads_N = np.ones((3, len(rewards_N)))
    for group in range(groups_N.max() + 1):
        members = groups_N == group
        sizes_N[members] = members.sum()
        means_N[members] = rewards_N[members].mean()
        spreads_N[members] = _deviation(rewards_N[members], ddof)
    advantages_N = rewards_N - (rewards_N.mean() if kind == "batch" else means_N)
    if kind == "leave_one_out":
        advantages_N *= sizes_N / np.maximum(sizes_N - 1, 1)
    if scale == "none":
        return advantages_N
    return advantages_N / ((spreads_N if scale == "group" else _deviation(rewards_N, ddof)) + eps)


def gae(rewards_NT: Array, values_NT: Array, mask_NT: Array, gamma: float, gae_lambda: float) -> tuple[Array, Array]:
    """Generalised advantage estimation (arXiv 1506.02438): advantages and returns (N, T), 0 where the mask is.

    From the last trained token to the first, with the value v' and the advantage A' of the one behind it, 0 behind the
    last:  A = reward + gamma v' - v + gamma lambda A';  return = A + v. What lies between trained tokens, such as the
    answer of a tool, is passed over. An episode that was cut off counts as ended.
    """
    rewards_NT, values_NT = np.asarray(rewards_NT, np.float64), np.asarray(values_NT, np.float64)
    trained_NT = np.asarray(mask_NT) > 0
    advantages_NT = np.zeros_like(values_NT)
    value_N, advantage_N = np.zeros((2, len(values_NT)))
    for t in reversed(range(values_NT.shape[1])):
        own_N = rewards_NT[:, t] + gamma * value_N - values_NT[:, t] + gamma * gae_lambda * advantage_N
        advantage_N = np.where(trained_NT[:, t], own_N, advantage_N)
        value_N = np.where(trained_NT[:, t], values_NT[:, t], value_N)
        advantages_NT[:, t] = np.where(trained_NT[:, t], own_N, 0)
    return advantages_NT, np.where(trained_NT, advantages_NT + values_NT, 0)


def whiten(x_NT: Array, mask_NT: Array, ddof: int = 1, scale: bool = True) -> Array:
    """x less its mean over the mask, divided by the root of its variance + 1e-8; 0 outside the mask.

    scale: False does not divide. ddof: 1 as in TRL and verl, 0 as in MiniMind.
    """
    trained_NT = np.asarray(mask_NT) > 0
    x = np.asarray(x_NT, np.float64)[trained_NT]
    white_NT = np.zeros(trained_NT.shape)
    if x.size:
        white_NT[trained_NT] = (x - x.mean()) / (np.sqrt(_deviation(x, ddof) ** 2 + 1e-8) if scale else 1)
    return white_NT


def reduction_weights(
    mask_NT: Array,
    kept_N: Array,
    reduction: Literal["token", "sequence", "prompt", "constant"],
    max_new_tokens: int,
    groups_N: Array | None = None,
) -> Array:
    """The weight of each token's loss, (N, T): their sum over the rows, divided by N, is the loss of the step.

    token: the mean over trained tokens (DAPO, BNPO). sequence: over episodes of the mean over an episode's trained
    tokens (GRPO); of an episode without any it is 0. prompt: over prompts of the mean over the trained tokens of all
    of a prompt's episodes (ScaleRL, arXiv 2510.13786). constant: over episodes of the sum over tokens, divided by
    max_new_tokens (Dr. GRPO). mask_NT: 1 for trained tokens, of all rows of an optimizer step. kept_N: whether an
    episode counts at all; weights of others are 0, and means are over what is left. groups_N: numbers of prompts, for
    `prompt`.
    """
    kept_N1 = np.asarray(kept_N, np.float64)[:, None]
    mask_NT = (np.asarray(mask_NT) > 0) * kept_N1
    if reduction == "token":
        return mask_NT * len(mask_NT) / max(mask_NT.sum(), 1)
    tokens_N1, units = mask_NT.sum(axis=1, keepdims=True), kept_N1.sum()
    if reduction == "prompt":
        tokens_N1 = np.equal.outer(groups_N, groups_N) @ tokens_N1
        units = len(np.unique(groups_N[kept_N1[:, 0] > 0]))
    of_row_N1 = max_new_tokens if reduction == "constant" else np.maximum(tokens_N1, 1)
    return mask_NT / of_row_N1 * len(mask_NT) / max(units, 1)


def next_beta(beta: float, kl: float, target: float, horizon: float, sequences: int) -> float:
    """The weight of the divergence after so many more sequences of which it was `kl` (arXiv 1909.08593).

    beta (1 + e sequences / horizon), where e = kl / target - 1 within +-0.2.
    """
    return beta * (1 + min(max(kl / target - 1, -0.2), 0.2) * sequences / horizon)


def _deviation(x_N: Array, ddof: int) -> float:
    return float(np.sqrt(np.square(x_N - x_N.mean()).sum() / max(x_N.size - ddof, 1)))

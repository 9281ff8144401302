"""Losses of pairs of answers, one preferred to the other: DPO and its relatives.

With log-probabilities summed over an answer's tokens, log p of the policy and log q of the reference,
delta = log p - log q, and s = beta (delta_chosen - delta_rejected):

    sigmoid       -log sigma(s), with label smoothing e: (1 - e)(-log sigma(s)) + e (-log sigma(-s))   arXiv 2305.18290
    robust        ((1 - e)(-log sigma(s)) - e (-log sigma(-s))) / (1 - 2e)                             arXiv 2403.00409
    hinge         max(0, 1 - s)                                                                        arXiv 2309.06657
    ipo           (delta_chosen / n_chosen - delta_rejected / n_rejected - 1 / (2 beta))^2             arXiv 2310.12036
    sigmoid_norm  sigmoid, of deltas divided by the answers' lengths n                                 arXiv 2411.15124
    simpo         -log sigma(beta (log p_chosen / n - log p_rejected / n) - gamma), no reference       arXiv 2405.14734
    orpo          beta (-log sigma(log odds ratio)) of p = exp(log p / n), no reference; its own term of fine-tuning is
                  `sft_weight` 1                                                                       arXiv 2403.07691

The length-normalised IPO is what its authors confirmed, and TRL computes.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from minimind_jax.losses import Batch, LossFn, Metric, Metrics
from minimind_jax.losses.sequences import pair_room, sum_by_segment
from minimind_jax.losses.vocabulary import target_scores
from minimind_jax.model.transformer import LanguageModel, ModelOutput, Params

Name = Literal["sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "simpo", "orpo"]
REFERENCE_FREE: tuple[Name, ...] = ("simpo", "orpo")


class Answers(NamedTuple):
    """Of the two answers of pairs, any shape: log-probabilities summed over their tokens, and numbers of tokens."""

    chosen: Array
    rejected: Array
    chosen_count: Array
    rejected_count: Array


def pair_losses(
    name: Name,
    policy: Answers,
    reference: Answers | None,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
) -> tuple[Array, Array, Array]:
    """(losses, rewards of the chosen answers, rewards of the rejected ones), each of the shape of the answers.

    Rewards as TRL logs them: beta * delta, and beta * (log p / n) without a reference. reference: None for the losses
    in REFERENCE_FREE. An answer without tokens counts as one of length 1 and log-probability 0.
    """
    counts = jnp.maximum(policy.chosen_count, 1), jnp.maximum(policy.rejected_count, 1)
    if name in REFERENCE_FREE:
        chosen, rejected = policy.chosen / counts[0], policy.rejected / counts[1]
    else:
        chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    rewards = beta * chosen, beta * rejected
    if name in ("ipo", "sigmoid_norm"):
        chosen, rejected = chosen / counts[0], rejected / counts[1]
    score = beta * (chosen - rejected)
    log_sigmoid, e = jax.nn.log_sigmoid, label_smoothing
    if name == "robust":
        losses = ((1 - e) * -log_sigmoid(score) + e * log_sigmoid(-score)) / (1 - 2 * e)
    elif name == "hinge":
        losses = jax.nn.relu(1 - score)
    elif name == "ipo":
        losses = jnp.square(chosen - rejected - 1 / (2 * beta))
    elif name == "orpo":
        losses = -beta * log_sigmoid((chosen - rejected) - (_log1m_exp(chosen) - _log1m_exp(rejected)))
    else:
        score = score - gamma if name == "simpo" else score
        losses = (1 - e) * -log_sigmoid(score) + e * -log_sigmoid(-score)
    return losses, *rewards


def _log1m_exp(x: Array) -> Array:
    """log(1 - exp(x)) for x < 0, without loss of digits at either end; x = 0, a certain answer, is taken as -1e-7."""
    x = jnp.minimum(x, -1e-7)
    near = x > -0.6931472
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -1))), jnp.log1p(-jnp.exp(jnp.where(near, -1, x))))


def answer_log_probs(
    model: LanguageModel, params: Params, batch: Batch, key: Array | None = None
) -> tuple[Answers, ModelOutput]:
    """The answers of every pair of packed rows, (B, S / 2) each, and the model's output.

    batch: as in `language_model`, with the two answers of a pair as neighbouring documents, the chosen one first.
    """
    scores, output = target_scores(model, params, batch, key)
    weights_BT, room = batch["loss_weights"], pair_room(batch["tokens"].shape[1])
    sums_BS = sum_by_segment(weights_BT * scores.log_probs_BT, batch["segment_ids"], room)
    counts_BS = sum_by_segment(weights_BT, batch["segment_ids"], room)
    return Answers(sums_BS[:, 0::2], sums_BS[:, 1::2], counts_BS[:, 0::2], counts_BS[:, 1::2]), output


def make_preference_loss(
    model: LanguageModel,
    name: Name,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    sft_weight: float = 0.0,
    reference: Callable[[Params], tuple[LanguageModel, Params]] | None = None,
) -> LossFn:
    """The loss of `model` on packed rows of pairs: mean over pairs of `pair_losses` and of the term below.

    sft_weight: weight of the chosen answer's mean negative log-likelihood of a token, averaged over pairs, which keeps
    a small model from making both answers unlikely (RPO, arXiv 2404.19733; ORPO's first term).
    reference: of all parameters, the model and parameters that were the policy at the start. None for the losses
    without one, and where the batch holds `reference_log_probs` (B, S / 2, 2), a sum for each answer of each pair.
    A pair of padding, without tokens, does not count.

    Metrics, under TRL's names: rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies, logps/chosen,
    logps/rejected, chosen_nll (of a token of the chosen answers), router_loss; tokens, the number trained on.
    """
    pair_loss = functools.partial(pair_losses, name, beta=beta, label_smoothing=label_smoothing, gamma=gamma)

    def reference_answers(params: Params, batch: Batch, policy: Answers) -> Answers | None:
        if "reference_log_probs" in batch:
            sums_BP2 = batch["reference_log_probs"]
            return policy._replace(chosen=sums_BP2[..., 0], rejected=sums_BP2[..., 1])
        if reference is None:
            return None
        with jax.named_scope("reference"):
            return jax.lax.stop_gradient(answer_log_probs(*reference(params), batch)[0])

    def loss_fn(params: Params, batch: Batch, key: Array | None) -> tuple[Array, Array, Metrics]:
        policy, output = answer_log_probs(model, params, batch, key)
        losses, chosen_rewards, rejected_rewards = pair_loss(policy, reference_answers(params, batch, policy))
        is_pair = (policy.chosen_count > 0) & (policy.rejected_count > 0)
        pairs = jnp.sum(is_pair).astype(jnp.float32)
        total = functools.partial(jnp.sum, where=is_pair)
        chosen_nll = -policy.chosen / jnp.maximum(policy.chosen_count, 1)
        router_loss = output.router_loss * pairs
        numerator = total(losses) + sft_weight * total(chosen_nll) + router_loss
        metrics = {
            "rewards/chosen": Metric(total(chosen_rewards), pairs),
            "rewards/rejected": Metric(total(rejected_rewards), pairs),
            "rewards/margins": Metric(total(chosen_rewards - rejected_rewards), pairs),
            "rewards/accuracies": Metric(total(chosen_rewards > rejected_rewards), pairs),
            "logps/chosen": Metric(total(policy.chosen), pairs),
            "logps/rejected": Metric(total(policy.rejected), pairs),
            "chosen_nll": Metric(-total(policy.chosen), total(policy.chosen_count)),
            "router_loss": Metric(router_loss, pairs, held_out=False),
            "tokens": Metric(jnp.sum(batch["loss_weights"]), held_out=False),
        }
        return numerator, pairs, metrics

    return loss_fn

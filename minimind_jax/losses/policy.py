"""Losses of a policy that learns from reward: one weighted sum over the tokens it wrote.

With log p of a token under the policy, log q under the policy that the rollout was made with ("old"), the ratio
r = exp(log p - log q) and the advantage A, a token's loss is

    clip    -A r', where r' is r, at most 1 + epsilon_high where A >= 0, at least 1 - epsilon_low where A < 0: this is
            PPO's max(-A r, -A clip(r))                                                            arXiv 1707.06347
            r' is at most `cap` (INTELLECT-2, arXiv 2505.07291), and at most `dual_clip` where A < 0 (arXiv 1912.09729)
    cispo   -A sg(min(r, cap)) log p, sg being without gradient                                    arXiv 2506.13585
    sapo    -A (4 / tau) sigmoid(tau (r - 1)), tau 1 where A > 0, else 1.05                        arXiv 2511.20347

The level of r: each `token`; the `sequence`, of which log r is the mean over its tokens (GSPO, arXiv 2507.18071); or
`sequence_token`, which has the value of the latter and the gradient of the token (GSPO-token).
MiniMind and TRL cap cispo's ratio as here; the paper, and verl, bound it from below, too.

The divergence from a reference, with d = log p_ref - log p (Schulman, http://joschu.net/blog/kl-approx.html):

    k1  -d        k2  d^2 / 2        k3  exp(d) - d - 1

How tokens add up (GRPO, DAPO, Dr. GRPO, ...) lies in the weights of the batch: see `rl.advantages`.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from minimind_jax.losses import Batch, LossFn, Metric, Metrics
from minimind_jax.losses.value import value_losses, values
from minimind_jax.losses.vocabulary import target_scores
from minimind_jax.model.transformer import LanguageModel, Params

Loss = Literal["clip", "cispo", "sapo"]
Level = Literal["token", "sequence", "sequence_token"]
Estimator = Literal["k1", "k2", "k3"]
Correction = Literal["none", "token", "sequence"]

WEIGHTS = "weights", "value_weights"  # of a batch, above 0 where something is trained
FARTHEST = 20.0  # a log ratio counts as this at most: the exponential of a larger one has no gradient in float32 (verl)
SAPO_TAU = 1.0, 1.05  # of advantages above 0, and of others


def ratios(log_probs_BT: Array, old_BT: Array, mask_BT: Array, level: Level) -> Array:
    """r of each token (B, T), of one episode a row; 1 where the mask is 0."""
    log_ratios_BT = jnp.where(mask_BT > 0, log_probs_BT - old_BT, 0)
    if level != "token":
        means_B1 = jnp.sum(log_ratios_BT, axis=1, keepdims=True) / _tokens(mask_BT)
        if level == "sequence_token":
            means_B1 = stop_gradient(means_B1) + log_ratios_BT - stop_gradient(log_ratios_BT)
        log_ratios_BT = jnp.where(mask_BT > 0, means_B1, 0)
    return jnp.exp(jnp.clip(log_ratios_BT, -FARTHEST, FARTHEST))


def policy_losses(
    log_probs: Array,
    ratios: Array,
    advantages: Array,
    *,
    loss: Loss = "clip",
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    cap: float = 0.0,
    dual_clip: float = 0.0,
) -> Array:
    """The loss of each token by the formulas above; any shape. cap, dual_clip: 0 for none."""
    if loss == "sapo":
        tau = jnp.where(advantages > 0, *SAPO_TAU)
        return -advantages * 4 / tau * jax.nn.sigmoid(tau * (ratios - 1))
    if loss == "cispo":
        return -advantages * stop_gradient(jnp.minimum(ratios, cap)) * log_probs
    cap, dual_clip = cap or jnp.inf, dual_clip or jnp.inf
    least = jnp.where(advantages < 0, 1 - epsilon_low, 0)
    most = jnp.where(advantages < 0, min(cap, dual_clip), min(cap, 1 + epsilon_high))
    # Not jnp.clip, which halves the gradient of a ratio that is exactly at a limit, as all are with epsilon 0.
    return -advantages * jnp.where(ratios > most, most, jnp.where(ratios < least, least, ratios))


def divergences(log_probs: Array, reference: Array, estimator: Estimator) -> Array:
    """The divergence from the reference that each token stands for; any shape."""
    d = reference - log_probs
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return jnp.square(d) / 2
    d = jnp.clip(d, -FARTHEST, FARTHEST)
    return jnp.expm1(d) - d


def correction_weights(old_BT: Array, sampler_BT: Array, mask_BT: Array, correction: Correction, cap: float) -> Array:
    """The importance weights (B, T) of tokens that a sampler drew with other log-probabilities than the trainer's.

    exp(log q - log sampler) of each token or, of a sequence, of the sum over its tokens; at most `cap` (truncated
    importance sampling, https://fengyao.notion.site/off-policy-rl). With `none`, each token's as it is, which is only
    to be looked at.
    """
    differences_BT = jnp.where(mask_BT > 0, old_BT - sampler_BT, 0)
    if correction == "sequence":
        sums_B1 = jnp.sum(differences_BT, axis=1, keepdims=True)
        differences_BT = jnp.broadcast_to(sums_B1, differences_BT.shape)
    weights_BT = jnp.exp(jnp.clip(differences_BT, -FARTHEST, FARTHEST))
    return weights_BT if correction == "none" else jnp.minimum(weights_BT, cap)


def policy_sum(
    log_probs_BT: Array,
    entropies_BT: Array,
    batch: Batch,
    *,
    loss: Loss = "clip",
    level: Level = "token",
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    cap: float = 0.0,
    dual_clip: float = 0.0,
    kl_estimator: Estimator = "k2",
    entropy: float = 0.0,
    correction: Correction = "none",
    correction_cap: float = 2.0,
) -> tuple[Array, Metrics]:
    """The sum over tokens of  weight (policy loss - entropy x H) + kl_weight x divergence,  and its metrics.

    Batch: as of `make_policy_loss`; what the arrays hold where the mask is 0 does not matter.
    """
    mask_BT, advantages_BT, tokens = batch["mask"], batch["advantages"], _Tokens(batch["mask"])
    log_probs_BT, entropies_BT, sampler_BT = map(tokens.only, (log_probs_BT, entropies_BT, batch["sampler_log_probs"]))
    old_BT = tokens.only(batch.get("old_log_probs", stop_gradient(log_probs_BT)))
    ratios_BT = ratios(log_probs_BT, old_BT, mask_BT, level)
    limits = {"epsilon_low": epsilon_low, "epsilon_high": epsilon_high, "cap": cap}
    losses_BT = policy_losses(log_probs_BT, ratios_BT, advantages_BT, loss=loss, dual_clip=dual_clip, **limits)
    corrections_BT = correction_weights(old_BT, sampler_BT, mask_BT, correction, correction_cap)
    if correction != "none":
        losses_BT *= corrections_BT
    total = jnp.sum(batch["weights"] * (tokens.only(losses_BT) - entropy * entropies_BT))
    trained_BT = sum(batch[name] for name in WEIGHTS if name in batch)
    metrics = {
        "loss/policy_avg": tokens.mean(losses_BT),
        "entropy": tokens.mean(entropies_BT),
        "approx_kl": tokens.mean(divergences(log_probs_BT, old_BT, "k2")),
        "val/ratio": tokens.mean(ratios_BT),
        **_clip_metrics(tokens, ratios_BT, advantages_BT, loss, **limits),
        **_sampling_metrics(tokens, jnp.abs(old_BT - sampler_BT), corrections_BT),
        "tokens": Metric(jnp.sum(trained_BT > 0, dtype=jnp.float32), held_out=False),
    }
    if "reference_log_probs" in batch:
        reference_BT = tokens.only(batch["reference_log_probs"])
        metrics["kl"] = tokens.mean(divergences(log_probs_BT, reference_BT, "k3"))
        if "kl_weights" in batch:
            total += jnp.sum(batch["kl_weights"] * divergences(log_probs_BT, reference_BT, kl_estimator))
    return total, metrics


def make_policy_loss(
    model: LanguageModel,
    *,
    temperature: float = 1.0,
    critic: LanguageModel | None = None,
    value_clip: float = 0.2,
    **options: Any,
) -> LossFn:
    """The loss of `model` on one episode a row: `policy_sum`, whose options it takes, and with a critic the sum over
    tokens of  value_weight x value loss;  over the number of rows. Router losses enter times the rows.

    critic: the value model (see `value`), whose parameters are params["critic"].

    Batch, columns aligned to targets[t] = tokens[t + 1]: tokens (B, T), lengths (B,) or positions and segment_ids,
    targets (B, C), int32; the others are float32 (B, C). C <= T: the first T - C columns, of prompts alone, may be left
    out, and cost no logits. mask: 1 where the policy chose the target and is trained on it. weights, 0
    elsewhere; advantages; sampler_log_probs of when it was written. Optional: old_log_probs, without which the policy
    is that of the rollout; reference_log_probs, kl_weights; with a critic value_weights, returns, old_values.

    Metrics, most under TRL's names, means over trained tokens where not said otherwise: kl (k3) where there is a
    reference, entropy, approx_kl (k2 from old), val/ratio, loss/policy_avg; clip_ratio/low_mean, high_mean,
    region_mean, and low_min, high_max of an episode; cispo_clip_ratio; sampling/sampling_logp_difference/mean and max,
    of the trainer's from the sampler's; sampling/importance_sampling_ratio/mean, min, max, of `correction_weights`;
    loss/value_avg, val/clipfrac_avg; router_loss; tokens, the number trained.
    """

    def loss_fn(params: Params, batch: Batch, key: Array | None) -> tuple[Array, Array, Metrics]:
        found, output = target_scores(model, params, batch, key, temperature, with_entropies=True)
        numerator, metrics = policy_sum(found.log_probs_BT, found.entropies_BT, batch, **options)
        router_loss, rows = output.router_loss, jnp.float32(len(batch["mask"]))
        if critic is not None:
            values_BT, output = values(critic, params["critic"], batch, key)
            tokens, router_loss = _Tokens(batch["mask"]), router_loss + output.router_loss
            losses_BT, clipped_BT = value_losses(values_BT, batch["old_values"], batch["returns"], value_clip)
            numerator += jnp.sum(batch["value_weights"] * tokens.only(losses_BT))
            metrics |= {"loss/value_avg": tokens.mean(losses_BT), "val/clipfrac_avg": tokens.mean(clipped_BT)}
        metrics["router_loss"] = Metric(router_loss * rows, rows, held_out=False)
        return numerator + router_loss * rows, rows, metrics

    return loss_fn


class _Tokens(NamedTuple):
    """What is known of the tokens of a mask, as metrics."""

    mask_BT: Array

    def only(self, x_BT: Array) -> Array:
        return jnp.where(self.mask_BT > 0, x_BT, 0)

    def mean(self, x_BT: Array) -> Metric:
        return Metric(jnp.sum(self.only(x_BT)), jnp.sum(self.mask_BT))

    def least(self, x_BT: Array) -> Metric:
        return Metric(jnp.min(x_BT, where=self.mask_BT > 0, initial=jnp.inf), by="min")

    def most(self, x_BT: Array) -> Metric:
        return Metric(jnp.max(x_BT, where=self.mask_BT > 0, initial=-jnp.inf), by="max")

    def of_rows(self, x_BT: Array) -> Array:
        """Each row's mean, at all of its tokens."""
        sums_B1 = jnp.sum(self.only(x_BT), axis=1, keepdims=True)
        return jnp.broadcast_to(sums_B1 / _tokens(self.mask_BT), x_BT.shape)


def _clip_metrics(tokens: _Tokens, ratios_BT, advantages_BT, loss, epsilon_low, epsilon_high, cap) -> Metrics:
    """How many tokens have no gradient, or a weight that is cut."""
    if loss == "sapo":
        return {}
    if loss == "cispo":
        return {"cispo_clip_ratio": tokens.mean((ratios_BT > cap) & (advantages_BT > 0))}
    low_BT = (ratios_BT < 1 - epsilon_low) & (advantages_BT < 0)
    high_BT = (ratios_BT > 1 + epsilon_high) & (advantages_BT > 0)
    return {
        "clip_ratio/low_mean": tokens.mean(low_BT),
        "clip_ratio/low_min": tokens.least(tokens.of_rows(low_BT)),
        "clip_ratio/high_mean": tokens.mean(high_BT),
        "clip_ratio/high_max": tokens.most(tokens.of_rows(high_BT)),
        "clip_ratio/region_mean": tokens.mean(low_BT | high_BT),
    }


def _sampling_metrics(tokens: _Tokens, differences_BT, corrections_BT) -> Metrics:
    difference, ratio = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"
    return {
        f"{difference}/mean": tokens.mean(differences_BT),
        f"{difference}/max": tokens.most(differences_BT),
        f"{ratio}/mean": tokens.mean(corrections_BT),
        f"{ratio}/min": tokens.least(corrections_BT),
        f"{ratio}/max": tokens.most(corrections_BT),
    }


def _tokens(mask_BT: Array) -> Array:
    """Tokens of each row, (B, 1); at least 1."""
    return jnp.maximum(jnp.sum(mask_BT, axis=1, keepdims=True), 1)

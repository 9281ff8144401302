"""Next-token cross entropy, the loss of pretraining and supervised fine-tuning."""

import jax
import jax.numpy as jnp

from minimind_jax.losses import Batch, LossFn, Metric, Metrics
from minimind_jax.losses.vocabulary import target_scores
from minimind_jax.model.transformer import LanguageModel, Params


def make_language_model_loss(model: LanguageModel, z_loss: float = 0.0) -> LossFn:
    """The loss of `model` on packed rows.

    loss = sum_t w_t (nll_t + z_loss * logsumexp(logits_t)^2) / sum_t w_t + router_loss

    with nll_t = -log p(targets_t) and w the batch's `loss_weights` (0 or 1); z-loss after PaLM, arXiv 2204.02311. The
    numerator and the denominator sum_t w_t are returned apart. The router loss is a statistic of the tokens of one
    micro-batch, not a sum over tokens: it enters as router_loss * denominator, and is the one term that depends on how
    a batch is cut into micro-batches (by the spread of expert loads between them).

    Batch: tokens, targets, positions, segment_ids (B, T) int32, loss_weights (B, T) float32; optional target_bytes
    (B, T), the UTF-8 bytes each target stands for.
    Metrics: nll, router_loss; bits_per_byte where target_bytes is given: trained nll in bits over the bytes of the
    trained targets. Special tokens have no bytes but cost bits, which makes it the price of the text with its framing.
    """

    def loss_fn(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array, Metrics]:
        scores, output = target_scores(model, params, batch, key)
        metrics = token_metrics(batch, -scores.log_probs_BT, output.router_loss)
        numerator = metrics["nll"].total + metrics["router_loss"].total
        if z_loss:
            numerator += z_loss * jnp.sum(batch["loss_weights"] * jnp.square(scores.log_sums_BT))
        return numerator, metrics["nll"].count, metrics

    return loss_fn


def token_metrics(batch: Batch, nll_BT: jax.Array, router_loss: jax.Array) -> Metrics:
    """The metrics of `make_language_model_loss`; the count of `nll` is the number of trained tokens."""
    weights_BT = batch["loss_weights"].astype(jnp.float32)
    nll, count = jnp.sum(weights_BT * nll_BT), jnp.sum(weights_BT)
    metrics = {"nll": Metric(nll, count), "router_loss": Metric(router_loss * count, count, held_out=False)}
    if "target_bytes" in batch:
        metrics["bits_per_byte"] = Metric(nll / jnp.log(2.0), jnp.sum(weights_BT * batch["target_bytes"]))
    return metrics

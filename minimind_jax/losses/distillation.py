"""Distillation: cross entropy of the data, and the divergence of a student's probabilities from a teacher's."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from minimind_jax.losses import Batch, LossFn, Metric, Metrics
from minimind_jax.losses.language_model import token_metrics
from minimind_jax.losses.pieces import by_columns, logits
from minimind_jax.model.transformer import LanguageModel, Params, full_precision

Divergence = Literal["forward", "reverse", "jsd"]


def divergences(student: Array, teacher: Array, kind: Divergence, temperature: float = 1.0, beta: float = 0.5) -> Array:
    """The divergence of each token, float32 (...,), of logits (..., V) divided by the temperature.

    With t and s the teacher's and student's probabilities, forward: KL(t || s). reverse: KL(s || t). jsd, with
    m = beta t + (1 - beta) s: beta KL(t || m) + (1 - beta) KL(s || m) (arXiv 2306.13649, equation 1).
    Extra words of a vocabulary that is padded are left out.
    """
    words = min(student.shape[-1], teacher.shape[-1])
    student, teacher = student[..., :words], teacher[..., :words]
    log_s, log_t = (jax.nn.log_softmax(logits.astype(jnp.float32) / temperature) for logits in (student, teacher))
    return _divergence(log_s, log_t, kind, beta)


def likeliest(teacher: Array, k: int, words: int, temperature: float = 1.0) -> tuple[Array, Array]:
    """The k likeliest of the first `words` words, int32 (..., k), and their log-probabilities among these words, of
    logits (..., V) divided by the temperature."""
    log_t = jax.nn.log_softmax(teacher[..., :words].astype(jnp.float32) / temperature)
    log_probs, ids = jax.lax.top_k(log_t, k)
    return ids, log_probs


def stored_divergences(
    student: Array, ids: Array, log_probs: Array, kind: Divergence, temperature: float = 1.0, beta: float = 0.5
) -> Array:
    """`divergences` from a teacher of whom `likeliest` is known: between the k words and all others taken as one.

    Never more than the divergence of all words, and the same if k is all of them.
    """
    log_s = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    log_s = jnp.take_along_axis(log_s, ids, axis=-1)
    return _divergence(_with_rest(log_s), _with_rest(log_probs), kind, beta)


def _with_rest(log_probs: Array) -> Array:
    """The log-probabilities (..., k) and that of everything else, (..., k + 1)."""
    rest = 1 - jnp.sum(jnp.exp(log_probs), axis=-1, keepdims=True)
    return jnp.concatenate([log_probs, jnp.log(jnp.maximum(rest, 1e-7))], axis=-1)  # float32 knows 1 to 6e-8


def _divergence(log_s: Array, log_t: Array, kind: Divergence, beta: float) -> Array:
    if kind == "forward":
        return _kl(log_t, log_s)
    if kind == "reverse":
        return _kl(log_s, log_t)
    log_m = jnp.logaddexp(log_t + jnp.log(beta), log_s + jnp.log1p(-beta))
    return beta * _kl(log_t, log_m) + (1 - beta) * _kl(log_s, log_m)


def _kl(log_p: Array, log_q: Array) -> Array:
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def make_distillation_loss(
    model: LanguageModel,
    teacher: Callable[[Params], tuple[LanguageModel, Params]] | None,
    *,
    alpha: float = 0.5,
    temperature: float = 1.5,
    divergence: Divergence = "forward",
    jsd_beta: float = 0.5,
    words: int | None = None,
) -> LossFn:
    """The loss of a student on packed rows, per trained token:

        alpha * cross entropy + (1 - alpha) * temperature^2 * divergence + router_loss

    teacher: of all parameters, the teacher's model and parameters; no gradient reaches them. None: what is known of it
    is in the batch, `teacher_ids` and `teacher_log_probs` (B, T, k) of `likeliest`, with the same `words` (all of the
    student's when None). Logits, their softmaxes and sums are float32; they are made for some columns at a time, and
    again for the gradient.
    Batch and metrics as in `language_model`, and the metric `divergence` (not times temperature^2).
    """

    def loss_fn(params: Params, batch: Batch, key: Array | None) -> tuple[Array, Array, Metrics]:
        output = model.read_batch(params, batch, key)
        kernels = (model.head_kernel(params),)
        if teacher is None:
            known = batch["teacher_ids"], batch["teacher_log_probs"]
        else:
            teacher_model, teacher_params = teacher(jax.lax.stop_gradient(params))
            with jax.named_scope("teacher"):
                known = (jax.lax.stop_gradient(teacher_model.read_batch(teacher_params, batch).hidden_BTD),)
            kernels += (teacher_model.head_kernel(teacher_params),)

        @jax.checkpoint
        def piece(kernels, hidden_BTD, targets_BT, *known):
            logits_BTV = logits(hidden_BTD, kernels[0], model.platform)
            log_probs_BTV = jax.nn.log_softmax(logits_BTV)
            nll_BT = -jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], axis=-1)[..., 0]
            if teacher is None:
                ids_BTK, log_probs_BTK = known
                apart_BT = stored_divergences(
                    logits_BTV[..., :words], ids_BTK, log_probs_BTK, divergence, temperature, jsd_beta
                )
            else:
                apart_BT = divergences(
                    logits_BTV, logits(known[0], kernels[1], model.platform), divergence, temperature, jsd_beta
                )
            return nll_BT, apart_BT

        nll_BT, divergence_BT = by_columns(piece, kernels, output.hidden_BTD, batch["targets"], *known)
        metrics = token_metrics(batch, nll_BT, output.router_loss)
        nll, count = metrics["nll"].total, metrics["nll"].count
        apart = jnp.sum(batch["loss_weights"] * divergence_BT)
        numerator = alpha * nll + (1 - alpha) * temperature**2 * apart + metrics["router_loss"].total
        return numerator, count, {**metrics, "divergence": Metric(apart, count)}

    return loss_fn


def teacher_likeliest(
    model: LanguageModel, params: Params, batch: Batch, k: int, words: int, temperature: float
) -> tuple[Array, Array]:
    """`likeliest` of a teacher for all tokens of packed rows, (B, T, k) each."""
    output = model.read_batch(params, batch)

    def piece(kernels, hidden_BTD):
        return likeliest(logits(hidden_BTD, *kernels, model.platform), k, words, temperature)

    with full_precision(model.compute):
        return by_columns(piece, (model.head_kernel(params),), output.hidden_BTD)

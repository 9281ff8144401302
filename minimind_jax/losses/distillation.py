"""Distillation: cross entropy of the data, and the divergence of a student's probabilities from a teacher's."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from minimind_jax.losses import Batch, LossFn, Metric, Metrics
from minimind_jax.model.transformer import LanguageModel, Params

Divergence = Literal["forward", "reverse", "jsd"]
TEACHER = "teacher"  # the key of the teacher's parameters

PIECE_BYTES = 2**28  # logits of one model made at once


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
    student's when None). Logits, their softmaxes and sums are float32; they are made for a piece of the rows at a time,
    and again for the gradient.
    Batch and metrics as in `language_model`, and the metric `divergence` (not times temperature^2).
    """

    def loss_fn(params: Params, batch: Batch, key: Array | None) -> tuple[Array, Array, Metrics]:
        output = model.read_batch(params, batch, key)
        if teacher is None:
            vocab, known = model.config.vocab_size, (batch["teacher_ids"], batch["teacher_log_probs"])
        else:
            teacher_model, teacher_params = teacher(jax.lax.stop_gradient(params))
            vocab = max(model.config.vocab_size, teacher_model.config.vocab_size)
            with jax.named_scope("teacher"):
                known = (jax.lax.stop_gradient(teacher_model.read_batch(teacher_params, batch).hidden_BTD),)

        def apart_of(logits_BTV, *known):
            if teacher is None:
                return stored_divergences(logits_BTV[..., :words], *known, divergence, temperature, jsd_beta)
            known_BTV = jax.lax.stop_gradient(teacher_model.logits(teacher_params, *known))
            return divergences(logits_BTV, known_BTV, divergence, temperature, jsd_beta)

        @jax.checkpoint
        def piece(hidden_BTD, targets_BT, *known):
            logits_BTV = model.logits(params, hidden_BTD)
            log_probs_BTV = jax.nn.log_softmax(logits_BTV)
            nll_BT = -jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], axis=-1)[..., 0]
            return nll_BT, apart_of(logits_BTV, *known)

        nll_BT, divergence_BT = _by_columns(piece, vocab, output.hidden_BTD, batch["targets"], *known)
        weights_BT = batch["loss_weights"].astype(jnp.float32)
        nll, apart = jnp.sum(weights_BT * nll_BT), jnp.sum(weights_BT * divergence_BT)
        count = jnp.sum(weights_BT)
        router_loss = output.router_loss * count
        numerator = alpha * nll + (1 - alpha) * temperature**2 * apart + router_loss
        metrics = {
            "nll": Metric(nll, count),
            "divergence": Metric(apart, count),
            "router_loss": Metric(router_loss, count),
        }
        if "target_bytes" in batch:
            metrics["bits_per_byte"] = Metric(nll / jnp.log(2.0), jnp.sum(weights_BT * batch["target_bytes"]))
        return numerator, count, metrics

    return loss_fn


def teacher_likeliest(
    model: LanguageModel, params: Params, batch: Batch, k: int, words: int, temperature: float
) -> tuple[Array, Array]:
    """`likeliest` of a teacher for all tokens of packed rows, (B, T, k) each."""
    output = model.read_batch(params, batch)

    def piece(hidden_BTD):
        return likeliest(model.logits(params, hidden_BTD), k, words, temperature)

    return _by_columns(piece, model.config.vocab_size, output.hidden_BTD)


def _by_columns(function: Callable, vocab: int, *arrays: Array) -> tuple[Array, ...]:
    """function(*arrays), (B, T, ...) each, over as many columns at a time as make PIECE_BYTES of logits; they divide
    T."""
    B, T = arrays[0].shape[:2]
    most = max(1, PIECE_BYTES // (4 * B * vocab))
    columns = max(size for size in range(1, T + 1) if T % size == 0 and size <= most)
    if columns == T:
        return function(*arrays)

    def pieces(array: Array) -> Array:  # (T / columns, B, columns, ...): rows stay where they are on a mesh
        return jnp.moveaxis(array.reshape(B, T // columns, columns, *array.shape[2:]), 1, 0)

    found = jax.lax.map(lambda each: function(*each), tuple(map(pieces, arrays)))
    return tuple(jnp.moveaxis(array, 0, 1).reshape(B, T, *array.shape[3:]) for array in found)

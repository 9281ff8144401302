"""Losses of classifiers: cross entropy of one class a text, or binary cross entropy of any number of them."""

import jax
import jax.numpy as jnp
from jax import Array

from minimind_jax.losses import Batch, LossFn, Metric, Metrics
from minimind_jax.losses.sequences import last_hidden
from minimind_jax.model.heads import scores
from minimind_jax.model.image_model import ImageModel
from minimind_jax.model.transformer import LanguageModel, Params


def class_losses(logits: Array, values: Array, weights: Array, several: bool, label_smoothing: float = 0.0) -> Array:
    """The loss of each text, (...,).

    logits (..., C). values: (..., 1) the class's number, or with `several` (..., C) a 0 or 1 for each class.
    weights (C,): of the classes; of the cross entropy of a text in one class as torch.nn.CrossEntropyLoss has them
    (there divided by their sum over the batch, here by the caller), of the positive term of each of several classes as
    in torch.nn.BCEWithLogitsLoss(pos_weight), averaged over classes.
    """
    if several:
        positive, negative = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
        values = values * (1 - label_smoothing) + label_smoothing / 2
        return -jnp.mean(weights * values * positive + (1 - values) * negative, axis=-1)
    log_probs = jax.nn.log_softmax(logits)
    classes = values[..., 0].astype(jnp.int32)
    own = jnp.take_along_axis(log_probs, classes[..., None], axis=-1)[..., 0]
    smooth = jnp.mean(weights * log_probs, axis=-1)
    return -((1 - label_smoothing) * jnp.take(weights, classes) * own + label_smoothing * smooth)


def make_classification_loss(
    model: LanguageModel | ImageModel, weights: Array, *, several: bool = False, label_smoothing: float = 0.0
) -> LossFn:
    """The loss of a model with a head of C scores (see `model.heads`) on packed rows of labelled texts, or pictures.

    loss = sum of `class_losses` over the texts, over the sum of the weights of their classes (of 1 with `several`).
    The logits of a text are those of its last token, as in transformers' Qwen3ForSequenceClassification; a picture is
    a document of one token.
    Batch: tokens, positions, segment_ids (B, T), and `values` (B, S, 1 or C) of each document (see `class_losses`),
    S being at least the number of documents in a row.
    Metrics: accuracy (with `several`: of all the yes and no), router_loss; tokens, the number read.
    """

    def loss_fn(params: Params, batch: Batch, key: Array | None) -> tuple[Array, Array, Metrics]:
        segments_BT, values_BSX = batch["segment_ids"], batch["values"]
        output = model.read_batch(params, batch, key)
        hidden_BSD, held_BS = last_hidden(output.hidden_BTD, segments_BT, room=values_BSX.shape[1])
        logits_BSC = scores(params, hidden_BSD)
        losses_BS = class_losses(logits_BSC, values_BSX, weights, several, label_smoothing)
        if several:
            right_BS = jnp.mean((logits_BSC > 0) == (values_BSX > 0.5), axis=-1)
            weight_BS = held_BS.astype(jnp.float32)
        else:
            classes_BS = values_BSX[..., 0].astype(jnp.int32)
            right_BS = jnp.argmax(logits_BSC, axis=-1) == classes_BS
            weight_BS = jnp.where(held_BS, jnp.take(weights, classes_BS), 0)
        texts, weight = jnp.sum(held_BS).astype(jnp.float32), jnp.sum(weight_BS)
        router_loss = output.router_loss * weight
        metrics = {
            "accuracy": Metric(jnp.sum(jnp.where(held_BS, right_BS, 0)).astype(jnp.float32), texts),
            "router_loss": Metric(router_loss, weight, held_out=False),
            "tokens": Metric(jnp.sum(segments_BT > 0).astype(jnp.float32), held_out=False),
        }
        return jnp.sum(jnp.where(held_BS, losses_BS, 0)) + router_loss, weight, metrics

    return loss_fn

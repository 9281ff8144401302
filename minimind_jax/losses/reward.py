"""The Bradley-Terry loss of reward models: the better answer of a pair shall have the higher score."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from minimind_jax.losses import Batch, LossFn, Metric, Metrics
from minimind_jax.losses.sequences import last_hidden, pair_room
from minimind_jax.model.heads import scores
from minimind_jax.model.transformer import LanguageModel, Params


def bradley_terry(chosen: Array, rejected: Array, margin: Array | float = 0.0, centring: float = 0.0) -> Array:
    """-log sigma(chosen - rejected - margin) + centring (chosen + rejected)^2, of each pair of scores.

    The margin is that of Llama 2 (arXiv 2307.09288), the second term keeps scores around 0 (arXiv 2312.09244).
    """
    return -jax.nn.log_sigmoid(chosen - rejected - margin) + centring * jnp.square(chosen + rejected)


def make_reward_loss(model: LanguageModel, centring: float = 0.0) -> LossFn:
    """The loss of a model with a head of one score (see `model.heads`) on packed rows of pairs.

    An answer's score is that of the last token of its conversation. Batch: as in `preference`, and `margins` (B, S),
    the margin of a pair in the place of its first document.
    Metrics, under TRL's names: accuracy, margin, mean_, min_ and max_reward, router_loss; tokens, the number read.
    """

    def loss_fn(params: Params, batch: Batch, key: Array | None) -> tuple[Array, Array, Metrics]:
        segments_BT, room = batch["segment_ids"], pair_room(batch["tokens"].shape[1])
        output = model.read_batch(params, batch, key)
        hidden_BSD, held_BS = last_hidden(output.hidden_BTD, segments_BT, room)
        scores_BS = scores(params, hidden_BSD)[..., 0]
        chosen, rejected = scores_BS[:, 0::2], scores_BS[:, 1::2]
        is_pair = held_BS[:, 0::2] & held_BS[:, 1::2]
        pairs = jnp.sum(is_pair).astype(jnp.float32)
        total = functools.partial(jnp.sum, where=is_pair)
        router_loss = output.router_loss * pairs
        losses = bradley_terry(chosen, rejected, batch["margins"][:, 0::2], centring)
        metrics = {
            "accuracy": Metric(total(chosen > rejected), pairs),
            "margin": Metric(total(chosen - rejected), pairs),
            "mean_reward": Metric(total(chosen + rejected), 2 * pairs),
            "min_reward": Metric(jnp.min(jnp.minimum(chosen, rejected), where=is_pair, initial=jnp.inf), by="min"),
            "max_reward": Metric(jnp.max(jnp.maximum(chosen, rejected), where=is_pair, initial=-jnp.inf), by="max"),
            "router_loss": Metric(router_loss, pairs, held_out=False),
            "tokens": Metric(jnp.sum(segments_BT > 0).astype(jnp.float32), held_out=False),
        }
        return total(losses) + router_loss, pairs, metrics

    return loss_fn

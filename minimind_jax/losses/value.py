"""A value model, which foresees what an episode will still earn, and its loss."""

import jax.numpy as jnp
from jax import Array

from minimind_jax.losses import Batch
from minimind_jax.model.heads import scores
from minimind_jax.model.transformer import LanguageModel, ModelOutput, Params


def values(model: LanguageModel, params: Params, batch: Batch, key: Array | None = None) -> tuple[Array, ModelOutput]:
    """What is foreseen at each column of `targets` (B, C) before it is chosen, float32 (B, C): the last C of T columns;
    and the model's output.

    params: of a body and a head of one score (see `model.heads`), which reads the hidden states behind the final norm,
    as those of `classification` do. Batch: see `LanguageModel.read_batch`.
    """
    output = model.read_batch(params, batch, key)
    return scores(params, output.hidden_BTD[:, -batch["targets"].shape[1] :])[..., 0], output


def value_losses(values: Array, old_values: Array, returns: Array, clip: float) -> tuple[Array, Array]:
    """Half the squared error of each value, and where the clip made it larger; any shape.

    With v' = v within `clip` of the value of the rollout: max((v - return)^2, (v' - return)^2) / 2, as in PPO's own
    code; 0 for no clip.
    """
    errors = jnp.square(values - returns)
    if not clip:
        return errors / 2, jnp.zeros_like(errors, bool)
    near = jnp.square(old_values + jnp.clip(values - old_values, -clip, clip) - returns)
    return jnp.maximum(errors, near) / 2, near > errors

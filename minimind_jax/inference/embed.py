"""Texts as vectors: the mean of a language model's last hidden states."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from minimind_jax.inference.buckets import by_length
from minimind_jax.model.transformer import LanguageModel, Params

ROWS = 8  # read at once


class Embedder:
    """A model, seen as one that embeds."""

    def __init__(self, model: LanguageModel):
        @jax.jit
        def mean(params, tokens_BT, lengths_B):
            hidden_BTD = model.read_rows(params, model.embed(params, tokens_BT), lengths_B=lengths_B).hidden_BTD
            is_token_BT1 = (jnp.arange(tokens_BT.shape[1]) < lengths_B[:, None])[..., None]
            return jnp.sum(hidden_BTD.astype(jnp.float32), axis=1, where=is_token_BT1) / lengths_B[:, None]

        self._mean, self._width = mean, model.config.hidden_size

    def embed(self, params: Params, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 (prompts, D): the mean over the tokens of what the last norm makes of them; no prompt is empty."""
        found_ND = np.zeros((len(prompts), self._width), np.float32)
        for chosen, tokens_BT, lengths_B in by_length(prompts, lambda width, left: ROWS, multiple=256):
            found_ND[chosen] = np.asarray(self._mean(params, tokens_BT, lengths_B))[: len(chosen)]
        return found_ND

"""More words for a model: rows of its embedding and of its head."""

import jax
import numpy as np
from jax import Array

from minimind_jax.model.transformer import Params

SPREAD = 0.01  # of new rows around the mean of the old ones, in standard deviations of those


def grow_vocabulary(params: Params, vocab_size: int, key: Array) -> Params:
    """The parameters (NumPy) of the same model with `vocab_size` words; the same ones if it has as many.

    New rows are drawn around the mean of the old ones, a column's noise SPREAD of its standard deviation: so a new word
    is at first about as likely as the average one and takes nothing from the others, and no two are alike.
    """
    grown = dict(params)
    embed_key, head_key = jax.random.split(key)
    grown["embed"] = {"embedding": _with_rows(params["embed"]["embedding"], vocab_size, embed_key)}
    if "lm_head" in params:
        grown["lm_head"] = {"kernel": _with_rows(params["lm_head"]["kernel"].T, vocab_size, head_key).T}
    return grown


def _with_rows(rows_VD: np.ndarray, count: int, key: Array) -> np.ndarray:
    missing = count - len(rows_VD)
    if missing <= 0:
        return rows_VD
    noise = np.asarray(jax.random.normal(key, (missing, rows_VD.shape[1])))
    new = rows_VD.mean(axis=0) + SPREAD * rows_VD.std(axis=0) * noise
    return np.concatenate([rows_VD, new.astype(rows_VD.dtype)])

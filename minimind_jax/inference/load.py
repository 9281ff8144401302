"""Models from their folders, ready to compute with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from minimind_jax.convert.load import folders_of, load_merged, load_tokenizer
from minimind_jax.errors import UserError
from minimind_jax.folders import resolve_model_folder
from minimind_jax.inference.adapters import load_adapters
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.generation_config import read_generation_config
from minimind_jax.model.config import ComputeConfig
from minimind_jax.model.heads import SCORE
from minimind_jax.model.transformer import LanguageModel, Params, cast_matrices


def load_engine(name: str, dtype: str = "auto", adapters: Sequence[str] = (), **options: Any) -> Engine:
    """The model in a Hugging Face folder, or the model/ of a run (name or path), with its tokenizer.

    dtype: as of `ComputeConfig`. adapters: see `load_adapters`. options: of the `Engine`. Raises UserError: there is no
    such model, or its files do not fit together.
    """
    folder = resolve_model_folder(name)
    model, params = load_model(folder, dtype)
    tokenizer = load_tokenizer(folder)
    defaults = read_generation_config(*folders_of(folder))
    trees, ends = load_adapters(folder, model.config, adapters)
    eos_ids = {*defaults.eos_ids, *model.config.end_ids, *tokenizer.end_ids, *ends}
    return Engine(model, params, tokenizer, eos_ids, defaults.sampling, adapters=trees, **options)


def load_model(
    folder: str | Path, dtype: str = "auto", has_head: bool = False, deterministic: bool = False
) -> tuple[LanguageModel, Params]:
    """A model and its parameters, matrices in the compute dtype; an adapter is merged in.

    has_head: it may be a classifier or reward model. deterministic: as of `ComputeConfig`. Raises UserError.
    """
    config, params = load_merged(folder)
    if SCORE in params and not has_head:
        raise UserError(
            f"{folder} is a classifier or reward model and has no words to say; use minimind classify predict, or "
            "minimind score"
        )
    model = LanguageModel(config, ComputeConfig(dtype=dtype, deterministic=deterministic))
    return model, jax.tree.map(jnp.asarray, cast_matrices(params, model.dtype))

"""Folders of classifiers of pictures, a SigLIP tower with a linear head: transformers' SiglipForImageClassification."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minimind_jax.convert.hf_config import HEADED, head_config
from minimind_jax.convert.hf_vision import open_tower, to_tower_config
from minimind_jax.convert.torch_file import read_weights
from minimind_jax.convert.vision_weights import TOWER, tower_tensors
from minimind_jax.errors import UserError
from minimind_jax.model.config import TowerConfig
from minimind_jax.model.heads import SCORE
from minimind_jax.model.transformer import Params
from minimind_jax.model.vision import VISION
from minimind_jax.paths import as_path, local_folder
from minimind_jax.texts import is_there, read_object

HEAD = "classifier"  # its tensors


def is_picture_classifier(folder: str | Path) -> bool:
    """Whether a folder holds a classifier of pictures."""
    file = local_folder(as_path(folder)) / "config.json"
    return is_there(file) and HEADED["siglip"] in (read_object(file).get("architectures") or ())


def picture_config(tower: TowerConfig, labels: Sequence[str], several: bool, dtype: str) -> dict[str, Any]:
    """The `config.json` of a classifier of pictures whose tensors are stored as `dtype`."""
    headed = head_config("siglip", labels, several)
    unused = {"bos_token_id": None, "eos_token_id": None}  # transformers warns of its own defaults
    types = {"torch_dtype": dtype, "dtype": dtype, "text_config": unused}
    return {**headed, "model_type": "siglip", **types, "vision_config": to_tower_config(tower, dtype)}


def picture_tensors(params: Params) -> dict[str, np.ndarray]:
    """Every tensor of a classifier of pictures under its name there and in torch's layout, as views of NumPy arrays."""
    tower, head = params[VISION]["tower"], params[SCORE]
    tensors = {"vision_model." + name.removeprefix(TOWER): array for name, array in tower_tensors(tower).items()}
    return {**tensors, f"{HEAD}.weight": head["kernel"].T, f"{HEAD}.bias": head["bias"]}


def load_picture_head(folder: str | Path) -> Params:
    """The head of a classifier of pictures, float32 (NumPy): kernel (W, C) and bias (C,)."""
    stored = read_weights(local_folder(as_path(folder)))
    if missing := {f"{HEAD}.weight", f"{HEAD}.bias"} - stored.keys():
        raise UserError(f"{folder}: the weights of a classifier lack {', '.join(sorted(missing))}")
    kernel_CW, bias_C = (stored[f"{HEAD}.{name}"].read(...).astype(np.float32) for name in ("weight", "bias"))
    return {"kernel": kernel_CW.T, "bias": bias_C}


def load_picture_classifier(folder: str | Path) -> tuple[TowerConfig, Params]:
    """Its configuration and parameters, float32 (NumPy). Raises UserError where they do not fit each other."""
    tower, head = open_tower(folder), load_picture_head(folder)
    if head["kernel"].shape[0] != tower.config.hidden_size:
        raise UserError(
            f"{folder}: the head reads {head['kernel'].shape[0]} numbers, and the tower says {tower.config.hidden_size}"
        )
    return tower.config, {VISION: {"tower": tower.params()}, SCORE: head}

"""MiniMind-V's checkpoints: a MiniMind-3 with a projector, and without its tower, which is a SigLIP2 of Google's."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minimind_jax.convert.hf_config import from_hf_config
from minimind_jax.convert.hf_vision import open_tower
from minimind_jax.convert.hf_weights import StoredTensor, matching_tensors
from minimind_jax.convert.torch_file import read_weights
from minimind_jax.convert.vision_weights import PROJECTOR
from minimind_jax.errors import UserError
from minimind_jax.model.config import ModelConfig, Vision
from minimind_jax.texts import is_there, read_object

MODEL_TYPE = "minimind-v"
MARKER = "<|image_pad|>"
MARKER_ID = 12  # of it in MiniMind's tokenizer

_MODULES = {"vision_proj.mlp.0": "layer_norm", "vision_proj.mlp.1": "linear_1", "vision_proj.mlp.3": "linear_2"}
_NAMES = {f"{old}.{kind}": f"{PROJECTOR}{new}.{kind}" for old, new in _MODULES.items() for kind in ("weight", "bias")}
_TOWER = "vision_encoder."  # in files for resuming: frozen, so as it was published


def has_projector(stored: Mapping[str, StoredTensor]) -> bool:
    """Whether a state dict is MiniMind-V's."""
    return any(name.startswith("vision_proj.") for name in stored)


def with_tower(
    config: ModelConfig, stored: Mapping[str, StoredTensor], tower: str | Path, marker_id: int, where: str
) -> tuple[ModelConfig, dict[str, StoredTensor]]:
    """The whole model: configuration and tensors under the names of `hf_tensors`.

    config: of its language model. stored: MiniMind-V's tensors. tower: the folder of the SigLIP2 it was trained with.
    Raises UserError: there is none, or the projector is another than that of MiniMind-3-V, or not of this tower.
    """
    if not tower:
        raise UserError(
            f"{where} is MiniMind-V's and comes without its tower: give the folder of the one it was trained with "
            "(siglip2-base-p32-256-ve), --vision FOLDER"
        )
    projector = {name for name in stored if name.startswith("vision_proj.")}
    if projector != _NAMES.keys():
        raise UserError(f"{where} has the projector of an older MiniMind-V than minimind-3v, which is not read")
    text = {name: tensor for name, tensor in stored.items() if not name.startswith(("vision_proj.", _TOWER))}
    tower_model = open_tower(tower)
    config = dataclasses.replace(config, vision=Vision(tower_model.config, marker_id, "minimind_v"))
    tensors = text | {new: stored[old] for old, new in _NAMES.items()} | tower_model.tensors
    return config, matching_tensors(config, tensors, where)


def is_minimind_v(folder: Path) -> bool:
    """Whether a folder is of the form in which MiniMind-V's own code saves for transformers."""
    file = folder / "config.json"
    return is_there(file) and read_object(file).get("model_type") == MODEL_TYPE


def open_minimind_v(folder: Path, tower: str | Path) -> tuple[ModelConfig, dict[str, StoredTensor]]:
    """`with_tower` of such a folder. Raises UserError, too, where the tower makes other than its number of tokens."""
    file = folder / "config.json"
    values: dict[str, Any] = read_object(file)
    text = {name: value for name, value in values.items() if name != "architectures"}  # it names code of its own
    config = from_hf_config({**text, "model_type": "minimind"}, str(file))
    marker_ids = values.get("image_ids", [MARKER_ID])
    if not (isinstance(marker_ids, list) and marker_ids and isinstance(marker_ids[0], int)):
        raise UserError(f"{file}: image_ids is {marker_ids!r}; expected a list with the id of the token of images")
    config, tensors = with_tower(config, read_weights(folder), tower, marker_ids[0], str(folder))
    made, said = config.vision.image_tokens, values.get("image_token_len", config.vision.image_tokens)
    if made != said:
        raise UserError(f"{file}: an image is {said} tokens, and the tower {tower} makes {made}; it is another tower")
    return config, tensors

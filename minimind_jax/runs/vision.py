"""A run's model that sees: where its tower and projector come from, and which of its parts learn."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from minimind_jax.config.stages import RunConfig, SeeingConfig, VisionConfig
from minimind_jax.convert.hf_vision import open_tower, read_tower_config, tower_named
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.folders import resolve_model_folder
from minimind_jax.model import lora
from minimind_jax.model.config import ModelConfig, TowerConfig, Vision
from minimind_jax.model.image_model import ImageModel
from minimind_jax.model.transformer import LanguageModel, Params
from minimind_jax.model.vision import VISION, init_vision
from minimind_jax.paths import as_path
from minimind_jax.texts import is_there
from minimind_jax.training.state import Parameters

TOWER = "vision.tower"  # the setting


def with_vision(
    config: RunConfig, architecture: ModelConfig, tokenizer: Tokenizer, models: Mapping[str, Path]
) -> ModelConfig:
    """The architecture with the tower and projector that `config` gives a model of texts; as it is where it sees
    already, and of a stage of texts alone. Raises UserError: no tower or two of them, a tokenizer without the marker,
    adapters over a projector that is new."""
    if not isinstance(config, SeeingConfig):
        return architecture
    wanted, tower = config.vision, models.get(TOWER)
    if architecture.vision is not None:
        if tower is not None:
            raise UserError(
                f"init_from {config.init_from} sees already; leave {TOWER} out, or start from its text model"
            )
        return architecture
    if tower is None:
        raise UserError(f"init_from {config.init_from} is a model of texts: give --{TOWER} a SigLIP folder to see with")
    if config.lora.rank:
        raise UserError(
            f"{TOWER} gives the model a new projector, which lora.rank would not train; train it first (lora.rank 0, "
            "vision.train projector), then adapters over the model that comes out"
        )
    marker = tokenizer.vocabulary().get(wanted.marker)
    if marker is None:
        raise UserError(
            f"vision.marker {wanted.marker} is no token of {tokenizer.folder}; name one that texts never have"
        )
    return _seeing(architecture, open_tower(tower).config, marker, wanted)


def planned_vision(config: RunConfig, architecture: ModelConfig) -> ModelConfig:
    """`with_vision` for a plan: the shapes alone, of a tower that may not be there but for its name."""
    if not isinstance(config, SeeingConfig) or architecture.vision is not None or not config.vision.tower:
        return architecture
    name = config.vision.tower
    tower = None if is_there(as_path(name) / "config.json") else tower_named(name)
    tower = tower or read_tower_config(resolve_model_folder(name, TOWER))
    return _seeing(architecture, tower, 0, config.vision)  # a marker's number changes no shape


def _seeing(architecture: ModelConfig, tower: TowerConfig, marker: int, wanted: VisionConfig) -> ModelConfig:
    try:
        vision = Vision(tower, marker, wanted.projector, wanted.pixel_shuffle)
    except ValueError as error:
        raise UserError(f"vision.{error}") from error
    return dataclasses.replace(architecture, vision=vision)


def new_vision(config: ModelConfig, tower: Path, key: jax.Array) -> Params:
    """The branch of a model's parameters with a tower out of a folder, and a projector drawn from `key`."""
    drawn = init_vision(config.vision, config.hidden_size, config.initializer_range, key)
    return {**drawn, "tower": open_tower(tower).params()}


def with_trained_parts(config: RunConfig, model: LanguageModel | ImageModel, parameters: Parameters) -> Parameters:
    """The parameters of which those are trained that `vision.train` says; of a stage of texts alone none of what a
    model sees with. Adapters are trained alone."""
    if config.of_pictures:
        return parameters._replace(is_trained=lambda path: config.vision.train == "tower")
    if model.config.vision is None or model.adapter is not None:
        return parameters
    wanted = config.vision.train if isinstance(config, SeeingConfig) else "words"

    def is_trained(path: lora.Path) -> bool:
        if path[0] != VISION:
            return wanted != "projector" and (wanted != "ends" or path[0] == "layers")
        return wanted == "tower" or (path[1] == "projector" and wanted != "words")

    def layers(path: lora.Path) -> Sequence[int] | None:
        return (0, model.config.num_hidden_layers - 1) if wanted == "ends" and path[0] == "layers" else None

    return parameters._replace(is_trained=is_trained, layers=layers)

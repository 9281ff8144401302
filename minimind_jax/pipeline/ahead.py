"""What a stage will start from, known before the stages that make it have run."""

from collections.abc import Sequence
from pathlib import Path

from minimind_jax.config.stages import RunConfig
from minimind_jax.convert.load import read_config
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.folders import resolve_model_folder, resolve_run
from minimind_jax.model.config import ModelConfig
from minimind_jax.pipeline.read import Stage
from minimind_jax.runs.parts import with_settings
from minimind_jax.runs.vision import planned_vision


def maker_of(name: str, before: Sequence[Stage]) -> Stage | None:
    """The stage that makes the run or the tokenizer `name`."""
    return next((made for made in before if name and made.folder in (Path(name), resolve_run(name))), None)


def planned_architecture(config: RunConfig, before: Sequence[Stage]) -> ModelConfig:
    """The model that a stage will have, from the settings of those that make it."""
    return planned_vision(config, _language_model(config, before))


def _language_model(config: RunConfig, before: Sequence[Stage]) -> ModelConfig:
    if not config.init_from:
        tokens = None if config.model.vocab_size else planned_words(config, before)
        return config.model.resolve(**({"vocab_size": tokens} if tokens else {}))
    maker = maker_of(config.init_from, before)
    if maker is None:
        folder = resolve_model_folder(config.init_from, "init_from")
        return with_settings(read_config(folder), config.model, folder)
    return with_settings(planned_architecture(maker.config, before[: before.index(maker)]), config.model, maker.folder)


def planned_words(config: RunConfig, before: Sequence[Stage]) -> int | None:
    """How many tokens the stage's tokenizer has at most; None for that of the model it starts from."""
    if not config.tokenizer:
        return None
    maker = maker_of(config.tokenizer, before)
    return maker.config.vocab_size if maker else Tokenizer.load(config.tokenizer).vocab_size

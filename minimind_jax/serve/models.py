"""The models that are served, by name."""

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import psutil

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.config.serving import ServeConfig
from minimind_jax.convert.hf import load_labels
from minimind_jax.convert.hf_image_classifier import is_picture_classifier
from minimind_jax.convert.load import read_config
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.folders import is_adapter, resolve_model_folder
from minimind_jax.inference.constrain import Grammars
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.load import load_engine
from minimind_jax.inference.score import Embedder, PictureScorer, Scorer
from minimind_jax.model.config import ComputeConfig, Vision
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.serve import log
from minimind_jax.serve.errors import ApiError

PIECE, LEAST = 128, 256  # tokens: by which a context is made to fit, and that it has at least


@dataclasses.dataclass(eq=False)
class Served:
    """A model under its name: a language model, which has an engine and grammars for its words, or one that scores."""

    name: str
    folder: Path
    engine: Engine | None = None
    scorer: Scorer | PictureScorer | None = None
    grammars: Grammars | None = None
    adapter: str = ""  # of the engine's, that answers; "" the model itself
    parent: str | None = None  # the name of an adapter's model
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))  # seconds since 1970
    weights: str | None = None  # the version that who replaced the weights has named; None before

    @property
    def tokenizer(self) -> Tokenizer:
        return (self.engine or self.scorer).tokenizer

    @property
    def context(self) -> int | None:
        """None of a model of pictures alone."""
        return self.engine.context if self.engine else getattr(self.scorer, "max_tokens", None)

    @property
    def vision(self) -> Vision | None:
        """None of a model that reads words alone."""
        return self.engine.model.config.vision if self.engine else None

    @property
    def reads(self) -> list[str]:
        if isinstance(self.scorer, PictureScorer):
            return ["image"]
        return ["text", "image"] if self.vision else ["text"]

    @property
    def vocabulary(self) -> int:
        return (self.engine or self.scorer).model.config.vocab_size

    @functools.cached_property
    def embedder(self) -> Embedder:
        return Embedder(self.engine.model)

    @property
    def sampling(self) -> SamplingConfig:
        return self.engine.sampling

    @property
    def kind(self) -> str:
        if self.engine:
            return "generate"
        return "score" if len(self.scorer.labels.names) == 1 else "classify"

    @property
    def metadata(self) -> dict[str, Any]:
        """What a whole answer tells of its model, as SGLang's do."""
        return {"metadata": {"weight_version": self.weights}} if self.weights is not None else {}


class Models:
    """All that are served."""

    def __init__(self, served: list[Served]):
        self._by_name = {each.name: each for each in served}

    def __iter__(self) -> Iterator[Served]:
        return iter(self._by_name.values())

    @property
    def engines(self) -> list[Engine]:
        return list({id(each.engine): each.engine for each in self if each.engine}.values())

    def close(self) -> None:
        for each in self:
            if each.grammars:
                each.grammars.close()

    def get(self, name: str | None, kind: str = "") -> Served:
        """The model of that name, which must be of the kind or read it; without a name the first of those. Raises
        ApiError."""
        fitting = [each for each in self if kind in ("", each.kind, *each.reads)]
        if not name and fitting:
            return fitting[0]
        found = self._by_name.get(name)
        names = ", ".join(each.name for each in fitting) or "none"
        if found is None:
            what = "a model" if not name else f"the model {name[:80]!r}"
            raise ApiError(404, f"{what} that can do this is not here; there are: {names}", "model", "model_not_found")
        if found not in fitting:
            raise ApiError(400, f"the model {found.name} is for {found.kind}; for this there are: {names}", "model")
        return found


def load_models(config: ServeConfig) -> Models:
    """Raises UserError for a folder that is no model, and two of one name."""
    served: list[Served] = []
    for entry in config.model:
        name, path = _named(entry)
        folder = resolve_model_folder(path)
        if not is_adapter(folder) and load_labels(folder) is not None:
            scorer = PictureScorer(path) if is_picture_classifier(folder) else Scorer(path)
            served.append(Served(name, folder, scorer=scorer))
            continue
        adapters = () if any(each.engine for each in served) else config.adapters
        served += _language_models(name, folder, path, adapters, config)
    if config.adapters and not any(each.engine for each in served):
        raise UserError("adapters are given, and no language model that they belong to")
    names = [each.name for each in served]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"two models are called {twice}; name one of them: --model OTHER=FOLDER")
    return Models(served)


def _language_models(
    name: str, folder: Path, path: str, adapters: Sequence[str], config: ServeConfig
) -> Iterator[Served]:
    """A model, and its adapters under their names, which share its engine."""
    context = context_of(folder, config)
    engine = load_engine(path, config.dtype, adapters, slots=config.slots, context=context, queue=config.queue)
    grammars = Grammars(engine.tokenizer, engine.model.config.vocab_size, engine.eos_ids)
    yield Served(name, folder, engine, grammars=grammars)
    for adapter in engine.adapters:
        yield Served(adapter, folder, engine, grammars=grammars, adapter=adapter, parent=name)


def context_of(folder: Path, config: ServeConfig) -> int:
    """The model's context, or as much of it as a third of the free memory holds for all slots. Raises UserError."""
    own = read_config(folder).max_position_embeddings
    if config.context:
        return min(config.context, own)
    model = LanguageModel(read_config(folder), ComputeConfig(dtype=config.dtype))
    cache = jax.eval_shape(lambda: model.new_cache(config.slots, PIECE))
    piece = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    fits = int(free_memory() / 3 / piece) * PIECE
    if fits < min(own, LEAST):
        raise UserError(f"memory for {config.slots} slots of {LEAST} tokens is not there; set fewer --slots")
    if fits < own:
        log.logger.info("context: %d tokens of the model's %d fit into the memory (--context, --slots)", fits, own)
    return min(fits, own)


def free_memory() -> int:
    """Bytes that the first device has left."""
    told = jax.devices()[0].memory_stats() or {}
    limit = told.get("bytes_limit")
    return limit - told.get("bytes_in_use", 0) if limit else psutil.virtual_memory().available


def _named(entry: str) -> tuple[str, str]:
    """(name, folder) of NAME=FOLDER; without a name it is the run's, or the last part of the folder that says it."""
    name, given, path = entry.partition("=")
    if given and name and path and "/" not in name:
        return name, path
    parts = [part for part in Path(entry).parts if part not in ("model", "/", ".", "..")]
    return (parts[-1] if parts else Path(entry).resolve().name), entry

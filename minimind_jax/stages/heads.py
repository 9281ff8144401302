"""What the stages with a head of scores share: reward models and classifiers."""

import dataclasses

import jax
import numpy as np

from minimind_jax.config import PretrainConfig
from minimind_jax.convert.hf import load_hf, load_labels
from minimind_jax.data.batches import Annotate, Batch, Piece
from minimind_jax.data.token_cache import TokenCache
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.folders import is_adapter, resolve_model_folder
from minimind_jax.model.heads import SCORE, head_axes, init_head
from minimind_jax.model.transformer import LanguageModel, Params
from minimind_jax.seeds import named_key
from minimind_jax.sharding import announce, make_mesh, param_shardings
from minimind_jax.stages.common import load_model, run_parameters
from minimind_jax.training.state import Parameters


def load_body(config: PretrainConfig, tokenizer: Tokenizer, stage: str) -> LanguageModel:
    """The network below a head of scores: that of `config.init_from`, without its language model's head."""
    if not config.init_from:
        raise UserError(f"{stage} needs a model to start from: give --init_from")
    model = load_model(config, tokenizer)
    return dataclasses.replace(model, config=dataclasses.replace(model.config, tie_word_embeddings=True))


def with_head(config: PretrainConfig, model: LanguageModel, labels: tuple[str, ...]) -> Parameters:
    """The parameters of a run with a head of these scores: the one of init_from if it has the same, or a new one."""
    scores = len(labels)
    parameters = run_parameters(config, model, has_head=True)
    abstract = jax.eval_shape(lambda: init_head(jax.random.key(0), model.config.hidden_size, scores))
    shardings = param_shardings(make_mesh(config.mesh), head_axes(), abstract)

    def load() -> Params:
        folder = resolve_model_folder(config.init_from, "init_from")
        head = init_head(named_key(config.seed, "head"), model.config.hidden_size, scores)
        found = None if is_adapter(folder) else load_labels(folder)
        if found is not None and found.names == labels:
            head = {SCORE: load_hf(folder)[1][SCORE]}
        elif found is not None:
            announce(f"the labels are not those of {folder}: its head is left out, and a new one trained")
        return {**parameters.load(), **jax.device_put(head, shardings)}

    return Parameters(
        {**parameters.abstract, **abstract},
        {**parameters.axes, **head_axes()},
        load,
        lambda path: path[0] == SCORE or parameters.is_trained(path),
    )


def values_of_pieces(name: str, room: int) -> Annotate:
    """An `Annotate` that gives a row the values of its pieces' documents as `name`: (room, width), 0 where is none."""

    def annotate(cache: TokenCache, pieces: list[Piece]) -> Batch:
        found = np.zeros((room, cache.values.shape[1]), np.float32)
        found[: len(pieces)] = cache.values[[document for document, *_ in pieces]]
        return {name: found}

    return annotate

"""What the stages with a head of scores share: reward models and classifiers."""

import dataclasses
import json

import jax
import numpy as np

from minimind_jax.config.stages import RunConfig
from minimind_jax.convert.hf import Labels, load_hf, load_labels
from minimind_jax.convert.load import base_folder
from minimind_jax.data.epoch import Annotate
from minimind_jax.data.labels import label_changes
from minimind_jax.data.rows import Batch, Pieces
from minimind_jax.data.token_cache import TokenCache
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.folders import holds_model, is_adapter, resolve_model_folder
from minimind_jax.model.heads import SCORE, head_axes, init_head
from minimind_jax.model.transformer import LanguageModel, Params
from minimind_jax.runs.models import build_model, run_parameters
from minimind_jax.seeds import named_key
from minimind_jax.sharding import announce, make_mesh, param_shardings
from minimind_jax.texts import is_there, read_object
from minimind_jax.training.run import RunFolder, write_text
from minimind_jax.training.state import Parameters
from minimind_jax.training.tracking import is_exported


def load_body(config: RunConfig, tokenizer: Tokenizer, stage: str) -> LanguageModel:
    """The network below a head of scores: that of `config.init_from`, without its language model's head."""
    if not config.init_from:
        raise UserError(f"{stage} needs a model to start from: give --init_from")
    model = build_model(config, tokenizer)
    return dataclasses.replace(model, config=dataclasses.replace(model.config, tie_word_embeddings=True))


def with_head(config: RunConfig, model: LanguageModel, labels: Labels) -> Parameters:
    """The parameters of a run with a head of these scores: the one of init_from if it has the same, or a new one, and
    then what is left out is told."""
    scores = len(labels.names)
    parameters = run_parameters(config, model, has_head=True)
    abstract = jax.eval_shape(lambda: init_head(jax.random.key(0), model.config.hidden_size, scores))
    shardings = param_shardings(make_mesh(config.mesh), head_axes(), abstract)

    def load() -> Params:
        folder = resolve_model_folder(config.init_from, "init_from")
        head = init_head(named_key(config.seed, "head"), model.config.hidden_size, scores)
        folder = base_folder(folder) if is_adapter(folder) else folder
        found = load_labels(folder)
        if found is not None and (other := _differing(found, labels)):
            announce(f"the head of {folder} is left out, and a new one trained: {other}")
        elif found is not None:
            order = [found.names.index(name) for name in labels.names] if scores > 1 else [0]
            head = {SCORE: {name: array[..., order] for name, array in load_hf(folder)[1][SCORE].items()}}
        return {**parameters.load(), **jax.device_put(head, shardings)}

    return Parameters(
        {**parameters.abstract, **abstract},
        {**parameters.axes, **head_axes()},
        load,
        lambda path: path[0] == SCORE or parameters.is_trained(path),
    )


def _differing(found: Labels, wanted: Labels) -> str:
    """Why a head's scores are not the wanted ones; "" where they are, in whatever order and whatever a score is called.
    A score among several labels is not trained as one of which the likeliest counts."""
    kinds = [
        "one score (a reward model's)"
        if len(labels.names) == 1
        else f"{'any number' if labels.several else 'one'} of {len(labels.names)} labels a text"
        for labels in (found, wanted)
    ]
    if kinds[0] != kinds[1]:
        return f"it gives {kinds[0]}, and here it is {kinds[1]}"
    changes = label_changes(found.names, wanted.names) if len(wanted.names) > 1 else ""
    return changes and f"it has other labels ({changes})"


def own_labels(run: RunFolder) -> Labels | None:
    """The labels that a classifier's run was started with; None where none are kept (a run of an earlier version)."""
    if is_there(run.labels_file):
        try:
            kept = read_object(run.labels_file)
            return Labels(tuple(kept["names"]), kept["several"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{run.labels_file} is damaged: {error!r}; remove it if {run.model} is there") from error
    return load_labels(run.model)._replace(max_tokens=None) if holds_model(run.model) else None


def keep_labels(run: RunFolder, found: Labels) -> Labels:
    """The labels of a run, in their order, whose data holds the labels `found`; kept in its folder when it starts.

    Raises UserError when they are not those that the run was started with.
    """
    known = own_labels(run) if run.checkpoint_steps() or is_exported(run) else None
    if known is not None:
        changes = label_changes(known.names, found.names)
        if known.several != found.several:
            kinds = {True: "any number of labels a text", False: "one label a text"}
            changes = f"{kinds[found.several]}, and the run had {kinds[known.several]}"
        if changes:
            raise UserError(
                f"the data has other labels than {run.path} was started with ({changes}); go on with the earlier data, "
                "or choose another run name"
            )
        found = known
    if jax.process_index() == 0:
        kept = {"names": found.names, "several": found.several}
        write_text(run.labels_file, json.dumps(kept, ensure_ascii=False) + "\n")
    return found


def values_of_pieces(name: str, room: int) -> Annotate:
    """An `Annotate` that gives rows the values of their pieces' documents as `name`: (rows, room, width), 0 where is
    none."""

    def annotate(cache: TokenCache, pieces: Pieces) -> Batch:
        found = np.zeros((pieces.row_count, room, cache.values.shape[1]), np.float32)
        found[pieces.rows, pieces.segments] = cache.values[pieces.documents]
        return {name: found}

    return annotate

"""The labels of a run whose model has a head of scores: those of its data, kept in its folder when it starts."""

import dataclasses
import functools
import json

import jax
import numpy as np

from minimind_jax.config.classify import ClassifyConfig
from minimind_jax.convert.hf import Labels, load_labels
from minimind_jax.data.labelled_images import check_folders, picture_of
from minimind_jax.data.labels import Classes, find_classes, label_changes
from minimind_jax.data.rows import Pieces
from minimind_jax.data.token_cache import TokenCache
from minimind_jax.errors import UserError
from minimind_jax.folders import holds_model
from minimind_jax.runs.kind import StageKind
from minimind_jax.sharding import announce
from minimind_jax.texts import is_there, read_object
from minimind_jax.training.run import RunFolder, write_text


def labels_of_run(kind: StageKind, run: RunFolder) -> Labels | None:
    """The labels that a run was started with; None of a stage whose model has no head. Raises UserError where none were
    kept, in a run of an earlier version."""
    if kind.labels:
        return Labels(kind.labels)
    found = _own_labels(run) if kind.has_head else None
    if kind.has_head and found is None:
        raise UserError(
            f"{run.path} was made by an earlier version and keeps no {run.labels_file.name}; give its command "
            "again with the data it was started with, and stop it when it trains"
        )
    return found


def labels_of_data(config: ClassifyConfig, run: RunFolder, has_begun: bool) -> tuple[Labels, Classes]:
    """The labels of the data, in the order of a run that `has_begun` with them; kept in its folder. Told."""
    fields, skips = (config.text_field, config.classify.label_field), config.data.on_error == "skip"
    noun, how = "text", {}
    if config.of_pictures:
        check_folders((*config.data.train, *config.data.val), announce)
        check = functools.partial(picture_of, ignored=config.data.ignore_fields)
        noun, how = "picture", {"check": check, "pictures": True}
    classes = find_classes(config.data.train, *fields, skips, announce, config.data, **how)
    labels = keep_labels(run, Labels(classes.names, classes.several), has_begun)
    announce(f"{len(labels.names)} labels{f', any number of them a {noun}' if classes.several else ''}")
    return labels, dataclasses.replace(classes, names=labels.names)


def differing(found: Labels, wanted: Labels) -> str:
    """Why a head's scores are not the wanted ones; "" where they are, in whatever order and whatever a score is called.
    A score among several labels is not trained as one of which the likeliest counts."""

    def gives(labels: Labels) -> str:
        if len(labels.names) == 1:
            return "one score (a reward model's)"
        return f"{'any number' if labels.several else 'one'} of {len(labels.names)} labels a text"

    if gives(found) != gives(wanted):
        return f"it gives {gives(found)}, and here it is {gives(wanted)}"
    changes = label_changes(found.names, wanted.names) if len(wanted.names) > 1 else ""
    return changes and f"it has other labels ({changes})"


def _own_labels(run: RunFolder) -> Labels | None:
    """The labels that a classifier's run was started with; None where none are kept (a run of an earlier version)."""
    if is_there(run.labels_file):
        try:
            kept = read_object(run.labels_file)
            return Labels(tuple(kept["names"]), kept["several"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{run.labels_file} is damaged: {error!r}; remove it if {run.model} is there") from error
    return load_labels(run.model)._replace(max_tokens=None) if holds_model(run.model) else None


def keep_labels(run: RunFolder, found: Labels, has_begun: bool) -> Labels:
    """The labels of a run, in their order, whose data holds the labels `found`; kept in its folder when it starts.
    Raises UserError when they are not those that the run was started with."""
    known = _own_labels(run) if has_begun else None
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


def values_of_pieces(cache: TokenCache, pieces: Pieces, room: int) -> np.ndarray:
    """The values of the pieces' documents, float32 (rows, room, width), 0 where is no piece."""
    found = np.zeros((pieces.row_count, room, cache.values.shape[1]), np.float32)
    found[pieces.rows, pieces.segments] = cache.values[pieces.documents]
    return found

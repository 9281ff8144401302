"""Stage: a classifier of texts or of pictures, of one label each or any number of them."""

import json

import jax.numpy as jnp
import numpy as np

from minimind_jax.data.batches import Batches
from minimind_jax.data.kinds import KINDS
from minimind_jax.data.labels import Classes
from minimind_jax.data.pixels import picture_place
from minimind_jax.data.rows import Batch, Pieces
from minimind_jax.data.token_cache import TokenCache
from minimind_jax.evaluate.classification import ClassificationResult, confusion_figure, describe, evaluate_logits
from minimind_jax.inference.score import PictureScorer, Scorer
from minimind_jax.losses.classification import make_classification_loss
from minimind_jax.progress import progress
from minimind_jax.runs.image_rows import open_pictures
from minimind_jax.runs.labels import values_of_pieces
from minimind_jax.runs.parts import Run, open_rows, run_parameters
from minimind_jax.runs.stage import on_rows
from minimind_jax.sharding import announce
from minimind_jax.training.run import RunFolder, write_figure, write_text
from minimind_jax.training.source import Recipe


def recipe(run: Run) -> Recipe:
    """Data: records with a text or a picture and a label, or a list of labels; a label is any text. Loss: cross entropy
    of the label at the text's last token, or at the mean of the picture's patches, or of every label's yes and no (see
    `losses.classification`). Trained: all parameters, or adapters, and the head; of pictures the head, and the tower if
    `vision.train` says so. Written: as model/ a Qwen3ForSequenceClassification (adapters are merged), or a
    SiglipForImageClassification, with the labels' names. results.md and confusion.png show how it does on what is held
    out."""
    wanted, classes, room = run.config.classify, run.classes, run.config.data.seq_len

    def values(cache: TokenCache, pieces: Pieces) -> Batch:
        return {"values": values_of_pieces(cache, pieces, room)}

    if run.config.of_pictures:
        trained, held_out = open_pictures(run, room, run.config.vision.train == "head", values)
    else:
        trained, held_out = open_rows(run, values)
    counts, noun = texts_of_labels(trained, classes), KINDS[run.kind.records].noun
    if untrained := [name for name, count in zip(classes.names, counts, strict=True) if not count]:
        announce(
            f"{len(untrained)} labels have no {noun[:-1]} to train on ({', '.join(untrained[:8])}), for all of theirs "
            f"are held out; give more {noun}, or held-out ones of your own (--data.val)"
        )
    weights = jnp.ones(len(counts))
    if wanted.class_weights == "balanced":
        balanced = class_weights(counts, len(trained.epoch(0).documents), classes.several)
        weights = jnp.asarray(balanced, jnp.float32)
    smoothing = wanted.label_smoothing
    loss_fn = make_classification_loss(run.model, weights, several=classes.several, label_smoothing=smoothing)

    def judge() -> None:
        found = evaluate_batches(run, held_out)
        write_results(run.folder, found)
        print(describe(found).splitlines()[0])

    made = on_rows(run, loss_fn, run_parameters(run), (trained, held_out))
    return made if held_out is None else made._replace(judge=judge)


def texts_of_labels(batches: Batches, classes: Classes) -> np.ndarray:
    """(C,) how many texts of `batches` have each label."""
    values = batches.cache.values[batches.epoch(0).documents]
    if classes.several:
        return values.sum(axis=0)
    return np.bincount(values[:, 0].astype(int), minlength=len(classes.names))


def class_weights(counts: np.ndarray, texts: int, several: bool) -> np.ndarray:
    """(C,) n / (C n_c) of one label a text, so that the mean over texts is 1; the ratio of no to yes of several."""
    return ((texts - counts) if several else texts / len(counts)) / np.maximum(counts, 1)


def evaluate_batches(run: Run, batches: Batches) -> ClassificationResult:
    """How the model that the run has written does on all documents of `batches`."""
    cache, documents, labels, seq_len = batches.cache, batches.epoch(0).documents, run.labels, run.config.data.seq_len
    name = str(run.folder.path)
    with progress("evaluating", len(documents)) as advance:
        if run.config.of_pictures:
            numbers = cache.pictures.offsets[documents]
            shown = ((cache.pictures.picture(n), picture_place(cache, n)) for n in numbers)
            logits = PictureScorer(name).pictures(shown, advance)
        else:
            ids = [cache.ids(int(d), 0, seq_len).tolist() for d in documents]
            logits = Scorer(name, max_tokens=seq_len).score_ids(ids, advance)
    names = np.array(labels.names, object)
    values = cache.values[documents]
    truth = [names[row > 0.5].tolist() for row in values] if labels.several else names[values.astype(int)].tolist()
    return evaluate_logits(logits, truth, labels, KINDS[run.kind.records].noun)


def write_results(run: RunFolder, found: ClassificationResult) -> None:
    """results.json and results.md, which the report takes up, and the confusion matrix as a picture."""
    write_text(run.path / "results.json", json.dumps(found.summary(), ensure_ascii=False, indent=1) + "\n")
    text = describe(found)
    if not found.labels.several:
        write_figure(run.path / "confusion.png", confusion_figure(found), dpi=110)
        text = f"![confusion matrix](confusion.png)\n\n{text}"
    write_text(run.results_file, text + "\n")

"""Stage: a classifier of texts, of one label a text or any number of them."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from minimind_jax.config.stages import ClassifyConfig
from minimind_jax.convert.hf import Labels
from minimind_jax.data.batches import Batches
from minimind_jax.data.jsonl import reading_of
from minimind_jax.data.labels import Classes, find_classes
from minimind_jax.data.open import open_data
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.evaluate.classification import ClassificationResult, describe, draw_confusion, evaluate_logits
from minimind_jax.inference.score import Scorer
from minimind_jax.losses.classification import make_classification_loss
from minimind_jax.progress import progress
from minimind_jax.runs.begin import is_finished, start_run, tidy
from minimind_jax.runs.finish import finish_run
from minimind_jax.runs.heads import keep_labels, load_body, values_of_pieces, with_head
from minimind_jax.runs.models import check_context, load_tokenizer
from minimind_jax.runs.settle import settle
from minimind_jax.sharding import announce, data_process, make_mesh
from minimind_jax.shell import command
from minimind_jax.training.packed import train_on_rows
from minimind_jax.training.run import RunFolder, write_text


@tidy
def classify(config: ClassifyConfig) -> Path:
    """Trains a classifier on the labelled texts of `config.data` and returns the run's folder.

    Data: records with a text and a label, or a list of labels; a label is any text. Loss: cross entropy of the label at
    the text's last token, or of every label's yes and no (see `losses.classification`). Trained: all parameters, or
    adapters, and the head. Written: the run's folder, whose model/ is a Qwen3ForSequenceClassification with the labels'
    names; adapters are merged. results.md and confusion.png show how it does on the held-out texts. A run that was cut
    off goes on; a finished one returns at once.

    Raises:
        UserError: anything in the settings, the data or the machine that the user can mend.
        Interrupted: the run was asked to stop and has saved its state.
    """
    run = start_run(config)
    if is_finished(run, config):
        return run.path

    tokenizer = load_tokenizer(config)
    model = load_body(config, tokenizer, "classify")
    check_context(config, model)
    wanted = config.classify
    skip = config.data.on_error == "skip"
    reading = reading_of(config.data)
    classes = find_classes(config.data.train, config.text_field, wanted.label_field, skip, announce, reading)
    labels = keep_labels(run, Labels(classes.names, classes.several))._replace(max_tokens=config.data.seq_len)
    classes = dataclasses.replace(classes, names=labels.names)
    announce(f"{len(classes.names)} labels{', any number of them a text' if classes.several else ''}")
    config = settle(config, "labelled", tokenizer, model, run, classes)
    annotate = values_of_pieces("values", config.data.seq_len)
    train_batches, val_batches = open_data(
        "labelled", config, tokenizer, *data_process(make_mesh(config.mesh)), classes=classes, annotate=annotate
    )
    counts = texts_of_labels(train_batches, classes)
    if untrained := [name for name, count in zip(classes.names, counts, strict=True) if not count]:
        announce(
            f"{len(untrained)} labels have no text to train on ({', '.join(untrained[:8])}), for all of theirs are "
            "held out; give more texts, or held-out ones of your own (--data.val)"
        )
    weights = np.ones(len(counts))
    if wanted.class_weights == "balanced":
        weights = class_weights(counts, len(train_batches.epoch(0).documents), classes.several)
    result = train_on_rows(
        config,
        stage="classify",
        model=model,
        parameters=with_head(config, model, labels),
        loss_fn=make_classification_loss(
            model,
            jnp.asarray(weights, jnp.float32),
            several=classes.several,
            label_smoothing=wanted.label_smoothing,
        ),
        train_batches=train_batches,
        val_batches=val_batches,
        run=run,
    )
    hint = f"  {command('classify', 'predict', '--model', run.path, '--input', 'YOUR_TEXTS.jsonl')}"

    def judge() -> None:
        found = evaluate_batches(run, val_batches, tokenizer, labels, config.data.seq_len)
        write_results(run, found)
        print(describe(found).splitlines()[0])

    return finish_run(run, config, model, tokenizer, result, hint, labels, judge if val_batches is not None else None)


def texts_of_labels(batches: Batches, classes: Classes) -> np.ndarray:
    """(C,) how many texts of `batches` have each label."""
    values = batches.cache.values[batches.epoch(0).documents]
    return (
        values.sum(axis=0) if classes.several else np.bincount(values[:, 0].astype(int), minlength=len(classes.names))
    )


def class_weights(counts: np.ndarray, texts: int, several: bool) -> np.ndarray:
    """(C,) n / (C n_c) of one label a text, so that the mean over texts is 1; the ratio of no to yes of several."""
    return ((texts - counts) if several else texts / len(counts)) / np.maximum(counts, 1)


def evaluate_batches(
    run: RunFolder, batches: Batches, tokenizer: Tokenizer, labels: Labels, seq_len: int
) -> ClassificationResult:
    """How the model that the run has written does on all documents of `batches`."""
    cache, documents = batches.cache, batches.epoch(0).documents
    scorer = Scorer(str(run.path), max_tokens=seq_len)
    with progress("evaluating", len(documents)) as advance:
        logits = scorer.score_ids([cache.ids(int(d), 0, seq_len).tolist() for d in documents], advance)
    names = np.array(labels.names, object)
    values = cache.values[documents]
    truth = [names[row > 0.5].tolist() for row in values] if labels.several else names[values.astype(int)].tolist()
    return evaluate_logits(logits, truth, labels)


def write_results(run: RunFolder, found: ClassificationResult) -> None:
    """results.json and results.md, which the report takes up, and the confusion matrix as a picture."""
    write_text(run.path / "results.json", json.dumps(found.summary(), ensure_ascii=False, indent=1) + "\n")
    text = describe(found)
    if not found.labels.several:
        draw_confusion(found, run.path / "confusion.png")
        text = f"![confusion matrix](confusion.png)\n\n{text}"
    write_text(run.results_file, text + "\n")

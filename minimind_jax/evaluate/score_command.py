"""`minimind classify predict` and `minimind score`: what a classifier or a reward model says of a file's records."""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from minimind_jax.data.jsonl import Record, expand_paths, iter_records
from minimind_jax.data.labels import parse_unlabelled
from minimind_jax.data.records import parse_conversation
from minimind_jax.errors import UserError
from minimind_jax.evaluate.classification import classify_logits
from minimind_jax.folders import resolve_run
from minimind_jax.inference.answer_file import PartialFile, check_output, json_line
from minimind_jax.inference.score import Scorer
from minimind_jax.training.run import RunFolder

CHUNK = 512  # records read at a time


def predict(
    model: str,
    paths: Sequence[str],
    output: str = "",
    text_field: str = "text",
    top: int = 1,
    seq_len: int | None = None,
    dtype: str = "auto",
) -> int:
    """Writes every record with what is `predicted` and its `probability`, or the `top` likeliest labels; the number of
    records.

    paths: files of records, or none for lines of text on the standard input. output: a file; "" prints.
    seq_len: longer texts are cut there; None takes the data.seq_len of the run, or the model's context.
    Of a classifier with several labels a text: a list `predicted`, and `probabilities` of all.
    """
    _check_output(output, paths)
    scorer = Scorer(model, dtype, seq_len or _trained_length(model))
    if len(scorer.labels.names) == 1:
        raise UserError(f"{model} is a reward model; use minimind score")
    records = iter_records(paths) if paths else _input_lines(text_field)

    def rows(chunk: list[Record]) -> Iterator[dict[str, Any]]:
        texts = [parse_unlabelled(record, text_field) for record in chunk]
        found, probabilities = classify_logits(scorer.texts(texts), scorer.labels.several)
        for record, is_found, likely in zip(chunk, found, probabilities, strict=True):
            yield {**record.value, **_answer(scorer.labels.names, is_found, likely, scorer.labels.several, top)}

    return _write(records, rows, output)


def score(model: str, paths: Sequence[str], output: str = "", dtype: str = "auto") -> int:
    """Writes every conversation with its `score` by a reward model; the number of records."""
    _check_output(output, paths)
    scorer = Scorer(model, dtype)
    if len(scorer.labels.names) != 1:
        raise UserError(f"{model} is a classifier ({len(scorer.labels.names)} labels); use minimind classify predict")

    def rows(chunk: list[Record]) -> Iterator[dict[str, Any]]:
        parsed = [parse_conversation(record, for_training=False) for record in chunk]
        scores = scorer.conversations([(conversation.messages, conversation.tools) for conversation in parsed])
        for record, value in zip(chunk, scores[:, 0], strict=True):
            yield {**record.value, "score": round(float(value), 6)}

    return _write(iter_records(paths), rows, output)


def _answer(names: Sequence[str], found: np.ndarray, likely: np.ndarray, several: bool, top: int) -> dict[str, Any]:
    order = np.argsort(-likely, kind="stable")
    if several:
        return {
            "predicted": [names[i] for i in order if found[i]],
            "probabilities": {names[i]: round(float(likely[i]), 6) for i in order},
        }
    best = order[0]
    answer = {"predicted": names[best], "probability": round(float(likely[best]), 6)}
    if top > 1:
        answer["top"] = [{"label": names[i], "probability": round(float(likely[i]), 6)} for i in order[:top]]
    return answer


def _trained_length(model: str) -> int | None:
    """What texts were cut at when the run was trained; None for another folder."""
    config = RunFolder(resolve_run(model)).read_config() if resolve_run(model).is_dir() else None
    return config and config.get("data", {}).get("seq_len")


def _check_output(output: str, paths: Sequence[str]) -> None:
    """Raises UserError, before any work, for an output that could not be written at its end, or is there already."""
    if not output:
        return
    check_output(Path(output), expand_paths(paths))
    if Path(output).exists():
        raise UserError(f"output {output} is there already; remove it, or choose another name")


def _input_lines(text_field: str) -> Iterator[Record]:
    for number, line in enumerate(sys.stdin, 1):
        if line.strip():
            yield Record(f"standard input:{number}", Path(), number, {text_field: line.rstrip("\n")})


def _write(records: Iterable[Record], rows, output: str) -> int:
    count = 0
    records = iter(records)
    with PartialFile(Path(output)) if output else contextlib.nullcontext() as file:
        write = file.write if file else lambda row: print(json_line(row), flush=True)
        while chunk := list(islice(records, CHUNK if file else 1)):  # what is printed comes as soon as it is known
            for row in rows(chunk):
                write(row)
                count += 1
        if file:
            file.finish()
    return count

"""`minimind classify predict` and `minimind score`: what a classifier or a reward model says of a file's records."""

import contextlib
import functools
import io
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from minimind_jax.config.tools import PredictConfig, ScoreConfig
from minimind_jax.data.jsonl import DOCUMENTS, Reading, Record, expand_paths, iter_records, reading_of, tell
from minimind_jax.data.kinds import parse_conversation
from minimind_jax.data.labels import parse_unlabelled
from minimind_jax.data.messages import Conversation
from minimind_jax.data.text_files import encoding_hint, is_foreign_utf8
from minimind_jax.data.written import TABLES, check_output, json_line, table_line
from minimind_jax.errors import UserError
from minimind_jax.evaluate.classification import classify_logits
from minimind_jax.inference.answer_file import PartialFile
from minimind_jax.inference.score import Scorer
from minimind_jax.progress import progress

CHUNK = 512  # records read at a time


def predict(config: PredictConfig) -> None:
    """Writes every record with what is `predicted` and its `probability`, or the `top` likeliest labels.

    Of a classifier with several labels a text: a list `predicted`, and `probabilities` of all.

    Without `input` the records are lines of text on the standard input. The output is a table if its name ends in .csv
    or .tsv.
    """
    _check_output(config)
    scorer = Scorer(config.model, max_tokens=config.seq_len)
    labels, top = scorer.labels, config.top
    if len(labels.names) == 1:
        raise UserError(f"{config.model} is a reward model; use minimind score")

    def parse(record: Record) -> str:
        text = parse_unlabelled(record, config.text_field or "text")
        if record.file.name.endswith(DOCUMENTS) and "\n" in text.strip():
            record.told[str(record.file), "read as one text (its lines are texts on the standard input)"] += 1
        return text

    def answers(texts: list[str]) -> Iterator[dict[str, Any]]:
        for found, likely in zip(*classify_logits(scorer.texts(texts), labels.several), strict=True):
            yield _answer(labels.names, found, likely, labels.several, top)

    fields = ("predicted", "probabilities") if labels.several else ("predicted", "probability", "top")[: 2 + (top > 1)]
    count = _write(config, parse, answers, fields)
    _say_cut(scorer, count, "texts", "end", " (--seq_len sets another length)")


def score(config: ScoreConfig) -> None:
    """Writes every conversation with its `score` by a reward model; the output as of `predict`."""
    _check_output(config)
    scorer = Scorer(config.model)
    if (labels := len(scorer.labels.names)) != 1:
        raise UserError(f"{config.model} is a classifier ({labels} labels); use minimind classify predict")
    parse = functools.partial(parse_conversation, for_training=False, reading=reading_of(config))

    def answers(parsed: list[Conversation]) -> Iterator[dict[str, Any]]:
        scores = scorer.conversations([(conversation.messages, conversation.tools) for conversation in parsed])
        return ({"score": round(float(value), 6)} for value in scores[:, 0])

    count = _write(config, parse, answers, ("score",))
    _say_cut(scorer, count, "conversations", "beginning")


def _check_output(config: PredictConfig | ScoreConfig) -> None:
    if config.output:
        check_output(Path(config.output), expand_paths(config.input), tables=True)


def _answer(names: Sequence[str], found: np.ndarray, likely: np.ndarray, several: bool, top: int) -> dict[str, Any]:
    order = np.argsort(-likely, kind="stable")
    if several:
        return {
            "predicted": [names[i] for i in order if found[i]],
            "probabilities": {names[i]: round(float(likely[i]), 6) for i in order},
        }
    found = [{"label": names[i], "probability": round(float(likely[i]), 6)} for i in order[:top]]
    answer = {"predicted": found[0]["label"], "probability": found[0]["probability"]}
    return {**answer, "top": found} if top > 1 else answer


def _input_lines(reading: Reading, told: Counter) -> Iterator[Record]:
    place = "standard input"
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding=reading.encoding, errors="surrogateescape")
    for number, line in enumerate(sys.stdin, 1):
        line = line.removeprefix("\ufeff").rstrip("\r\n")
        raw = line.encode(reading.encoding, "surrogateescape")
        if any("\udc80" <= character <= "\udcff" for character in line):
            hint = encoding_hint(raw)
            raise UserError(f"{place}:{number}: not {reading.encoding} text; {hint}")
        if not line.strip():
            continue
        if is_foreign_utf8(io.BytesIO(raw), reading.encoding):
            told[place, f"a line is UTF-8 text, and is read as {reading.encoding} (leave --encoding out)"] += 1
        if line.startswith(("{", "[")) and line.rstrip().endswith(("}", "]")):
            told[place, "a line that looks like JSON is read as text (give records as a file, with --input)"] += 1
        yield Record(f"{place}:{number}", Path(), number, {reading.text_field or "text": line}, told)


def _write(config: PredictConfig | ScoreConfig, parse, answers, fields: Sequence[str]) -> int:
    """Writes every record with its answer, whose fields are `fields`; the number of records. `answers` takes what
    `parse` makes of them; with an output all are parsed before the first is answered."""
    told, reading, paths, output = Counter(), reading_of(config), config.input, config.output
    records = iter_records(paths, reading=reading, told=told) if paths else _input_lines(reading, told)
    total, columns = None, [reading.text_field or "text"]
    if output and paths:
        total, columns = 0, {}
        for record in iter_records(paths, reading=reading):
            parse(record)
            total, columns = total + 1, {**columns, **dict.fromkeys(record.value)}
    separator = TABLES.get(Path(output).suffix.lower())
    line = table_line(dict.fromkeys((*columns, *fields)), separator) if separator else json_line
    count = 0
    with PartialFile(Path(output), line) if output else contextlib.nullcontext() as file:
        write = file.write if file else lambda row: print(json_line(row), flush=True)
        with progress("scoring", total, show=bool(output)) as advance:
            while chunk := list(islice(records, CHUNK if file else 1)):  # what is printed comes as soon as it is known
                with progress("compiling", show=not (file or count)):
                    found = list(answers([parse(record) for record in chunk]))
                for record, answer in zip(chunk, found, strict=True):
                    for name in record.value.keys() & {*fields}:
                        told[str(record.file), f"the earlier `{name}` is replaced"] += 1
                    write({**record.value, **answer})
                count += len(chunk)
                advance(len(chunk))
        if file:
            file.finish()
    tell(told)
    if output:
        print(f"{count} records written to {output}")
    return count


def _say_cut(scorer: Scorer, count: int, what: str, side: str, advice: str = "") -> None:
    said = scorer.labels.max_tokens
    if scorer.max_tokens == scorer.model.config.max_position_embeddings and (not said or said > scorer.max_tokens):
        print(
            f"the model does not say where longer {what} were cut in its training (model_max_length in "
            f"tokenizer_config.json); up to {scorer.max_tokens} tokens were read{advice}",
            file=sys.stderr,
        )
    if scorer.cut:
        print(
            f"{scorer.cut:,} of {count:,} {what} were longer than the {scorer.max_tokens} tokens that are read, and "
            f"lost their {side}{advice}",
            file=sys.stderr,
        )

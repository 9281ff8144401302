"""`minimind classify predict` and `minimind score`: what a classifier or a reward model says of a file's records."""

import contextlib
import functools
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from minimind_jax.config.sections import ReadingConfig
from minimind_jax.config.tools import PredictConfig, ScoreConfig
from minimind_jax.convert.hf import Labels
from minimind_jax.convert.hf_image_classifier import is_picture_classifier
from minimind_jax.data.images import read_image
from minimind_jax.data.jsonl import DOCUMENTS, Record, expand_paths, iter_records, tell, tell_left_out
from minimind_jax.data.kinds import parse_conversation
from minimind_jax.data.labelled_images import picture_of
from minimind_jax.data.labels import parse_unlabelled
from minimind_jax.data.messages import Conversation
from minimind_jax.data.text_files import encoding_hint, is_foreign_utf8
from minimind_jax.data.written import TABLES, check_output, json_line, table_line
from minimind_jax.errors import UserError
from minimind_jax.evaluate.classification import classify_logits
from minimind_jax.folders import resolve_model_folder
from minimind_jax.inference.answer_file import PartialFile
from minimind_jax.inference.score import PictureScorer, Scorer
from minimind_jax.progress import progress

CHUNK = 512  # records read at a time


def predict(config: PredictConfig) -> None:
    """Writes every record with what is `predicted` and its `probability`, or the `top` likeliest labels.

    Of a classifier with several labels a text: a list `predicted`, and `probabilities` of all.

    Without `input` the records are lines of text on the standard input, or by a classifier of pictures their paths. The
    output is a table if its name ends in .csv or .tsv.
    """
    pictures = is_picture_classifier(resolve_model_folder(config.model))
    _check_output(config, pictures)
    if pictures:
        _predict_pictures(config)
        return
    scorer = Scorer(config.model, max_tokens=config.seq_len)
    if len(scorer.labels.names) == 1:
        raise UserError(f"{config.model} is a reward model; use minimind score")

    def parse(record: Record) -> str:
        text = parse_unlabelled(record, config.text_field or "text")
        if record.file.name.endswith(DOCUMENTS) and "\n" in text.strip():
            record.tell("read as one text (its lines are texts on the standard input)")
        return text

    answers = functools.partial(_answers, scorer.labels, config.top, scorer.texts)
    count = _write(config, parse, answers, _fields(scorer.labels, config.top))
    _say_cut(scorer, count, "texts", "end", " (--seq_len sets another length)")


def _predict_pictures(config: PredictConfig) -> None:
    if config.seq_len is not None:
        raise UserError(f"seq_len {config.seq_len} is for texts, and {config.model} classifies pictures; leave it out")
    scorer = PictureScorer(config.model)

    def parse(record: Record) -> np.ndarray:
        picture = picture_of(record, config.text_field or "text", config.ignore_fields)
        return read_image(picture, scorer.tower, record.where, record.tell)

    answers = functools.partial(_answers, scorer.labels, config.top, scorer.pixels)
    _write(config, parse, answers, _fields(scorer.labels, config.top), pictures=True)
    tell_left_out(config.input, pictures=True)


def _answers(labels: Labels, top: int, logits: Callable, parsed: list[Any]) -> Iterator[dict[str, Any]]:
    for is_found, likely in zip(*classify_logits(logits(parsed), labels.several), strict=True):
        order = np.argsort(-likely, kind="stable")
        chances = {labels.names[i]: round(float(likely[i]), 6) for i in order}
        if labels.several:
            yield {"predicted": [labels.names[i] for i in order if is_found[i]], "probabilities": chances}
            continue
        found = [{"label": name, "probability": chance} for name, chance in islice(chances.items(), top)]
        answer = {"predicted": found[0]["label"], "probability": found[0]["probability"]}
        yield {**answer, "top": found} if top > 1 else answer


def _fields(labels: Labels, top: int) -> Sequence[str]:
    return ("predicted", "probabilities") if labels.several else ("predicted", "probability", "top")[: 2 + (top > 1)]


def score(config: ScoreConfig) -> None:
    """Writes every conversation with its `score` by a reward model; the output as of `predict`."""
    _check_output(config)
    scorer = Scorer(config.model)
    if (labels := len(scorer.labels.names)) != 1:
        raise UserError(f"{config.model} is a classifier ({labels} labels); use minimind classify predict")
    parse = functools.partial(parse_conversation, for_training=False, reading=config)

    def answers(parsed: list[Conversation]) -> Iterator[dict[str, Any]]:
        scores = scorer.conversations([(conversation.messages, conversation.tools) for conversation in parsed])
        return ({"score": round(float(value), 6)} for value in scores[:, 0])

    count = _write(config, parse, answers, ("score",))
    _say_cut(scorer, count, "conversations", "beginning")


def _check_output(config: PredictConfig | ScoreConfig, pictures: bool = False) -> None:
    if config.output:
        check_output(Path(config.output), expand_paths(config.input, pictures), tables=True)


def _input_lines(reading: ReadingConfig, told: Counter, field: str) -> Iterator[Record]:
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
        yield Record(f"{place}:{number}", Path(place), number, {reading.text_field or field: line}, told)


def _write(
    config: PredictConfig | ScoreConfig, parse, answers, fields: Sequence[str], *, pictures: bool = False
) -> int:
    """Writes every record with its answer, whose fields are `fields`; the number of records. `answers` takes what
    `parse` makes of them; with an output all are parsed before the first is answered. pictures: files may be records,
    and pictures that stand in a table are left out of what is written. Raises UserError for a broken record, unless
    these are to be skipped and there are others."""
    told, paths, output = Counter(), config.input, config.output
    field = "image" if pictures else "text"
    bad: list[UserError] = []
    on_bad = bad.append if config.on_error == "skip" else None

    def parsed(told: Counter) -> Iterator[tuple[Record, Any]]:
        bad.clear()
        lines = iter_records(paths, on_bad, config, told, pictures) if paths else _input_lines(config, told, field)
        for record in lines:
            try:
                yield record, parse(record)
            except UserError as error:
                if on_bad is None:
                    raise
                on_bad(error)

    total, columns = None, [config.text_field or field]
    if output and paths:
        total, columns = 0, {}
        for record, _ in parsed(Counter()):
            total, columns = total + 1, {**columns, **dict.fromkeys(record.value)}
        if bad and not total:
            raise bad[0]
    records = parsed(told)
    separator = TABLES.get(Path(output).suffix.lower())
    line = table_line(dict.fromkeys((*columns, *fields)), separator) if separator else json_line
    count = 0
    with PartialFile(Path(output), line) if output else contextlib.nullcontext() as file:
        write = file.write if file else lambda row: print(json_line(row), flush=True)
        with progress("scoring", total, show=bool(output)) as advance:
            while chunk := list(islice(records, CHUNK if file else 1)):  # what is printed comes as soon as it is known
                with progress("compiling", show=not (file or count)):
                    found = list(answers([each for _, each in chunk]))
                for (record, _), answer in zip(chunk, found, strict=True):
                    for name in record.value.keys() & {*fields}:
                        record.tell(f"the earlier `{name}` is replaced")
                    write({**(_without_bytes(record.value) if pictures else record.value), **answer})
                count += len(chunk)
                advance(len(chunk))
        if bad and not count:
            raise bad[0]
        if file:
            file.finish()
    tell(told)
    if bad:
        print(f"Skipped {len(bad):,} of {len(bad) + count:,} records, the first: {bad[0]}", file=sys.stderr)
    if output:
        print(f"{count} records written to {output}")
    return count


def _without_bytes(value: dict[str, Any]) -> dict[str, Any]:
    """A record with the path, if there is one, in place of a picture's content."""

    def shown(item: Any) -> Any:
        item = item[0] if isinstance(item, list) and len(item) == 1 else item
        item = item.get("path") if isinstance(item, dict) and "bytes" in item else item
        return None if isinstance(item, bytes) else item

    return {name: shown(item) for name, item in value.items()}


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

"""Labelled texts, {"text": str, "label": str} or a list of labels: checked, and the labels as numbers."""

import dataclasses
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from minimind_jax.data.jsonl import Record, iter_records
from minimind_jax.data.records import field_names
from minimind_jax.errors import UserError


class LabelledText(NamedTuple):
    """labels: one, or with several labels a text any number."""

    text: str
    labels: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Classes:
    """The labels a classifier knows.

    names: in the order of their numbers. several: a text may have any number of them, else exactly one.
    text_field, label_field: where records hold the two.
    """

    names: tuple[str, ...]
    several: bool = False
    text_field: str = "text"
    label_field: str = "label"

    def values(self, labels: Sequence[str]) -> tuple[float, ...]:
        """The class's number; with several labels a 0 or 1 for each class."""
        if not self.several:
            return (float(self.names.index(labels[0])),)
        return tuple(float(name in labels) for name in self.names)


def parse_labelled(record: Record, classes: Classes, known: bool = True) -> LabelledText:
    """The text and its labels. Raises UserError; with `known` also for a label that is not among the classes."""
    text = parse_unlabelled(record, classes.text_field)
    if classes.label_field not in record.value:
        raise UserError(
            f"{record.where}: missing field `{classes.label_field}`; expected the text's label, found the fields "
            f"{field_names(record.value)} (classify.label_field names another)"
        )
    given = record.value[classes.label_field]
    labels = tuple(_label(label, record, classes) for label in (given if isinstance(given, list) else [given]))
    if not classes.several and len(labels) != 1:
        raise UserError(f"{record.where}: {classes.label_field} has {len(labels)} labels; every other text has one")
    if known and (unknown := [label for label in labels if label not in classes.names]):
        raise UserError(
            f"{record.where}: the label {unknown[0]!r} is not in the training data, whose {len(classes.names)} labels "
            f"are {', '.join(classes.names[:8])}{' ...' if len(classes.names) > 8 else ''}"
        )
    return LabelledText(text, tuple(dict.fromkeys(labels)))


def parse_unlabelled(record: Record, text_field: str = "text") -> str:
    """The text of a record to classify. Raises UserError."""
    text = record.value.get(text_field)
    if not isinstance(text, str):
        raise UserError(
            f"{record.where}: expected a field `{text_field}` with the text, found the fields "
            f"{field_names(record.value)} (text_field names another)"
        )
    if not text.strip():
        raise UserError(f"{record.where}: {text_field} is empty; remove the line (in training: --data.on_error skip)")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{record.where}: {text_field} holds half a surrogate pair; expected Unicode text") from error
    return text


def _label(label: object, record: Record, classes: Classes) -> str:
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():  # how Parquet has whole numbers of which some are missing
        label = int(label)
    if not isinstance(label, str | int) or not str(label).strip():
        raise UserError(
            f"{record.where}: {classes.label_field} is {reprlib.repr(label)}; expected text or a whole number"
        )
    return str(label).strip()


def find_classes(paths: Sequence[str | Path], text_field: str, label_field: str, skip: bool = False) -> Classes:
    """The classes of training data: its labels in order, of numbers or of the alphabet; several a text where any
    record has a list.

    skip: broken records are passed over. Raises UserError, also when there are fewer than two labels.
    """
    probe = Classes((), True, text_field, label_field)
    names: set[str] = set()
    several = False
    for record in iter_records(paths, on_bad=(lambda error: None) if skip else None):
        try:
            names.update(parse_labelled(record, probe, known=False).labels)
        except UserError:
            if not skip:
                raise
            continue
        several |= isinstance(record.value[label_field], list)
    if len(names) < 2:
        found = f"only the label {next(iter(names))!r}" if names else "no label"
        raise UserError(f"{', '.join(map(str, paths))}: {found}; a classifier needs at least two")
    are_numbers = all(name.lstrip("-").isdecimal() for name in names)
    return Classes(tuple(sorted(names, key=int if are_numbers else str)), several, text_field, label_field)

"""Labelled texts, {"text": str, "label": str} or a list of labels: checked, and the labels as numbers."""

import dataclasses
import re
import reprlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from minimind_jax.config.sections import ReadingConfig
from minimind_jax.data.formats import TEXT, leave_out_others
from minimind_jax.data.jsonl import READING, Record, is_picture, iter_records
from minimind_jax.data.values import Tell, checked_text, decode_json, field_names, meant, unheard
from minimind_jax.errors import UserError

LABEL_FIELDS = ("label", "labels", "category", "intent")  # where `label` is looked for, unless a setting names a field
NAME_FIELDS = ("label_text", "label_name")  # what a number in the field of labels is called
FOLDER = "the names of folders"  # where pictures in folders have their labels
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
_LIST = re.compile(r"\s*([\[{]|\(\s*['\"])")  # also Python's tuples and sets and PostgreSQL's arrays, no JSON
_BETWEEN_LABELS = re.compile(r"\s*[,;|/\n\t，、；]\s*")
_YES_AND_NO = {"0", "1", "true", "false"}
_MISSING = {"nan", "null", "n/a", "#n/a", "<na>"}


class LabelledText(NamedTuple):
    """labels: one, or with several labels a text any number. values: of the labels, by the classes. is_list: how the
    record has the labels."""

    text: str
    labels: tuple[str, ...]
    values: tuple[float, ...] = ()
    is_list: bool = False

    def as_record(self) -> dict[str, Any]:
        """The record of our own format that says the same."""
        return {"text": self.text, "label": list(self.labels) if self.is_list else self.labels[0]}


@dataclasses.dataclass(frozen=True)
class Classes:
    """The labels a classifier knows.

    names: in the order of their numbers; none while they are not known. several: a text may have any number of them,
        else exactly one.
    text_field, label_field: where records hold the two.
    """

    names: tuple[str, ...]
    several: bool = False
    text_field: str = "text"
    label_field: str = "label"

    @classmethod
    def any(cls, text_field: str, label_field: str) -> "Classes":
        """Whatever labels there are, before they are known."""
        return cls((), True, text_field, label_field)

    def values(self, labels: Sequence[str]) -> tuple[float, ...]:
        """The class's number; with several labels a 0 or 1 for each class."""
        if not self.several:
            return (float(self.names.index(labels[0])),)
        return tuple(float(name in labels) for name in self.names)


class Given(NamedTuple):
    """The labels that a record has. numbers: in the field of labels, if their names are in another one."""

    labels: tuple[str, ...]
    is_list: bool
    field: str
    numbers: tuple[str, ...] = ()


def parse_labelled(record: Record, classes: Classes) -> LabelledText:
    """The text and its labels; other fields are told as left out. Raises UserError, also for a label that is not among
    the classes, where those are known."""
    text = parse_unlabelled(record, classes.text_field)
    given = read_labels(record, classes, _text_place(record, classes.text_field))
    return LabelledText(text, given.labels, classes.values(given.labels), given.is_list)


def read_labels(record: Record, classes: Classes, place: str) -> Given:
    """The labels of a record whose text, or picture, is in the field `place`. Raises as `parse_labelled`."""
    given = _given(record, classes.label_field)
    if not classes.several and len(given.labels) != 1:
        raise UserError(f"{record.where}: {given.field} has {len(given.labels)} labels; every other record has one")
    if classes.names and (unknown := [label for label in given.labels if label not in classes.names]):
        raise UserError(
            f"{record.where}: the label {unknown[0]!r} is not in the training data, whose {len(classes.names)} labels "
            f"are {', '.join(classes.names[:8])}{' ...' if len(classes.names) > 8 else ''}"
        )
    leave_out_others(record, {place, *LABEL_FIELDS, *NAME_FIELDS, given.field})
    return given


def parse_unlabelled(record: Record, text_field: str = "text") -> str:
    """The text of a record to classify; `text` stands for its other usual names, too. Raises UserError."""
    place = _text_place(record, text_field)
    if place not in record.value:
        raise UserError(
            f"{record.where}: expected a field `{text_field}` with the text, found the fields "
            f"{field_names(record.value)} (data.text_field, of tools --text_field, names another"
            f"{meant(record.value, TEXT)})"
        )
    text = checked_text(record.value[place], f"{record.where}: {place}")
    if not text.strip():
        raise UserError(f"{record.where}: {place} is empty; remove the line (in training: --data.on_error skip)")
    return text


def _text_place(record: Record, text_field: str) -> str:
    names = TEXT if text_field == TEXT[0] else (text_field,)
    return next((name for name in names if isinstance(record.value.get(name), str)), text_field)


def _given(record: Record, label_field: str) -> Given:
    if is_picture(record.file):
        folder = record.file.absolute().parent.name
        return Given((_label(folder, f"{record.where}: the name of its folder"),), False, FOLDER)
    field = _field(record, label_field)
    labels, is_list = _labels(record, field)
    named = next((n for n in (f"{field}_text", f"{field}_name", *NAME_FIELDS) if record.value.get(n) is not None), None)
    if named in (None, field) or not labels or not all(map(_NUMBER.fullmatch, labels)):
        return Given(labels, is_list, field)
    names, _ = _labels(record, named)
    if len(names) != len(labels):
        raise UserError(f"{record.where}: {field} has {len(labels)} labels, and {named} {len(names)} names for them")
    return Given(names, is_list, field, labels)


def _field(record: Record, label_field: str) -> str:
    wanted = (*LABEL_FIELDS, *NAME_FIELDS) if label_field == LABEL_FIELDS[0] else (label_field,)
    there = [name for name in wanted if name in record.value]
    if not there:
        raise UserError(
            f"{record.where}: missing field `{label_field}`; expected the text's label, found the fields "
            f"{field_names(record.value)} (classify.label_field names another{meant(record.value, wanted)})"
        )
    if tuple(there[:2]) in (LABEL_FIELDS[:2], LABEL_FIELDS[2:]):  # neither is the likelier one
        raise UserError(
            f"{record.where}: both {there[0]} and {there[1]} are there; say with classify.label_field which is meant"
        )
    return there[0]


def _labels(record: Record, field: str) -> tuple[tuple[str, ...], bool]:
    """(labels, whether they stand in a list) of a field: a list, also as JSON in a text, or a single one."""
    value, place = record.value[field], f"{record.where}: {field}"
    if isinstance(value, str) and _LIST.match(value):
        try:
            value = decode_json(value)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{place} is {reprlib.repr(value)}, which is no list in JSON; write it as "
                '["one", "other"], or a name without the bracket'
            ) from error
    if isinstance(value, list):
        return tuple(_label(label, place) for label in value), True
    return (_label(value, place),), False


def _label(label: Any, place: str) -> str:
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():  # how Parquet has whole numbers of which some are missing
        label = int(label)
    if not isinstance(label, str | int) or not str(label).strip():
        raise UserError(
            f"{place} is {reprlib.repr(label)}; expected text or a whole number (for a text without any of several "
            "labels the empty list []; --data.on_error skip leaves such records out)"
        )
    return checked_text(str(label).strip(), place)


def find_classes(
    paths: Sequence[str | Path],
    text_field: str,
    label_field: str,
    skip: bool = False,
    tell: Tell = unheard,
    reading: ReadingConfig = READING,
    check: Callable[[Record, str], Any] = parse_unlabelled,
    pictures: bool = False,
) -> Classes:
    """The classes of training data: its labels in order, numbers by value and before others by the alphabet; several a
    text where any record has a list.

    check: raises UserError where a record, of which the field with the text is named, has nothing to classify.
    pictures: see `jsonl.expand_paths`. skip: broken records are passed over. tell: hears of what was understood, and of
    labels that look like slips.
    Raises UserError, also when there are fewer than two labels, or numbers that are not all named alike.
    """
    counts: Counter[str] = Counter()
    fields: dict[str, None] = {}
    lengths: set[int] = set()
    records = lists = 0
    naming = _Naming()
    for record in iter_records(paths, (lambda error: None) if skip else None, reading, pictures=pictures):
        try:
            check(record, text_field)
            given = _given(record, label_field)
        except UserError:
            if not skip:
                raise
            continue
        naming.add(record, given)
        counts.update(given.labels)
        fields[given.field] = None
        lengths.add(len(given.labels))
        records, lists = records + 1, lists + given.is_list
    if len(counts) < 2:
        found = f"only the label {next(iter(counts))!r}" if counts else "no label"
        raise UserError(f"{', '.join(map(str, paths))}: {found}; a classifier needs at least two")
    if lists and counts.keys() <= _YES_AND_NO and len(lengths) == 1 and max(lengths) > 1:
        raise UserError(
            f"{', '.join(map(str, paths))}: all lists in {', '.join(fields)} are {lengths.pop()} times "
            f"{' or '.join(sorted(counts))}, as if for every label its yes or no; write the names of those that a text "
            'has: ["one", "other"]'
        )
    if list(fields) != [label_field]:
        tell(f"labels are read from {', '.join(fields)}")
    if 0 < lists < records:
        tell(f"{lists:,} of {records:,} records have a list of labels, so every text may have any number of them")
    if len(counts) * 2 > records >= 20:
        tell(f"{len(counts):,} labels for {records:,} texts: is {', '.join(fields)} the right field?")
    numbers = sorted(filter(_NUMBER.fullmatch, counts), key=lambda name: (Decimal(name), name))
    names = (*numbers, *sorted(counts.keys() - set(numbers)))
    for note in _slips(names, counts):
        tell(note)
    return Classes(names, lists > 0, text_field, label_field)


class _Naming:
    """Refuses numbers that have no name, or another one, than elsewhere: they would be classes of their own."""

    def __init__(self):
        self.names: dict[str, str] = {}
        self.numbers: dict[str, str] = {}
        self.bare: str = ""

    def add(self, record: Record, given: Given) -> None:
        for number, name in zip(given.numbers, given.labels, strict=False):
            known = self.names.setdefault(number, name), self.numbers.setdefault(name, number)
            if known != (name, number):
                raise UserError(
                    f"{record.where}: the label {number} is called {name!r}, and in an earlier record "
                    + (f"{known[0]!r}" if known[0] != name else f"{known[1]} is called so")
                )
        if not given.numbers and any(_NUMBER.fullmatch(label) for label in given.labels):
            self.bare = self.bare or record.where
        if self.bare and self.names:
            raise UserError(
                f"{self.bare}: {given.field} is a number without a name beside it ({', '.join(NAME_FIELDS)}), which "
                "other records have; name all or none"
            )


def _slips(names: Sequence[str], counts: Counter[str]) -> Iterator[str]:
    """Notes about labels that are all but the same, or that look like several in one."""
    alike = defaultdict(list)
    for name in names:
        alike[_kind_of(name)].append(name)
    groups = [group for group in alike.values() if len(group) > 1]
    if groups:
        told = "; ".join(", ".join(f"{name!r} x {counts[name]:,}" for name in group) for group in groups[:3])
        yield f"labels that differ only in case, spaces or zeros are classes of their own: {told}"
    if missing := [f"{name!r} x {counts[name]:,}" for name in names if name.casefold() in _MISSING]:
        yield f"labels that look like missing ones are classes like others: {', '.join(missing)}; remove those records"
    single = [name for name in names if counts[name] == 1]
    if single and counts.total() >= 5 * len(names):
        yield f"labels of a single text, which may be slips: {', '.join(map(repr, single[:5]))}"
    parts = {name: _BETWEEN_LABELS.split(name) for name in names}
    uses = Counter(part for split in parts.values() for part in split)
    joined = [name for name, split in parts.items() if len(split) > 1 and all(uses[part] > 1 for part in split)]
    if joined:
        yield (
            f"{len(joined)} labels look like several in one and are classes of their own, such as {joined[0]!r}; a "
            'text with several has a list, in a CSV cell as JSON: ["one", "other"]'
        )


def _kind_of(name: str) -> Any:
    if _NUMBER.fullmatch(name):
        return Decimal(name)
    shown = "".join(c for c in name if unicodedata.category(c) != "Cf")  # characters without width, as U+200B
    return " ".join(unicodedata.normalize("NFKC", shown).casefold().split())


def label_changes(known: Sequence[str], found: Sequence[str]) -> str:
    """Which labels are new and which are gone; "" where both are the same, in whatever order."""
    told = {"new": [n for n in found if n not in known], "gone": [n for n in known if n not in found]}
    return "; ".join(f"{word}: {', '.join(map(repr, names[:8]))}" for word, names in told.items() if names)

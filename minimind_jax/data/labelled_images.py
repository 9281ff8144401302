"""Labelled pictures: {"image": path, "label": str} or a list of labels, or files in folders named after their label."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minimind_jax.config.sections import ReadingConfig
from minimind_jax.data.documents import Document
from minimind_jax.data.formats import IMAGES, TEXT
from minimind_jax.data.images import open_image
from minimind_jax.data.jsonl import READING, Record, expand_paths, is_picture
from minimind_jax.data.labels import Classes, read_labels
from minimind_jax.data.pictures import PictureFile, as_text, file_of, pack
from minimind_jax.data.values import Tell, field_names, is_absent, kind_of, meant
from minimind_jax.errors import UserError
from minimind_jax.texts import listed

FIELDS = (*IMAGES, "image_path", "file_name", "filename", "path", "file")  # where a picture is looked for


class Wordless:
    """What stands in a tokenizer's place where there are pictures alone, each of which is the token 0."""

    folder = fingerprint = ""
    vocab_size, eos_id, pad_id = 1, None, 0

    def vocabulary(self) -> dict[str, int]:
        return {}

    def token_bytes(self) -> np.ndarray:
        return np.zeros(1, np.int32)


class LabelledPicture(NamedTuple):
    """labels: one, or with several labels a picture any number. values: of the labels, by the classes."""

    picture: PictureFile
    labels: tuple[str, ...]
    values: tuple[float, ...] = ()

    def as_record(self) -> dict[str, Any]:
        """The record that says the same."""
        return {"image": as_text(self.picture), "label": list(self.labels)}

    def as_document(self) -> Document:
        """The picture as a document of one token, which is its marker."""
        ids, trained = np.zeros(1, np.int32), np.ones(1, bool)
        return Document(ids, trained, [0], self.values, (pack(self.picture),), (0,))


def parse_labelled_picture(record: Record, classes: Classes, reading: ReadingConfig = READING) -> LabelledPicture:
    """The picture, which is looked at, and its labels; other fields are told as left out. Raises UserError, also for a
    label that is not among the classes, where those are known."""
    picture = picture_of(record, classes.text_field, reading.ignore_fields)
    given = read_labels(record, classes, _place(record, classes.text_field))
    open_image(picture, record.where, record.tell)
    return LabelledPicture(picture, given.labels, classes.values(given.labels))


def picture_of(record: Record, field: str = "text", ignored: Collection[str] = ()) -> PictureFile:
    """The picture of a record to classify, of which no more is known than where it is said to be.

    field: where it is; `text`, the setting's default, stands for its usual names. ignored: fields that are left out.
    Raises UserError, also for a record with a text as well.
    """
    place = _place(record, field)
    value = record.value.get(place)
    if is_absent(value):
        found = f"{place} is {kind_of(value)}" if place in record.value else f"the fields {field_names(record.value)}"
        raise UserError(
            f"{record.where}: expected a field `image` with the path of a picture, found {found} (data.text_field, of "
            f"tools --text_field, names another{meant(record.value, FIELDS)})"
        )
    texts = [name for name in TEXT if name not in (place, *ignored) and not is_absent(record.value.get(name))]
    if texts:
        raise UserError(
            f"{record.where}: a picture ({place}) and a text ({texts[0]}); one of them is classified: "
            f"--data.ignore_fields {texts[0]} (of tools --ignore_fields) leaves the text out, and without "
            "--vision.tower texts are classified"
        )
    if isinstance(value, list):
        if len(value) != 1:
            raise UserError(f"{record.where}: {place} has {len(value)} pictures; a picture is classified by itself")
        value = value[0]
    return file_of(value, record, place)


def _place(record: Record, field: str) -> str:
    names = FIELDS if field == TEXT[0] else (field,)
    there = [name for name in names if name in record.value] or names
    return next((name for name in there if not is_absent(record.value.get(name))), there[0])


def check_folders(paths: Sequence[str | Path], tell: Tell) -> None:
    """Tells of folders in a folder of pictures that hold none, and are no labels. Raises UserError for one whose
    pictures lie neither all in folders of its own, named after their labels, nor all in itself."""
    for folder in (Path(path).expanduser() for path in paths):
        files = expand_paths([folder], pictures=True) if folder.is_dir() else []
        shown = [file.relative_to(folder) for file in files if is_picture(file)]
        bad = [file for file in shown if len(file.parts) != 2]
        if bad and {len(file.parts) for file in shown} != {1}:
            raise UserError(
                f"{folder}: {len(bad):,} of {len(shown):,} pictures do not lie in a folder named after their label, as "
                f"{folder / 'LABEL' / bad[0].name} would, such as {bad[0]}; move or remove them, or name the folder "
                "that holds those of the labels"
            )
        named = {file.parts[0] for file in shown}
        empty = [each.name for each in folder.glob("[!.]*/") if each.is_dir() and each.name not in named]
        if shown and empty:
            tell(f"{folder}: no picture that is read lies in {listed(sorted(empty), 4)}, so they are no labels")

"""The pictures of a record: where they are said to be, and their places in the conversation.

A picture is a field of the record beside the conversation (`image`, `images`, or MiniMind-V's `image_bytes`), in whose
text `<image>` marks its place; or a part of a message, as OpenAI and others write it. A picture's file is its content
(bytes), or its path, where it stays.
"""

import base64
import binascii
import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np

from minimind_jax.config.sections import ReadingConfig
from minimind_jax.data.formats import IMAGES, MESSAGES
from minimind_jax.data.images import NAMED, open_image
from minimind_jax.data.jsonl import PICTURES, READING, Record
from minimind_jax.data.messages import CONTENT, OTHER_ROLES, ROLES, Conversation, Message, messages_in
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.data.values import is_absent, kind_of
from minimind_jax.errors import UserError, explained
from minimind_jax.model.config import Vision

PARTS = ("image", "image_url", "input_image")
PLACE = "<image>"
SHOWN_BY = tuple(role for role in (*ROLES, *OTHER_ROLES) if OTHER_ROLES.get(role, role) in ("user", "tool"))
BLANK = 8  # pixels a side of MiniMind-V's black stand-in for the picture of a record of words alone

PictureFile = bytes | Path


class Marker(NamedTuple):
    """What stands for an image among the tokens of a model: a token's text, and how many of them there are."""

    text: str = "<|image_pad|>"
    tokens: int = 1

    @property
    def all(self) -> str:
        return self.text * self.tokens


MARKER = Marker()


def marker_of(tokenizer: Tokenizer, vision: Vision | None) -> Marker | None:
    """That of a model; None of a model of texts."""
    if vision is None:
        return None
    return Marker(tokenizer.decode([vision.marker_id], skip_special_tokens=False), vision.image_tokens)


@dataclasses.dataclass(frozen=True)
class ImageConversation:
    """A conversation with `marker.tokens` markers in the place of each of its pictures, in their order."""

    conversation: Conversation
    pictures: tuple[PictureFile, ...]
    marker: Marker

    @property
    def messages(self) -> list[Message]:
        """As people write them: with `<image>` for each picture."""
        return [{**m, "content": m["content"].replace(self.marker.all, PLACE)} for m in self.conversation.messages]

    def as_record(self) -> dict[str, Any]:
        """As JSON can say it: pictures out of a table as data URLs."""
        record = dataclasses.replace(self.conversation, messages=self.messages).as_record()
        return {**record, "images": [as_text(picture) for picture in self.pictures]} if self.pictures else record


def has_pictures(value: dict[str, Any], reading: ReadingConfig = READING) -> bool:
    """Whether a record's fields or messages have pictures."""
    if any(not is_absent(value.get(name)) for name in IMAGES if name not in reading.ignore_fields):
        return True
    return any(is_picture(part) for turn in _turns_of(value)[1] for part in _parts(turn))


def refuse_pictures(record: Record, reading: ReadingConfig = READING) -> None:
    """Raises UserError for a record that shows some, where words alone are read: an answer would not be about them."""
    if has_pictures(record.value, reading):
        raise UserError(
            f"{record.where}: it shows pictures, and words alone are read here; `minimind evaluate images` asks about "
            f"pictures, ignore_fields leaves a field of them out ({', '.join(IMAGES)})"
        )


def take_pictures(record: Record, reading: ReadingConfig = READING) -> tuple[Record, list[PictureFile]]:
    """The record as one of words alone, with `<image>` for pictures that are parts of messages; and its pictures, in
    order. Raises UserError with file and line."""
    value, beside, within = dict(record.value), [], []
    for name in IMAGES:
        if name in reading.ignore_fields or is_absent(item := value.pop(name, None)):
            continue
        if beside:
            raise UserError(f"{record.where}: pictures in two fields, of {', '.join(IMAGES)}; keep one of them")
        items = item if isinstance(item, list) else [item]
        beside = [file_of(each, record, f"{name}[{n}]") for n, each in enumerate(items)]
    name, turns = _turns_of(value)
    if name:
        value[name] = [_without_parts(turn, record, within) for turn in turns]
    found = [picture for picture in within if picture is not None]
    if found and (beside or len(found) < len(within)):
        raise UserError(
            f"{record.where}: some pictures are parts of messages and some stand in a field of the record; keep one way"
        )
    return dataclasses.replace(record, value=value), beside or found


def check_pictures(record: Record, pictures: Sequence[PictureFile]) -> None:
    """Looks at each. Raises UserError for one that cannot be read."""
    for where, picture in named(record.where, pictures):
        open_image(picture, where, record.tell)


def named(where: str, pictures: Sequence[PictureFile]) -> list[tuple[str, PictureFile]]:
    """The pictures of a record, each with the name that messages have for it."""
    return [(f"{where}: image {number}", picture) for number, picture in enumerate(pictures, 1)]


def place_pictures(
    record: Record, talk: Conversation, pictures: Sequence[PictureFile], marker: Marker
) -> ImageConversation:
    """The conversation of a record with markers where the user shows pictures.

    Raises UserError: there are more or fewer than places, or the text spells the marker.
    """
    if any(marker.text in message["content"] for message in talk.messages):
        raise UserError(f"{record.where}: the text has {marker.text}, which stands for pictures; write {PLACE} there")
    messages, shown = list(talk.messages), [n for n, m in enumerate(talk.messages) if m["role"] in SHOWN_BY]
    places = sum(messages[n]["content"].count(PLACE) for n in shown)
    if any(PLACE in message["content"] for message in messages if message["role"] not in SHOWN_BY):
        record.tell(f"`{PLACE}` in what others than the user say is read as a word")
    if not pictures:
        if places:
            record.tell(f"`{PLACE}` without a picture is read as a word")
        return ImageConversation(talk, (), marker)
    looks = (open_image(picture, where) for where, picture in named(record.where, pictures))
    if not places and all(max(look.size) <= BLANK and not look.getbbox() for look in looks):
        record.tell(f"a picture of {BLANK} x {BLANK} pixels and no `{PLACE}` in the text: words alone")
        return ImageConversation(talk, (), marker)
    if not places and shown:
        record.tell(f"no `{PLACE}` in the text: the pictures stand in front of the first question")
    texts = with_markers([messages[n]["content"] for n in shown], len(pictures), marker, record.where)
    for n, content in zip(shown, texts, strict=True):
        messages[n] = {**messages[n], "content": content}
    return ImageConversation(dataclasses.replace(talk, messages=messages), tuple(pictures), marker)


def with_markers(texts: Sequence[str], pictures: int, marker: Marker, where: str) -> list[str]:
    """What the user says, with markers in the places of so many pictures; those without a place stand in front.

    Raises UserError where there are more or fewer places, and `where`.
    """
    texts, places = list(texts), sum(text.count(PLACE) for text in texts)
    if not places and texts:
        texts[0], places = f"{PLACE}\n" * pictures + texts[0], pictures
    if places != pictures:
        raise UserError(f"{where}: {pictures} pictures, and {places} times {PLACE} in what the user says")
    return [text.replace(PLACE, marker.all) for text in texts]


def pack(picture: PictureFile) -> bytes:
    """A picture as a cache holds it."""
    return b"\0" + os.fsencode(picture) if isinstance(picture, Path) else b"\1" + picture


def unpack(stored: bytes) -> PictureFile:
    """What `pack` was given."""
    return Path(os.fsdecode(stored[1:])) if stored[:1] == b"\0" else stored[1:]


def _turns_of(value: dict[str, Any]) -> tuple[str | None, list[Any]]:
    """The name of a record's field of messages, and these; None without one."""
    found = ((name, messages_in(value[name])) for name in (*MESSAGES, "prompt") if name in value)
    return next(((name, turns) for name, turns in found if isinstance(turns, list)), (None, []))


def without_bytes(value: Any) -> Any:
    """A record or a part of it with data URLs in place of the contents of pictures, as JSON can say it."""
    if isinstance(value, bytes):
        return as_text(value)
    if isinstance(value, dict):
        return {name: without_bytes(item) for name, item in value.items()}
    return [without_bytes(item) for item in value] if isinstance(value, list) else value


def as_text(picture: PictureFile) -> str:
    """A picture as JSON can say it."""
    if isinstance(picture, Path):
        return str(picture)
    return f"data:application/octet-stream;base64,{base64.b64encode(picture).decode()}"


def _parts(turn: Any) -> list[Any]:
    contents = [turn.get(name) for name in CONTENT] if isinstance(turn, dict) else []
    return next((content for content in contents if isinstance(content, list)), [])


def is_picture(part: Any) -> bool:
    """Whether a part of a message is one. Some leave its type to be seen from the field, as vLLM's and Qwen's."""
    if not isinstance(part, dict):
        return False
    return part.get("type", next((name for name in PARTS if not is_absent(part.get(name))), None)) in PARTS


def check_part(part: Any, where: str) -> None:
    """Raises UserError for a part of a message that is a picture and a text, or two pictures: one would be left out."""
    names = [name for name in (*PARTS, "text") if isinstance(part, dict) and not is_absent(part.get(name))]
    if any(unwrap(part[name]) != unwrap(part[names[0]]) for name in names):
        raise UserError(f"{where} has {' and '.join(names)}; make a part of each of them, with its type")


def source_in(part: dict[str, Any]) -> Any:
    """What a part that is a picture says of where it is, see `unwrap`; None if it says nothing."""
    return next((part[name] for name in (*PARTS, "url", "path") if not is_absent(part.get(name))), None)


def unwrap(value: Any) -> Any:
    """The content or address of a picture, which may stand in an object: OpenAI's {"url"}, {"bytes", "path"} of Hugging
    Face's datasets."""
    if not isinstance(value, dict):
        return value
    return next((value[name] for name in ("bytes", "url", "path") if not is_absent(value.get(name))), None)


def names_picture(value: Any) -> bool:
    """Whether a field of another name seems to hold a picture, or its path."""
    value = unwrap(value[0] if isinstance(value, list) and value else value)
    return isinstance(value, bytes) or (isinstance(value, str) and value.lower().endswith(PICTURES))


def read_data_url(url: str, where: str) -> bytes:
    """The content of a data URL; its base64 may have line breaks, and lack its padding. Raises UserError."""
    header, _, written = url.partition(",")
    if not header.rstrip().lower().endswith(";base64"):
        raise UserError(
            f"{where}: a data URL that is not base64 ({url[:40]}); write data:image/png;base64, and its base64"
        )
    written = "".join(unquote(written).split())
    with explained(f"{where}: a data URL that is not base64", binascii.Error):
        return base64.b64decode(written + "=" * (-len(written) % 4), validate=True)


def find_file(address: str, folder: Path, where: str) -> PictureFile:
    """The file that a path from `folder`, which may begin with ~, a file URL or a data URL stands for. Raises UserError
    for another address."""
    scheme, colon, rest = address.partition(":")
    if colon and scheme.lower() == "data":
        return read_data_url(address, where)
    if colon and scheme.lower() == "file":  # file:///a, file://localhost/a and file:/a are one
        return folder.absolute() / unquote(re.sub("^//(localhost(?=/))?", "", rest))
    if not rest.startswith("//"):
        file = folder.absolute() / os.path.expanduser(address)
        if os.path.exists(address) and not os.path.exists(file):
            raise UserError(
                f"{where}: {address[:NAMED]} is there in the current folder, and not in {folder}, that of the data "
                "file, where paths begin; write the path from there, or a whole one"
            )
        return file
    raise UserError(f"{where} is an address ({address[:60]}); download the picture and give its path")


def _without_parts(turn: Any, record: Record, within: list[PictureFile | None]) -> Any:
    """A message with `<image>` in place of parts that are pictures, which go to `within`: None of those without one of
    their own, which stands in a field of the record."""
    parts = _parts(turn)
    if not any(map(is_picture, parts)):
        return turn
    role, texts = turn.get("role", turn.get("from", "user")), []
    if role not in SHOWN_BY:
        raise UserError(f"{record.where}: a picture in a message of {role}; it is the user who shows pictures")
    for number, part in enumerate(parts):
        check_part(part, f"{record.where}: part {number + 1} of a message")
        texts.append({"type": "text", "text": PLACE} if is_picture(part) else part)
        if is_picture(part):
            own = source_in(part)
            within.append(None if own is None else file_of(own, record, "a picture among parts"))
    return {name: texts if value is parts else value for name, value in turn.items()}


def file_of(value: Any, record: Record, what: str) -> PictureFile:
    """What a field says: content, a path beside the data file, a data URL, or an object that holds one of these."""
    place, value = f"{record.where}: {what}", unwrap(value)
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise UserError(f"{place} is {kind_of(value)}; expected the path of a picture, a data URL or its content")
    return find_file(value, record.file.parent, place)


@dataclasses.dataclass(frozen=True)
class StoredPictures:
    """The pictures of a cache's documents, memory-mapped.

    offsets: (documents + 1,) document d has the pictures offsets[d] to offsets[d + 1]. marker_starts: (pictures,) where
    the markers of each begin in its document. content_offsets: (pictures + 1,) of each in content, bytes of `pack`.
    """

    offsets: np.ndarray
    marker_starts: np.ndarray
    content_offsets: np.ndarray
    content: np.ndarray

    def counts(self, tokens: int) -> np.ndarray:
        """(documents,) pictures of each that begin within its first so many tokens."""
        return np.diff(np.concatenate([[0], np.cumsum(self.marker_starts < tokens)])[self.offsets])

    def of(self, document: int) -> list[tuple[int, PictureFile]]:
        """Of each picture of a document where its markers begin, and itself."""
        numbers = range(self.offsets[document], self.offsets[document + 1])
        return [(int(self.marker_starts[n]), self.picture(n)) for n in numbers]

    def picture(self, number: int) -> PictureFile:
        """One of them, by its number among all."""
        return unpack(self.content[self.content_offsets[number] : self.content_offsets[number + 1]].tobytes())

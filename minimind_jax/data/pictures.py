"""The pictures of a record: where they are said to be, and their places in the conversation.

A picture is a field of the record beside the conversation (`image`, `images`, or MiniMind-V's `image_bytes`), in whose
text `<image>` marks its place; or a part of a message, as OpenAI and others write it. A picture is its file's content
(bytes), or the path of its file, which stays where it is.
"""

import base64
import binascii
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minimind_jax.data.formats import IMAGES, MESSAGES
from minimind_jax.data.images import open_image
from minimind_jax.data.jsonl import READING, Reading, Record
from minimind_jax.data.messages import CONTENT, Conversation, messages_in
from minimind_jax.data.values import is_absent, kind_of
from minimind_jax.errors import UserError

PARTS = ("image", "image_url", "input_image")
PLACE = "<image>"
BLANK = 8  # pixels a side of MiniMind-V's stand-in for the picture of a record of words alone

Picture = bytes | Path


class Sight(NamedTuple):
    """How a model's tokens stand for a picture: its marker's text, and how many of them there are."""

    marker: str = "<|image_pad|>"
    tokens: int = 1


SIGHT = Sight()


@dataclasses.dataclass(frozen=True)
class Seen:
    """A conversation with `sight.tokens` markers in the place of each of its pictures, in their order."""

    conversation: Conversation
    pictures: tuple[Picture, ...]
    sight: Sight

    def as_record(self) -> dict[str, Any]:
        """As JSON can say it: pictures out of a table as data URLs."""
        messages = [
            {**message, "content": message["content"].replace(self.sight.marker * self.sight.tokens, PLACE)}
            for message in self.conversation.messages
        ]
        record = dataclasses.replace(self.conversation, messages=messages).as_record()
        return {**record, "images": [_as_text(picture) for picture in self.pictures]} if self.pictures else record


def has_pictures(value: dict[str, Any]) -> bool:
    """Whether a record's fields or messages have pictures."""
    if any(not is_absent(value.get(name)) for name in IMAGES):
        return True
    turns = next((messages_in(value[name]) for name in MESSAGES if name in value), None)
    return isinstance(turns, list) and any(_is_picture(part) for turn in turns for part in _parts(turn))


def take_pictures(record: Record, reading: Reading = READING) -> tuple[Record, list[Picture]]:
    """The record as one of words alone, with `<image>` for pictures that are parts of messages; and its pictures, in
    order. Raises UserError with file and line."""
    value, beside, within = dict(record.value), [], []
    for name in set(IMAGES) - set(reading.ignore_fields):
        if is_absent(item := value.pop(name, None)):
            continue
        if beside:
            raise UserError(f"{record.where}: pictures in two fields, of {', '.join(IMAGES)}; keep one of them")
        beside = [_picture(each, record, f"{name}[{n}]") for n, each in enumerate(_as_list(item))]
    name = next((name for name in MESSAGES if name in value), None)
    turns = messages_in(value.get(name))
    if isinstance(turns, list):
        value[name] = [_without_parts(turn, record, within) for turn in turns]
    found = [picture for picture in within if picture is not None]
    if found and (beside or len(found) < len(within)):
        raise UserError(
            f"{record.where}: some pictures are parts of messages and some stand in a field of the record; keep one way"
        )
    return dataclasses.replace(record, value=value), beside or found


def place_pictures(record: Record, talk: Conversation, pictures: Sequence[Picture], sight: Sight) -> Seen:
    """The conversation of a record with markers where the user shows pictures, of which each is looked at.

    Raises UserError: a picture cannot be read, there are more or fewer than places, or the text spells the marker.
    """
    if any(sight.marker in message["content"] for message in talk.messages):
        raise UserError(f"{record.where}: the text has {sight.marker}, which stands for pictures; write {PLACE} there")

    def tell(note: str) -> None:
        record.told[str(record.file), note] += 1

    sizes = [open_image(picture, f"{record.where}: image {n}", tell).size for n, picture in enumerate(pictures, 1)]
    messages, shown = list(talk.messages), [n for n, m in enumerate(talk.messages) if m["role"] in ("user", "tool")]
    places = sum(messages[n]["content"].count(PLACE) for n in shown)
    if not pictures:
        if places:
            tell(f"`{PLACE}` without a picture is read as a word")
        return Seen(talk, (), sight)
    if not places and max(map(max, sizes)) <= BLANK:
        tell(f"a picture of {BLANK} x {BLANK} pixels and no `{PLACE}` in the text: words alone")
        return Seen(talk, (), sight)
    if not places and shown:
        tell(f"no `{PLACE}` in the text: the pictures stand in front of the first question")
        first, places = messages[shown[0]], len(pictures)
        messages[shown[0]] = {**first, "content": f"{PLACE}\n" * places + first["content"]}
    if places != len(pictures):
        raise UserError(f"{record.where}: {len(pictures)} pictures, and {places} times {PLACE} in what the user says")
    for n in shown:
        content = messages[n]["content"].replace(PLACE, sight.marker * sight.tokens)
        messages[n] = {**messages[n], "content": content}
    return Seen(dataclasses.replace(talk, messages=messages), tuple(pictures), sight)


def pack(picture: Picture) -> bytes:
    """A picture as a cache holds it."""
    return b"\0" + os.fsencode(picture) if isinstance(picture, Path) else b"\1" + picture


def unpack(stored: bytes) -> Picture:
    """What `pack` was given."""
    return Path(os.fsdecode(stored[1:])) if stored[:1] == b"\0" else stored[1:]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _as_text(picture: Picture) -> str:
    if isinstance(picture, Path):
        return str(picture)
    return f"data:application/octet-stream;base64,{base64.b64encode(picture).decode()}"


def _parts(turn: Any) -> list[Any]:
    contents = [turn.get(name) for name in CONTENT] if isinstance(turn, dict) else []
    return next((content for content in contents if isinstance(content, list)), [])


def _is_picture(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in PARTS


def _without_parts(turn: Any, record: Record, within: list[Picture | None]) -> Any:
    """A message with `<image>` in place of parts that are pictures, which go to `within`: None of those without one of
    their own, which stands in a field of the record."""
    parts = _parts(turn)
    if not any(map(_is_picture, parts)):
        return turn
    texts = []
    for part in parts:
        texts.append({"type": "text", "text": PLACE} if _is_picture(part) else part)
        if _is_picture(part):
            own = next((part[name] for name in (*PARTS, "url", "path") if not is_absent(part.get(name))), None)
            within.append(None if own is None else _picture(own, record, f"a part of type {part['type']}"))
    return {name: texts if value is parts else value for name, value in turn.items()}


def _picture(value: Any, record: Record, what: str) -> Picture:
    """What a field says: content, a path beside the data file, a data URL, or an object that holds one of these."""
    place = f"{record.where}: {what}"
    if isinstance(value, dict):  # of OpenAI {"url"}, of Hugging Face's datasets {"bytes", "path"}
        value = next((value[name] for name in ("bytes", "url", "path") if not is_absent(value.get(name))), None)
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise UserError(f"{place} is {kind_of(value)}; expected the path of a picture, a data URL or its content")
    if value.startswith("data:"):
        try:
            return base64.b64decode(value.partition("base64,")[2], validate=True)
        except binascii.Error as error:
            raise UserError(f"{place}: a data URL that is not base64: {error}") from error
    if value.startswith(("http://", "https://")):
        raise UserError(f"{place} is an address ({value[:60]}); download the picture and give its path")
    return record.file.absolute().parent / value.removeprefix("file://")


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
        begun = np.concatenate([[0], np.cumsum(self.marker_starts < tokens)])
        return np.diff(begun[self.offsets])

    def of(self, document: int) -> list[tuple[int, Picture]]:
        """Of each picture of a document where its markers begin, and itself."""
        numbers = range(self.offsets[document], self.offsets[document + 1])
        contents = (self.content[self.content_offsets[n] : self.content_offsets[n + 1]].tobytes() for n in numbers)
        return [(int(self.marker_starts[n]), unpack(content)) for n, content in zip(numbers, contents, strict=True)]

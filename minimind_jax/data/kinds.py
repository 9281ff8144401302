"""The table of kinds of data: how a record of each is read, tokenised and packed, and what is said of it.

A new kind is a row here and a file of its own. Which fields of whose records are read as which kind is another table:
`formats.FORMATS`.
"""

import dataclasses
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from minimind_jax.config.sections import ReadingConfig
from minimind_jax.data import documents, pictures
from minimind_jax.data.formats import TEXT, detect, read_record, read_text, renaming
from minimind_jax.data.jsonl import READING, Record
from minimind_jax.data.labelled_images import parse_labelled_picture
from minimind_jax.data.labels import LABEL_FIELDS, Classes, parse_labelled
from minimind_jax.data.messages import Conversation, Message, check_closed, is_trained
from minimind_jax.data.preferences import Preference
from minimind_jax.data.prompts import Prompt, read_prompt
from minimind_jax.data.template import Roll
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.data.values import Tell, field_names
from minimind_jax.errors import UserError

KindName = Literal["text", "conversation", "preference", "labelled", "prompt", "images", "pictures"]

BEGINNING = 40  # characters of a text, of which the last word is left out


class Wanted(NamedTuple):
    """What a record is read for."""

    reading: ReadingConfig = READING  # of its file
    classes: Classes | None = None  # of labelled records
    flag: str = "--data.on_error"  # what skips broken records
    marker: pictures.Marker = pictures.MARKER  # of the model that looks at pictures


def parse_text(record: Record, flag: str = "--data.on_error", reading: ReadingConfig = READING) -> str:
    """The text of a pretraining record {"text": str}. Raises UserError, which names the flag that skips records."""
    text, name = read_text(record, reading)
    if not text.strip():
        raise UserError(f"{record.where}: {name} is empty; remove the line, or pass {flag} skip")
    return text


def parse_conversation(record: Record, for_training: bool = True, reading: ReadingConfig = READING) -> Conversation:
    """The conversation of a record of any format (see `formats`), as {"conversations": [message, ...]}, MiniMind's.
    Raises UserError, also for a conversation in which the assistant says nothing that is trained, unless it is only to
    be answered or scored (for_training False); fields that nobody understands are then no error, but pictures are."""
    if not for_training:
        pictures.refuse_pictures(record, reading)
    conversation = read_record(record, "conversation", reading, keeps=not for_training)
    if for_training and not any(map(is_trained, conversation.messages)):
        raise UserError(
            f"{record.where}: nothing to train on; expected at least one assistant message with content, "
            "reasoning_content or tool_calls; remove the line, or pass --data.on_error skip"
        )
    if for_training:
        check_closed(conversation.messages, record.where)
        roles = [message["role"] for message in conversation.messages if message["role"] != "system"]
        if roles[0] == "assistant":
            record.tell("the assistant speaks first, and these words are trained")
        if roles[-1] == "user":
            record.tell("the last message is the user's, and nothing answers it")
        if any(a == b == "user" for a, b in itertools.pairwise(roles)):
            record.tell("the user speaks twice in a row, and only the answer to both is trained")
    return conversation


def parse_preference(record: Record, reading: ReadingConfig = READING) -> Preference:
    """The pair of a record of any format, as {"chosen": [message, ...], "rejected": [message, ...]}. Raises UserError,
    also for a pair that is the same on both sides, without a question, or in which a side has no answer of its own."""
    pair = read_record(record, "preference", reading)
    check_closed(pair.chosen.messages, f"{record.where}: chosen")
    return pair


def parse_image_conversation(record: Record, wanted: Wanted) -> pictures.ImageConversation:
    """The conversation of a record of any format and its pictures (see `pictures`), which are looked at."""
    words, files = pictures.take_pictures(record, wanted.reading)
    talk = parse_conversation(words, reading=wanted.reading)
    pictures.check_pictures(record, files)
    return pictures.place_pictures(record, talk, files, wanted.marker)


def kind_of_record(record: Record, reading: ReadingConfig = READING) -> KindName:
    """What a record says: a text, a conversation (with images), or a pair. Raises UserError if it is none of these."""
    found = detect(record.value, reading)
    if found is None:
        names = renaming(record.value, (*TEXT, *LABEL_FIELDS))
        asked = "; prompts for grpo, ppo and agent are shown by data inspect --kind prompt" * ("prompt" in record.value)
        raise UserError(
            f"{record.where}: no format that is read has the fields {field_names(record.value)}; docs/data.md lists "
            f"all, --rename {names} gives fields the names of one (of data convert), --text_field names a text{asked}"
        )
    return "images" if found == "conversation" and pictures.has_pictures(record.value) else found


def beginning(text: str) -> str:
    """The first words of a text that is not empty."""
    return text[:BEGINNING].rsplit(maxsplit=1)[0] if len(text) > BEGINNING else text.split()[0]


def first_question(messages: Sequence[Message]) -> str:
    """What the user says first; "" if nothing."""
    return next((message["content"] for message in messages if message["role"] == "user"), "")


def spoken(messages: Sequence[Message]) -> str:
    """All that is said and thought in messages."""
    return "\n".join(part for m in messages for part in (m.get("reasoning_content"), m["content"]) if part)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What all kinds of data have, and each in its own way."""

    noun: str  # what messages call its records
    parse: Callable[[Record, Wanted], Any]  # what a record says. Raises UserError with file and line
    # of what is parsed the document, given the record's draws of the template's chances and a listener for what is told
    # of it. Raises UserError without file and line
    encode: Callable[[Tokenizer, Any, Roll, Tell], documents.Document]
    # how its documents are packed (`epoch.PACKINGS`); of several, as `data.packing` says; none where they are read one
    # by one
    packings: tuple[str, ...]
    # what is wrong where none of its documents has a row in which something is trained
    why_no_row: str = "no answer lies within a row"
    # the record of our own format that says what is parsed
    as_record: Callable[[Any], dict[str, Any]] = operator.methodcaller("as_record")
    # written by the chat template: its chances are drawn, only some tokens are trained, and places between the turns
    # are known
    rendered: bool = False
    has_values: bool = False  # numbers belong to each document
    is_labelled: bool = False  # which say what it is
    # running text, which may be cut anywhere, and then keeps its end token as the last of a row of its own
    cut_freely: bool = False
    has_pictures: bool = False  # documents have pictures, of which markers among their tokens stand for
    in_files: bool = False  # a file may be one
    counts: tuple[str, ...] = ()  # what `data inspect` shows of a cache beside documents and tokens
    words: Callable[[Any], str] | None = None  # what a tokenizer learns from
    question: Callable[[Any], str] | None = None  # what a sample asks or goes on from; None where no model writes
    prompt: Callable[[Tokenizer, str], list[int]] | None = None  # the tokens the model then goes on from


def _asked(tokenizer: Tokenizer, question: str) -> list[int]:
    return documents.encode_prompt(tokenizer, [{"role": "user", "content": question}])


def _encode_prompt(tokenizer: Tokenizer, prompt: Prompt, roll: Roll, tell: Tell) -> documents.Document:
    conversation, _ = roll(prompt.as_conversation())
    ids = np.array(documents.encode_prompt(tokenizer, conversation.messages, conversation.tools), np.int32)
    return documents.Document(ids, np.zeros(len(ids), bool), [0])


def _encode_image_conversation(
    tokenizer: Tokenizer, with_images: pictures.ImageConversation, roll: Roll, tell: Tell
) -> documents.Document:
    document = documents.encode_conversation(tokenizer, with_images.conversation, roll, tell)
    markers = np.flatnonzero(document.ids == tokenizer.encode(with_images.marker.text)[0])
    if len(markers) != len(with_images.pictures) * with_images.marker.tokens:
        raise UserError(f"the chat template does not write {with_images.marker.text} wherever a picture stands")
    packed, starts = tuple(map(pictures.pack, with_images.pictures)), markers[:: with_images.marker.tokens].tolist()
    return dataclasses.replace(document, pictures=packed, picture_starts=starts)


KINDS: dict[KindName, Kind] = {
    "text": Kind(
        noun="documents",
        parse=lambda record, wanted: parse_text(record, wanted.flag, wanted.reading),
        as_record=lambda text: {"text": text},
        encode=lambda tokenizer, text, roll, tell: documents.encode_text(tokenizer, text),
        packings=("concat", "best_fit", "pad"),
        why_no_row="no document has two tokens",
        cut_freely=True,
        words=str,
        question=beginning,
        prompt=lambda tokenizer, text: documents.begun(tokenizer, tokenizer.encode(text)),
    ),
    "conversation": Kind(
        noun="conversations",
        parse=lambda record, wanted: parse_conversation(record, reading=wanted.reading),
        encode=documents.encode_conversation,
        packings=("concat", "best_fit", "pad"),
        rendered=True,
        counts=("turns",),
        words=lambda talk: spoken(talk.messages),
        question=lambda talk: first_question(talk.messages),
        prompt=_asked,
    ),
    "preference": Kind(
        noun="pairs",
        parse=lambda record, wanted: parse_preference(record, wanted.reading),
        encode=documents.encode_preference,
        packings=("pairs",),
        why_no_row="their answers leave no room for a prompt in a row",
        rendered=True,
        has_values=True,
        words=lambda pair: spoken([*pair.chosen.messages, pair.rejected.messages[-1]]),
        question=lambda pair: first_question(pair.chosen.messages),
        prompt=_asked,
    ),
    "labelled": Kind(
        noun="texts",
        parse=lambda record, wanted: parse_labelled(record, wanted.classes),
        encode=lambda tokenizer, text, roll, tell: documents.encode_labelled(tokenizer, text),
        packings=("heads",),
        has_values=True,
        is_labelled=True,
    ),
    "prompt": Kind(
        noun="prompts",
        parse=lambda record, wanted: read_prompt(record, wanted.reading),
        as_record=lambda prompt: prompt.as_conversation().as_record(),
        encode=_encode_prompt,
        packings=(),
        why_no_row="no prompt leaves room for an answer",
        question=lambda prompt: first_question(prompt.as_conversation().messages),
        prompt=_asked,
    ),
    "images": Kind(
        noun="conversations with images",
        parse=parse_image_conversation,
        encode=_encode_image_conversation,
        packings=("images",),
        why_no_row="no answer lies within a row, or all have more pictures than one holds",
        rendered=True,
        has_pictures=True,
        counts=("turns", "images"),
        words=lambda with_images: spoken(with_images.conversation.messages),
        question=lambda with_images: first_question(with_images.messages),
        prompt=_asked,
    ),
    "pictures": Kind(
        noun="pictures",
        parse=lambda record, wanted: parse_labelled_picture(record, wanted.classes, wanted.reading),
        encode=lambda tokenizer, picture, roll, tell: picture.as_document(),
        packings=("heads",),
        why_no_row="no picture is left",
        has_values=True,
        is_labelled=True,
        has_pictures=True,
        in_files=True,
    ),
}

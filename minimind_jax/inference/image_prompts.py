"""Conversations that show pictures, as a chat template takes them: the pictures' markers stand among the words, where
training and the template of the exported model put them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minimind_jax.data.images import Picture, count_pixels, open_picture
from minimind_jax.data.messages import CONTENT
from minimind_jax.data.pictures import SHOWN_BY, Marker, check_part, is_picture, source_in, unwrap
from minimind_jax.data.values import kind_of
from minimind_jax.errors import UserError
from minimind_jax.inference.image_encoder import BLIND
from minimind_jax.model.config import TowerConfig, Vision

MOST_PIXELS = 2**28  # of all pictures together, as many as are decoded within seconds

Fetch = Callable[[str, str], bytes | Path]


def open_images(
    messages: Sequence[Any],
    vision: Vision | None,
    marker: Marker | None,
    fetch: Fetch,
    tell: Callable[[str], None] = lambda note: None,
    where: str = "messages",
) -> tuple[list[Any], tuple[Picture, ...]]:
    """The messages with markers in place of the parts that are pictures, and these in order: of a request.

    messages: of any dialect; those that have no such part are left as they are.
    vision, marker: of the model (see `marker_of`); None of a blind one.
    fetch: of a picture's address, and the place that says it, its content or the path of its file.
    tell: hears what of a picture is not seen. where: of the messages, for errors.
    Raises UserError: a picture that cannot be read, one that the user does not show, too many pixels of all together,
    or for a model of texts.
    """
    shown: dict[str, Any] = {}

    def word(part: Any, role: Any, place: str) -> Any:
        check_part(part, place)
        if not is_picture(part):
            _check_text(part.get("text") if isinstance(part, dict) else part, marker, place)
            return part
        if vision is None:
            raise UserError(f"{place} is a picture, and {BLIND}")
        if role not in SHOWN_BY:
            raise UserError(f"{place} is a picture in a message of {role}; it is the user who shows pictures")
        shown[place] = part
        return {"type": "text", "text": marker.all}

    found = []
    for index, message in enumerate(messages):
        name = next((name for name in CONTENT if isinstance(message, dict) and message.get(name)), None)
        content, place = message[name] if name else None, f"{where}[{index}].{name}"
        if isinstance(content, list):
            role = message.get("role", message.get("from"))
            parts = [word(part, role, f"{place}[{number}]") for number, part in enumerate(content)]
            message = {**message, name: parts}
        else:
            _check_text(content, marker, place)
        found.append(message)
    return found, open_parts(shown, vision.tower, fetch, tell) if shown else ()


def open_parts(
    parts: Mapping[str, Any], tower: TowerConfig, fetch: Fetch, tell: Callable[[str], None] = lambda note: None
) -> tuple[Picture, ...]:
    """The pictures that parts of a request are, by their places. All are measured before one is decoded.

    Raises UserError: a picture that cannot be read, or too many pixels of all together.
    """
    sources, pixels = {}, 0
    for place, part in parts.items():
        source = sources[place] = _fetched(unwrap(source_in(part)), fetch, place)
        pixels += 0 if isinstance(source, Picture) else count_pixels(source, place)
        if pixels > MOST_PIXELS:
            told = f"{MOST_PIXELS:,} are read; make them smaller, or ask about fewer"
            raise UserError(f"{place}: with this picture they have {pixels:,} pixels together; at most {told}")
    return tuple(
        source if isinstance(source, Picture) else open_picture(source, tower, place, tell)
        for place, source in sources.items()
    )


def _fetched(source: Any, fetch: Fetch, place: str) -> Picture | bytes | Path:
    if isinstance(source, str) and source:
        source = fetch(source, place)
    if not isinstance(source, Picture | bytes | Path):
        way_out = '{"type": "image_url", "image_url": {"url": ...}} says it; files that are named by an id are not kept'
        raise UserError(f"{place} is a picture without an address or content: {kind_of(source)}; {way_out}")
    return source


def _check_text(text: Any, marker: Marker | None, place: str) -> None:
    if marker is not None and isinstance(text, str) and marker.text in text:
        raise UserError(f"{place}: the text has {marker.text}, which stands for pictures; leave it out")

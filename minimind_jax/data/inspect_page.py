"""The records that `minimind data inspect` shows, as a page with their pictures in their places."""

import base64
import html
import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from minimind_jax.data.images import open_image
from minimind_jax.data.pictures import Marker, PictureFile

SIDE = 256  # pixels of a thumbnail's longer side
HEAD = """<!doctype html><meta charset="utf-8"><title>Records</title>
<style>body {font: 16px sans-serif; max-width: 60em; margin: auto} p {white-space: pre-wrap; color: #666}
b {color: #070} img {vertical-align: middle; border: 1px solid #aaa}</style>
"""


class Shown(NamedTuple):
    """A record as a model sees it. pieces: texts, and whether their tokens are trained. left: tokens not shown."""

    number: int
    tokens: int
    pieces: list[tuple[str, bool]]
    pictures: list[PictureFile]
    left: int

    @property
    def title(self) -> str:
        return f"record {self.number}, {self.tokens:,} tokens"


def write_page(file: Path, records: Iterable[Shown], marker: Marker) -> None:
    """One file that needs no other: trained words are bold, pictures as they are opened, small."""
    blocks = [HEAD]
    for record in records:
        pictures, marks = iter(enumerate(record.pictures, 1)), marker.all
        inner = []
        for piece, is_trained in record.pieces:
            first, *others = (html.escape(text) for text in piece.split(marks))
            text = first + "".join(_thumbnail(*next(pictures)) + other for other in others)
            inner.append(f"<b>{text}</b>" if is_trained else text)
        more = f" … and {record.left:,} more tokens" * (record.left > 0)
        blocks.append(f"<h2>{record.title}</h2>\n<p>{''.join(inner)}{more}</p>\n")
    file.write_text("".join(blocks), encoding="utf-8")


def _thumbnail(number: int, picture: PictureFile) -> str:
    name = f"image {number}"
    image = open_image(picture, name)
    width, height = image.size
    image.thumbnail((SIDE, SIDE))
    image.save(stream := io.BytesIO(), "PNG")
    where = f", {picture}" if isinstance(picture, Path) else ""
    told = html.escape(f"{name}: {width} x {height}{where}")
    return f'<img title="{told}" src="data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}">'

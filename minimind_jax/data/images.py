"""Pictures as a tower reads them: decoded, upright, in RGB, and resized as transformers' processor of SigLIP does it.

Whoever opens a picture runs a decoder on what others wrote: its size is looked at before it is decoded, and whatever is
wrong with it is a UserError that says where.
"""

import dataclasses
import errno
import hashlib
import io
import math
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minimind_jax.data.values import Tell, unheard
from minimind_jax.errors import UserError, explained
from minimind_jax.model.config import TowerConfig
from minimind_jax.shell import needing

if TYPE_CHECKING:
    from PIL import Image

# Decoded it takes a quarter of a gigabyte. Pillow's own limit, at which it only warns, is a third more.
MOST_PIXELS = 2**26
NAMED = 300  # characters of a path in a message
# Decoders of what people have; Pillow's others read formats of which some start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture as a tower reads it. pixels: uint8 (image_size, image_size, 3). digest: of these; pictures are the same
    where it is."""

    pixels: np.ndarray = dataclasses.field(compare=False, repr=False)
    digest: bytes


def open_picture(source: bytes | Path, tower: TowerConfig, where: str, tell: Tell = unheard) -> Picture:
    """The picture of a file's content or path. Arguments and errors are those of `read_image`."""
    pixels = read_image(source, tower, where, tell)
    return Picture(pixels, hashlib.blake2b(pixels, digest_size=16).digest())


def read_image(source: bytes | Path, tower: TowerConfig, where: str, tell: Tell = unheard) -> np.ndarray:
    """A picture, a file's content or its path, as uint8 (image_size, image_size, 3): the `pixels` of a batch.

    where: of the picture, for messages, such as file and row. tell: hears what of it is left out.
    Raises UserError: it is no picture, damaged, too large, or of numbers that are no colours.
    """
    return np.asarray(open_image(source, where, tell).resize((tower.image_size, tower.image_size), tower.resample))


def count_pixels(source: bytes | Path, where: str) -> int:
    """Of a picture, as its header says. Raises UserError where it has none, or says too many."""
    return math.prod(_open(source, where).size)


def open_image(source: bytes | Path, where: str, tell: Tell = unheard) -> "Image.Image":
    """A picture in its own size, upright and in RGB, of which every pixel has been decoded. Raises as `read_image`."""
    image, where = _open(source, where), _place(source, where)
    with explained(f"{where}: a damaged picture", Exception, way_out="replace or remove it"):  # decoders raise anything
        if image.format in ("GIF", "WEBP", "PNG", "TIFF") and getattr(image, "is_animated", False):
            what = "the pages of a TIFF file" if image.format == "TIFF" else "animated pictures"
            tell(f"of {what} only the first is seen")
        return _in_colour(image, where)


def _open(source: bytes | Path, where: str) -> "Image.Image":
    """The picture, of which only the header has been read."""
    with needing("pictures need Pillow", "vision"):
        from PIL import Image
    try:
        content = source if isinstance(source, bytes) else source.read_bytes()
    except (OSError, ValueError) as error:  # a name with a NUL
        why = getattr(error, "strerror", None) or error
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:
            why = f"{why}; the base64 of a picture stands behind data:image/png;base64,"
        if "\\" in str(source) and os.sep == "/":
            why = f"{why}; folders of a path are parted by / here"
        raise UserError(f"{where}: the picture {str(source)[:NAMED]} cannot be read: {why}") from error
    where = _place(source, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{where}: a picture of too many pixels; at most {MOST_PIXELS:,} are read: shrink it"
        ) from error
    except Exception as error:
        what = "or a damaged one" if content else "but an empty file"
        raise UserError(
            f"{where}: not a picture that is read ({', '.join(FORMATS)}), {what}; save it as JPEG or PNG, or remove it"
        ) from error
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise UserError(
            f"{where}: a picture of {width:,} x {height:,} pixels; at most {MOST_PIXELS:,} are read: shrink it"
        )
    return image


def _place(source: bytes | Path, where: str) -> str:
    """Where a picture is, with its file's path unless that is said already."""
    return where if isinstance(source, bytes) or source.name in where else f"{where}: {source}"


def _in_colour(image: "Image.Image", where: str) -> "Image.Image":
    """As the camera was held, which EXIF says, and in RGB; what is transparent is white, as transformers 5 makes it."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # grey in 16 bits, which Pillow would clip
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UserError(f"{where}: its pixels are numbers without a scale (mode {image.mode}); save it with 8 bits")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")

"""What a model sees of pictures: the tokens that stand in the places of their markers.

The tower looks once at a picture, however many prompts show it, and in however many parts these are read.
"""

from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from jax import Array

from minimind_jax.data.images import Picture
from minimind_jax.errors import UserError
from minimind_jax.inference.request import Request
from minimind_jax.inference.scheduler import Sign, Task
from minimind_jax.model.config import Vision

BLIND = "this model reads words alone; ask one that `minimind vlm-sft` made"
AT_ONCE = (1, 8)  # pictures in one call of the tower, which is compiled for these numbers
MOST_BYTES = 1 << 28  # of what is kept of pictures, on the host


class ImageEncoder:
    """look: compiled; pixels (N, S, S, 3) -> image tokens (N, image_tokens, D), for the N of `AT_ONCE`."""

    def __init__(self, vision: Vision, look: Callable[[np.ndarray], Array]):
        self._image_tokens, self._side, self._look = vision.image_tokens, vision.tower.image_size, look
        self._seen: dict[bytes, np.ndarray] = {}  # by digest, those last that were used last
        self.looked = 0  # at so many pictures

    def clear(self) -> None:
        """Looks anew at everything: the parameters are others."""
        self._seen = {}

    def warm_up(self) -> None:
        for count in AT_ONCE:
            self._look(np.zeros((count, self._side, self._side, 3), np.uint8))

    def tokens_of(self, parts: Sequence[tuple[Task, int]]) -> list[np.ndarray | None]:
        """Image tokens (n, D) of the markers among the next tokens of each task, of which so many are read; None where
        there are none."""
        due = [self._due(task, count) for task, count in parts]
        seen = self.see(picture for pictures, _ in due for picture in pictures)
        return [
            np.concatenate([seen[picture.digest] for picture in pictures])[own] if pictures else None
            for pictures, own in due
        ]

    def _due(self, task: Task, count: int) -> tuple[tuple[Picture, ...], slice]:
        """The pictures that some of the next tokens stand for, and which of all tokens of these they are."""
        start, size = len(task.row.held), self._image_tokens
        parts = task.signs[:start], task.signs[start : start + count]
        before, own = (sum(isinstance(sign, bytes) for sign in signs) for signs in parts)
        first = before // size
        pictures = task.answer.request.images[first : -(-(before + own) // size)] if own else ()
        return pictures, slice(before - first * size, before - first * size + own)

    def see(self, pictures: Iterable[Picture]) -> dict[bytes, np.ndarray]:
        """Image tokens (image_tokens, D) of pictures by their digests."""
        wanted = {picture.digest: picture for picture in pictures}
        seen = {digest: self._seen.pop(digest) for digest in wanted if digest in self._seen}
        new = [picture for digest, picture in wanted.items() if digest not in seen]
        while new:
            count = max(count for count in AT_ONCE if count <= len(new))
            found = jax.device_get(self._look(np.stack([picture.pixels for picture in new[:count]])))
            seen |= {picture.digest: tokens for picture, tokens in zip(new[:count], found, strict=True)}
            self.looked, new = self.looked + count, new[count:]
        self._seen |= seen
        size = sum(tokens.nbytes for tokens in self._seen.values())
        while size > MOST_BYTES:
            size -= self._seen.pop(next(iter(self._seen))).nbytes
        return seen


def signs_of(request: Request, vision: Vision | None) -> list[Sign]:
    """Of its prompt (see `Task`)."""
    if not request.images:
        return list(request.prompt)
    digests = (picture.digest for picture in request.images for _ in range(vision.image_tokens))
    return [next(digests) if token == vision.marker_id else token for token in request.prompt]


def check_images(request: Request, vision: Vision | None) -> None:
    """Raises UserError where a prompt and its pictures do not fit the model, or one another."""
    images = request.images
    if vision is None:
        if images:
            raise UserError(f"the prompt shows pictures, and {BLIND}")
        return
    side = vision.tower.image_size
    if wrong := [picture for picture in images if picture.pixels.shape != (side, side, 3)]:
        raise UserError(f"a picture has the shape {wrong[0].pixels.shape}; this model sees {(side, side, 3)}")
    markers, size = request.prompt.count(vision.marker_id), vision.image_tokens
    if markers != len(images) * size:
        raise UserError(
            f"the prompt has {markers} markers of pictures (token {vision.marker_id}) and shows {len(images)} pictures "
            f"of {size} each; leave the marker out of texts"
        )

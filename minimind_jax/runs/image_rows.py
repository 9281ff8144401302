"""What a run's model reads of pictures: their pixels, or what a tower that is frozen said of them once."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from minimind_jax.convert.hf_vision import open_tower
from minimind_jax.convert.load import folders_of
from minimind_jax.data.batches import Batches
from minimind_jax.data.cache_folder import cache_root
from minimind_jax.data.feature_store import Features, FeatureStore
from minimind_jax.data.images import read_image
from minimind_jax.data.pixels import DECODERS, Pixels, check_files, picture_place
from minimind_jax.data.rows import Batch, Pieces
from minimind_jax.data.token_cache import TokenCache
from minimind_jax.model.vision import VISION
from minimind_jax.progress import progress
from minimind_jax.runs.parts import Run, open_rows
from minimind_jax.runs.vision import TOWER

AT_ONCE = 16  # pictures that the tower looks at


def open_pictures(
    run: Run, room: int, features: bool, more: Callable[[TokenCache, Pieces], Batch] = lambda cache, pieces: {}
) -> tuple[Batches, Batches | None]:
    """The run's rows with at most `room` pictures each: their `pixels`, or `features` that a frozen tower makes of them
    before the first step. more: what else the loss reads."""
    tower = run.model.config if run.config.of_pictures else run.model.config.vision.tower
    if not features:
        pixels = Pixels(tower, room)
        rows = open_rows(run, lambda cache, pieces: pixels.annotate(cache, pieces) | more(cache, pieces))
        for batches in filter(None, rows):
            check_files(batches.cache)
        return rows
    folder = run.models.get(TOWER) or folders_of(run.start)[-1]
    described = {"tower": dataclasses.asdict(tower), "computed in": run.model.dtype.name}
    if run.config.of_pictures:
        function, shape, dtype = run.model.pooled, (tower.hidden_size,), np.float32
    else:
        vision, function = run.model.config.vision, run.model.features
        shape, dtype = (tower.grid**2, tower.hidden_size), run.model.dtype
        described |= {"layer": vision.feature_layer, "is normed": vision.projector != "llava"}
    files = sorted(folder.glob("*.safetensors")) or [folder / "pytorch_model.bin"]
    seen = Features(FeatureStore(cache_root(run.config.data), files, described, shape, dtype), room)
    rows = open_rows(run, lambda cache, pieces: seen.annotate(cache, pieces) | more(cache, pieces))
    there = [batches for batches in rows if batches is not None]
    caches = {batches.cache.folder: batches.cache for batches in there}
    seen.look_at(list(caches.values()), functools.partial(_look, function, folder))
    for batches in there:
        batches.pictures = seen.contents[batches.cache.folder]
    return rows


def _look(
    function: Callable[..., jax.Array], folder: Path, cache: TokenCache, numbers: Sequence[int]
) -> Iterator[np.ndarray]:
    """What the tower of a folder says of these pictures of a cache. The next are read while it looks at some."""
    tower = open_tower(folder)
    params, compute = jax.device_put({VISION: {"tower": tower.params()}}), jax.jit(function)

    def read(number: int) -> np.ndarray:
        return read_image(cache.pictures.picture(number), tower.config, picture_place(cache, number))

    with (
        concurrent.futures.ThreadPoolExecutor(DECODERS) as threads,
        progress("looking at pictures", len(numbers), show=jax.process_index() == 0) as advance,
    ):
        under_way: list[jax.Array] = []
        for begin in range(0, len(numbers), AT_ONCE):
            some = numbers[begin : begin + AT_ONCE]
            pixels = np.stack(list(threads.map(read, some)))
            under_way.append(compute(params, np.resize(pixels, (AT_ONCE, *pixels.shape[1:])))[: len(some)])
            if len(under_way) > 1:
                yield np.asarray(under_way.pop(0))
            advance(len(some))
        yield from map(np.asarray, under_way)

"""What a run's model reads of pictures: their pixels, or what a tower that is frozen said of them once."""

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
from minimind_jax.data.feature_store import Features, FeatureStore, hash_of, picture_digests
from minimind_jax.data.pixels import Pixels
from minimind_jax.data.rows import Batch, Pieces
from minimind_jax.data.token_cache import TokenCache
from minimind_jax.model.vision import VISION
from minimind_jax.progress import progress
from minimind_jax.runs.parts import Run, open_rows
from minimind_jax.runs.vision import TOWER
from minimind_jax.sharding import announce

AT_ONCE = 16  # pictures that the tower looks at


def open_pictures(
    run: Run, room: int, features: bool, more: Callable[[TokenCache, Pieces], Batch] = lambda cache, pieces: {}
) -> tuple[Batches, Batches | None]:
    """The run's rows with at most `room` pictures each: their `pixels`, or `features` that a frozen tower makes of them
    before the first step. more: what else the loss reads."""
    tower = run.model.config if run.config.of_pictures else run.model.config.vision.tower
    if not features:
        return _open(run, Pixels(tower, room), more)[0]
    folder = run.models.get(TOWER) or folders_of(run.start)[-1]
    described = {"tower": dataclasses.asdict(tower), "computed in": run.model.dtype.name}
    if run.config.of_pictures:
        function, shape, dtype = run.model.pooled, (tower.hidden_size,), np.float32
    else:
        vision, function = run.model.config.vision, run.model.features
        shape, dtype = (tower.grid**2, tower.hidden_size), run.model.dtype
        described |= {"layer": vision.feature_layer, "is normed": vision.projector != "llava"}
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    seen = Features(FeatureStore(cache_root(run.config.data), files, described, shape, dtype), room)
    rows, digests = _open(run, seen, more)
    seen.look_at(digests, functools.partial(_look, function, folder))
    return rows


def _open(
    run: Run, reader: Pixels | Features, more: Callable[[TokenCache, Pieces], Batch]
) -> tuple[tuple[Batches, Batches | None], list[tuple[TokenCache, list[bytes]]]]:
    """The rows that a reader annotates, which know what is in their pictures; and these digests, of each cache."""
    rows = open_rows(run, lambda cache, pieces: reader.annotate(cache, pieces) | more(cache, pieces))
    found: dict[Path, tuple[TokenCache, list[bytes]]] = {}
    for batches in filter(None, rows):
        if (cache := batches.cache).folder not in found:
            found[cache.folder] = cache, picture_digests(cache, cache_root(run.config.data))
        batches.pictures = hash_of(found[cache.folder][1])
    _tell_shared(*([*_digests(batches, found)] for batches in filter(None, rows)))
    return rows, list(found.values())


def _digests(batches: Batches, found: dict[Path, tuple[TokenCache, list[bytes]]]) -> Iterator[bytes]:
    """Those of the pictures of some rows, out of all in their cache."""
    cache, digests = found[batches.cache.folder]
    for document in batches.epoch(0).documents:
        yield from digests[slice(*cache.pictures.offsets[document : document + 2])]


def _tell_shared(trained: list[bytes], held_out: Sequence[bytes] = ()) -> None:
    if again := sum(map(set(trained).__contains__, held_out)):
        announce(
            f"warning: {again:,} of {len(held_out):,} pictures that are held out are among those that are trained on; "
            "what is measured on them says little about new pictures (data.val names others)"
        )


def _look(
    function: Callable[..., jax.Array], folder: Path, cache: TokenCache, numbers: Sequence[int]
) -> Iterator[np.ndarray]:
    """What the tower of a folder says of these pictures of a cache. The next are read while it looks at some."""
    tower = open_tower(folder)
    params, compute = jax.device_put({VISION: {"tower": tower.params()}}), jax.jit(function)
    reader = Pixels(tower.config, AT_ONCE)
    with progress("looking at pictures", len(numbers), show=jax.process_index() == 0) as advance:
        under_way: list[jax.Array] = []
        for begin in range(0, len(numbers), AT_ONCE):
            some = numbers[begin : begin + AT_ONCE]
            pixels = np.stack(list(reader.read(cache, some)))
            under_way.append(compute(params, np.resize(pixels, (AT_ONCE, *pixels.shape[1:])))[: len(some)])
            if len(under_way) > 1:
                yield np.asarray(under_way.pop(0))
            advance(len(some))
        yield from map(np.asarray, under_way)

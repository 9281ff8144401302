"""A stage's data, opened: the caches of its files, and which documents are held out."""

import functools

import jax
import numpy as np

from minimind_jax.agreement import check_agreement, on_all
from minimind_jax.config.stages import RunConfig
from minimind_jax.data.batches import Batches
from minimind_jax.data.epoch import Annotate
from minimind_jax.data.kinds import KINDS, KindName
from minimind_jax.data.labels import Classes
from minimind_jax.data.token_cache import TokenCache, build_cache
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.seeds import named_seed


def open_data(
    kind: KindName,
    config: RunConfig,
    tokenizer: Tokenizer,
    process_index: int = 0,
    process_count: int = 1,
    *,
    classes: Classes | None = None,
    annotate: Annotate | None = None,
) -> tuple[Batches, Batches | None]:
    """A stage's training and validation batches; the latter None without `data.val` and `data.val_fraction`.

    Builds the caches if there are none yet; the first process speaks of it. Raises UserError for what is wrong with the
    data, and where the data of the processes differ.
    """
    data, seed = config.data, config.seed
    fraction = config.figures.val_fraction if data.val_fraction is None else data.val_fraction
    fraction = 0.0 if data.val else fraction
    redraws = KINDS[kind].rendered and data.redraw_each_epoch

    def build(files: tuple[str, ...], epoch: int = 0, quiet: bool = False) -> TokenCache:
        speaks = jax.process_index() == 0 and not quiet
        return build_cache(kind, files, tokenizer, data, seed, epoch, speaks, report_skipped=speaks, classes=classes)

    def make(cache: TokenCache, role: str, side: int | None = None, **more) -> Batches:
        """side: of `split_documents`; None for all documents."""
        select = None if side is None else lambda cache: split_documents(cache, fraction, seed)[side]
        token_bytes, processes = tokenizer.token_bytes(), (process_index, process_count)
        more |= {"select": select, "annotate": annotate, "role": role}
        return Batches(cache, data, config.rows_per_step, seed, token_bytes, *processes, **more)

    def open_own() -> tuple[Batches, Batches | None]:
        cache = build(data.train)
        train = make(cache, "training data", 0, redraw=functools.partial(build, data.train) if redraws else None)
        if data.val:
            return train, make(build(data.val), "validation data")
        has_held_out = len(split_documents(cache, fraction, seed)[1])
        return train, make(cache, "validation data", 1) if has_held_out else None

    pair = on_all(open_own)
    check_agreement({key: value for batches in pair if batches is not None for key, value in batches.agreed().items()})
    return pair


def split_documents(cache: TokenCache, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) documents; a record's side depends on its number, the fraction and the seed alone.

    At least one document is held out if the fraction is above 0 and there are two.
    """
    draws = _hash01(np.asarray(cache.records), named_seed(seed, "validation"))
    held_out = draws < fraction
    if fraction and len(cache) > 1:
        held_out[np.argmin(draws)] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _hash01(numbers: np.ndarray, seed: int) -> np.ndarray:
    """SplitMix64's finaliser: a float in [0, 1) for each integer."""
    with np.errstate(over="ignore"):
        x = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) / 2.0**64

"""The compiled part of generation, as pure functions: tokens of prompts are read into rows of a cache, a row is copied,
next tokens are chosen, and many are made in all rows that run.

Every row has a length and settings of its own, and all of these are arrays: a program is compiled for its numbers of
rows and of tokens read, and for the size of the cache, and for nothing that a request may say.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from minimind_jax.inference.sampling import MAX_TOP, NO_TOKEN, Counts, Sampled, SamplingValues, sample
from minimind_jax.model.kv_cache import KVCache
from minimind_jax.model.transformer import FIXED_ORDER, LanguageModel, Params, cast_matrices
from minimind_jax.sharding import ROW_AXES, current_mesh, row_shards


class Settings(NamedTuple):
    """What does not change from token to token of some rows."""

    rows_B: jax.Array  # of the cache; beyond its last for a row that only fills up
    values: SamplingValues  # of sampling
    ends_BE: jax.Array  # tokens that end the row, -1 where there are fewer
    adapter_B: jax.Array  # number of the row's adapter, -1 for none


FIXED: dict[Callable, Callable] = {}  # programs, and the same as `compute.deterministic` wants them compiled


def _program(function: Callable, **names: Any) -> Callable:
    """`jax.jit`, with a twin in FIXED."""
    program = jax.jit(function, **names)
    FIXED[program] = jax.jit(function, compiler_options=FIXED_ORDER, **names)
    return program


@functools.partial(jax.jit, static_argnames=("model", "places"))
def lay_out(model: LanguageModel, params: Params, places: tuple[NamedSharding, ...] | None = None) -> Params:
    """Parameters as they are trained, in the order and dtype of generation. places: on a mesh, of each array."""
    if places is not None:
        leaves, tree = jax.tree.flatten(params)
        params = tree.unflatten(map(jax.lax.with_sharding_constraint, leaves, places))
    return model.unstack(cast_matrices(params, model.dtype))


@functools.partial(jax.jit, static_argnames=("model", "rows", "slots"))
def empty(model: LanguageModel, rows: int, slots: int) -> KVCache:
    """A cache that holds nothing."""
    return _cut(model.new_cache(rows, slots))


@functools.partial(_program, static_argnames="model")
def look(model: LanguageModel, params: Params, pixels_NHWC: jax.Array) -> jax.Array:
    """What the tower and the projector make of pictures: image tokens (N, image_tokens, D)."""
    return _whole(model.project(params, model.features(params, pixels_NHWC)))


@functools.partial(_program, static_argnames=("model", "from_start"), donate_argnames=("cache",))
def read(
    model: LanguageModel,
    params: Params,
    cache: KVCache,
    tokens_BP: jax.Array,
    settings: Settings,
    starts_B: jax.Array,
    counts_B: jax.Array,
    lengths_B: jax.Array,
    images_BMD: jax.Array | None = None,
    *,
    from_start: bool = False,
) -> tuple[jax.Array, KVCache]:
    """Logits (B, V) behind the next tokens of some rows, and the cache, which is donated, with these in it.

    counts_B: how many of P they are. starts_B: tokens of each row that are in the cache; from_start: all are 0.
    lengths_B: tokens of the whole prompt, on which rotary positions may depend. images_BMD: image tokens of the markers
    among the next tokens of each row, in order; None where no row shows a picture.
    """
    starts = None if from_start else starts_B
    of_rows = settings.rows_B, settings.adapter_B
    x_BPD = model.embed(params, tokens_BP, images_BMD)
    hidden_BPD, cache = model.read_next(params, x_BPD, starts, cache, lengths_B, *of_rows)
    last_B1D = jnp.take_along_axis(hidden_BPD, jnp.maximum(counts_B - 1, 0)[:, None, None], axis=1)
    return _whole(model.logits(params, last_B1D)[:, 0]), _cut(cache)


@_program
def choose(
    logits_BV: jax.Array, positions_B: jax.Array, settings: Settings, counts: Counts, allowed_BW: jax.Array
) -> Sampled:
    """The next token of each row, which comes to stand at `positions_B`; see `sample`."""
    return _whole(sample(logits_BV, positions_B, settings.values, counts, allowed_BW))


@functools.partial(_program, static_argnames=("model", "most"), donate_argnames=("cache",))
def make(
    model: LanguageModel,
    params: Params,
    cache: KVCache,
    newest_B: jax.Array,
    lengths_B: jax.Array,
    settings: Settings,
    counts: Counts,
    left_B: jax.Array,
    count: jax.Array,
    enough: jax.Array,
    *,
    most: int,
) -> tuple[Sampled, jax.Array, KVCache]:
    """Makes `count` tokens in each row, or fewer if `enough` rows have ended: the arrays of `Sampled` behind an axis of
    `most` steps, how many of these were made, and the cache, which is donated, with all but the last token.

    newest_B: of each row, which is not in the cache yet. lengths_B: tokens of each row, with it; 0 fills up. left_B:
    tokens that end a row.
    """

    def is_wanted(state):
        made, ended_B, *_ = state
        return (made < count) & (jnp.sum(ended_B & (lengths_B > 0)) < enough)

    def step(state):
        made, ended_B, newest_B, cache, sampled = state
        starts_B = jnp.maximum(lengths_B + made - 1, 0)
        x_B1D = model.embed(params, newest_B[:, None])
        of_rows = settings.rows_B, settings.adapter_B
        hidden_B1D, cache = model.read_next(params, x_B1D, starts_B, cache, None, *of_rows)
        logits_BV = _whole(model.logits(params, hidden_B1D)[:, 0])  # XLA cannot cut the likeliest tokens' search
        new = sample(logits_BV, lengths_B + made, settings.values, counts, since_NB=sampled.token_B)
        ended_B |= jnp.any(new.token_B[:, None] == settings.ends_BE, axis=1) | (made + 1 >= left_B)
        sampled = jax.tree.map(lambda all_NB, new_B: all_NB.at[made].set(new_B), sampled, new)
        return made + 1, ended_B, new.token_B, cache, sampled

    shape, top = (most, len(newest_B)), min(MAX_TOP, model.config.vocab_size)
    zeros_NB, zeros_NBT = jnp.zeros(shape), jnp.zeros((*shape, top))
    unknown_NB = jnp.full(shape, NO_TOKEN, jnp.int32)
    sampled = Sampled(unknown_NB, zeros_NB, zeros_NB, zeros_NBT.astype(jnp.int32), zeros_NBT)
    start = (jnp.int32(0), lengths_B == 0, newest_B, cache, sampled)
    made, _, _, cache, sampled = jax.lax.while_loop(is_wanted, step, start)
    return *_whole((sampled, made)), _cut(cache)


@functools.partial(jax.jit, donate_argnames=("cache",))
def copy_row(cache: KVCache, source: jax.Array, target: jax.Array, count: jax.Array) -> KVCache:
    """The cache, which is donated, with the first `count` tokens of row `source` in row `target`, too."""
    return _cut(cache.copy_row(source, target, count))


@functools.partial(jax.jit, static_argnames=("model", "rows", "slots"))
def enlarge(model: LanguageModel, cache: KVCache, rows: int, slots: int) -> KVCache:
    """The same cache with room for more."""
    return _cut(cache.into(model.new_cache(rows, slots)))


# On a mesh, which `jax.set_mesh` tells --------------------------------------------------------------------------------


def _whole(arrays: Any) -> Any:
    """What the host reads is the same on all devices."""
    if current_mesh() is None:
        return arrays
    return jax.lax.with_sharding_constraint(arrays, PartitionSpec())


def _cut(cache: KVCache) -> KVCache:
    """The cache's rows are cut over data and fsdp, its heads over tensor, where they can be."""
    mesh = current_mesh()
    if mesh is None:
        return cache
    _, rows, heads, *_ = cache.layers[0].v_CBKsH.shape
    cuts = (ROW_AXES if rows % row_shards(mesh) == 0 else None, "tensor" if heads % mesh.shape["tensor"] == 0 else None)
    return jax.lax.with_sharding_constraint(cache, PartitionSpec(None, *cuts))

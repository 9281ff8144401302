"""The compiled part of generation: prefill of the prompts, the loop that makes tokens, growth of its buffers.

Rows begin at slot 0, whatever their lengths. A program is compiled once for each (rows, prompt bucket, slots); how many
tokens are made is an argument, not a shape.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from minimind_jax.inference.sampling import Counts, SamplingValues, sample
from minimind_jax.model.kv_cache import KVCache
from minimind_jax.model.transformer import LanguageModel, Params


class DecodeState(NamedTuple):
    """A batch being generated. Slot s of every array belongs to the token at position s of a row.

    tokens_BS, logprobs_BS: prompt and answer; log-probabilities of the answer's tokens.
    lengths_B: tokens of each row. The newest is not in the cache yet.
    made: tokens that were made of each row that has not ended.
    ended_B: rows that made an end-of-text token, or were ended by the caller.
    counts: the tokens of each row, for its penalties.
    """

    cache: KVCache
    tokens_BS: jax.Array
    logprobs_BS: jax.Array
    lengths_B: jax.Array
    made: jax.Array
    ended_B: jax.Array
    counts: Counts


class Controls(NamedTuple):
    """What does not change while a batch is generated.

    values: sampling settings of each row. eos_E: token ids that end a row.
    """

    values: SamplingValues
    eos_E: jax.Array


@functools.partial(jax.jit, static_argnames=("model", "slots"))
def prefill(
    model: LanguageModel,
    params: Params,
    tokens_BP: jax.Array,
    lengths_B: jax.Array,
    controls: Controls,
    *,
    slots: int,
) -> DecodeState:
    """Reads prompts, padded at their ends, and makes the first token of each row.

    A row of length 0 only fills up the batch: it is ended from the start.
    """
    rows, width = tokens_BP.shape
    cache, lasts_B = model.new_cache(rows, slots), jnp.maximum(lengths_B - 1, 0)
    hidden_BPD, cache = model.read_prompt(params, model.embed(params, tokens_BP), lengths_B, cache)
    last_B1D = jnp.take_along_axis(hidden_BPD, lasts_B[:, None, None], axis=1)
    vocab_size = model.config.vocab_size
    ids_BP = jnp.where(jnp.arange(width) < lengths_B[:, None], tokens_BP, vocab_size)  # padding is not counted
    counts = Counts.none(rows, vocab_size)
    in_prompt_BV = counts.prompt_BV.at[jnp.arange(rows)[:, None], ids_BP].set(True, mode="drop")
    state = DecodeState(
        cache=cache,
        tokens_BS=jnp.pad(tokens_BP.astype(jnp.int32), ((0, 0), (0, slots - width))),
        logprobs_BS=jnp.zeros((rows, slots), jnp.float32),
        lengths_B=lengths_B,
        made=jnp.int32(0),
        ended_B=lengths_B == 0,
        counts=counts._replace(prompt_BV=in_prompt_BV),
    )
    return _append(state, model.logits(params, last_B1D)[:, 0], controls)


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def decode(
    model: LanguageModel, params: Params, state: DecodeState, controls: Controls, until: jax.Array
) -> DecodeState:
    """Makes tokens until `until` of them are made or every row has ended. `state` is donated: use the result."""

    def unfinished(state):
        return (state.made < until) & ~jnp.all(state.ended_B)

    def step(state):
        lasts_B = jnp.maximum(state.lengths_B - 1, 0)
        newest_B1 = jnp.take_along_axis(state.tokens_BS, lasts_B[:, None], axis=1)
        hidden_B1D, cache = model.read_next(params, model.embed(params, newest_B1), lasts_B, state.cache)
        return _append(state._replace(cache=cache), model.logits(params, hidden_B1D)[:, 0], controls)

    return jax.lax.while_loop(unfinished, step, state)


@functools.partial(jax.jit, static_argnames=("model", "slots"))
def grow(model: LanguageModel, state: DecodeState, slots: int) -> DecodeState:
    """The same state with room for more tokens."""
    rows, now = state.tokens_BS.shape
    widths = ((0, 0), (0, slots - now))
    return state._replace(
        cache=state.cache.into(model.new_cache(rows, slots)),
        tokens_BS=jnp.pad(state.tokens_BS, widths),
        logprobs_BS=jnp.pad(state.logprobs_BS, widths),
    )


def _append(state: DecodeState, logits_BV, controls: Controls) -> DecodeState:
    """Chooses the next token of each row. Draws depend on the row's seed and the token's position, on nothing else."""
    chosen = sample(logits_BV, state.lengths_B, controls.values, state.counts)
    is_open_B, slots = ~state.ended_B, state.tokens_BS.shape[1]
    rows_B = jnp.arange(len(is_open_B))
    place = (rows_B, jnp.where(is_open_B, state.lengths_B, slots))  # beyond the end nothing is set
    return state._replace(
        tokens_BS=state.tokens_BS.at[place].set(chosen.token_B, mode="drop"),
        logprobs_BS=state.logprobs_BS.at[place].set(chosen.logprob_B, mode="drop"),
        lengths_B=state.lengths_B + is_open_B,
        made=state.made + 1,
        ended_B=state.ended_B | jnp.isin(chosen.token_B, controls.eos_E),
        counts=state.counts.with_token(chosen.token_B, is_open_B),
    )


# The engine's ---------------------------------------------------------------------------------------------------------


class Settings(NamedTuple):
    """What does not change from token to token of some rows.

    rows_B: of the cache; beyond its last for a row that only fills up. values: sampling settings. ends_BE: tokens that
    end it, -1 where there are fewer.
    """

    rows_B: jax.Array
    values: SamplingValues
    ends_BE: jax.Array


class Chosen(NamedTuple):
    """Tokens, and the model's own log-probabilities of them; (B,) or, of several steps, (N, B)."""

    token: jax.Array
    logprob: jax.Array


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("cache",))
def read(
    model: LanguageModel,
    params: Params,
    cache: KVCache,
    tokens_BP: jax.Array,
    rows_B: jax.Array,
    starts_B: jax.Array,
    counts_B: jax.Array,
    lengths_B: jax.Array,
) -> tuple[jax.Array, KVCache]:
    """Logits (B, V) behind the next tokens of some rows, and the cache with these in it.

    counts_B: how many of P they are. starts_B: tokens of each row that are in the cache. lengths_B: tokens of the whole
    prompt, on which rotary positions may depend.
    """
    hidden_BPD, cache = model.read_next(params, model.embed(params, tokens_BP), starts_B, cache, lengths_B, rows_B)
    last_B1D = jnp.take_along_axis(hidden_BPD, jnp.maximum(counts_B - 1, 0)[:, None, None], axis=1)
    return model.logits(params, last_B1D)[:, 0], cache


@jax.jit
def choose(logits_BV: jax.Array, lengths_B: jax.Array, settings: Settings) -> Chosen:
    """The next token of each row. Draws depend on the row's seed and the token's position, on nothing else."""
    chosen = sample(logits_BV, lengths_B, settings.values)
    return Chosen(chosen.token_B, chosen.logprob_B)


@functools.partial(jax.jit, static_argnames=("model", "most"), donate_argnames=("cache",))
def make(
    model: LanguageModel,
    params: Params,
    cache: KVCache,
    newest_B: jax.Array,
    lengths_B: jax.Array,
    settings: Settings,
    count: jax.Array,
    *,
    most: int,
) -> tuple[Chosen, jax.Array, KVCache]:
    """Makes `count` tokens (N = `most` at most) in each row, or fewer if all have ended: the tokens, how many there
    are, and the cache with all but the last of them.

    newest_B: of each row, which is not in the cache yet. lengths_B: tokens of each row, with it; 0 fills up.
    """

    def is_wanted(state):
        made, ended_B, *_ = state
        return (made < count) & ~jnp.all(ended_B)

    def step(state):
        made, ended_B, newest_B, cache, chosen = state
        starts_B = jnp.maximum(lengths_B + made - 1, 0)
        x_B1D = model.embed(params, newest_B[:, None])
        hidden_B1D, cache = model.read_next(params, x_B1D, starts_B, cache, rows_B=settings.rows_B)
        new = choose(model.logits(params, hidden_B1D)[:, 0], lengths_B + made, settings)
        ended_B |= jnp.any(new.token[:, None] == settings.ends_BE, axis=1)
        chosen = jax.tree.map(lambda all_NB, new_B: all_NB.at[made].set(new_B), chosen, new)
        return made + 1, ended_B, new.token, cache, chosen

    rows = len(newest_B)
    chosen = Chosen(jnp.zeros((most, rows), jnp.int32), jnp.zeros((most, rows), jnp.float32))
    start = (jnp.int32(0), lengths_B == 0, newest_B, cache, chosen)
    made, _, _, cache, chosen = jax.lax.while_loop(is_wanted, step, start)
    return chosen, made, cache


@functools.partial(jax.jit, donate_argnames=("cache",))
def copy_row(cache: KVCache, source: jax.Array, target: jax.Array, count: jax.Array) -> KVCache:
    """The cache with the first `count` tokens of row `source` in row `target`, too."""
    return cache.copy_row(source, target, count)


@functools.partial(jax.jit, static_argnames=("model", "rows", "slots"))
def enlarge(model: LanguageModel, cache: KVCache, rows: int, slots: int) -> KVCache:
    """The same cache with room for more."""
    return cache.into(model.new_cache(rows, slots))

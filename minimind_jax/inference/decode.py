"""The compiled part of generation: prefill of the prompts, the loop that makes tokens, growth of its buffers.

Prompts are padded on the left to a common bucket, so that all rows write the same slot at each step. A program is
compiled once for each (rows, prompt bucket, slots); how many tokens are made is an argument, not a shape.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from minimind_jax.inference.sampling import SamplingValues, sample
from minimind_jax.model.kv_cache import KVCache
from minimind_jax.model.transformer import LanguageModel, Params


class DecodeState(NamedTuple):
    """A batch being generated. Slot s of every array belongs to the same token of a row.

    tokens_BS, logprobs_BS: prompt (left-padded) and answer; log-probabilities of the answer's tokens.
    filled: slots of tokens_BS in use, the same for all rows. The newest token is not in the cache yet.
    lengths_B: tokens of each row without padding.
    ended_B: rows that made an end-of-text token, or were ended by the caller.
    seen_BV: tokens each row holds; None without a repetition penalty.
    """

    cache: KVCache
    tokens_BS: jax.Array
    logprobs_BS: jax.Array
    filled: jax.Array
    lengths_B: jax.Array
    ended_B: jax.Array
    seen_BV: jax.Array | None


class Controls(NamedTuple):
    """What does not change while a batch is generated.

    values: sampling settings of each row. keys_B: random key of each row. eos_E: token ids that end a row.
    """

    values: SamplingValues
    keys_B: jax.Array
    eos_E: jax.Array


@functools.partial(jax.jit, static_argnames=("model", "slots", "cache_dtype"))
def prefill(
    model: LanguageModel,
    params: Params,
    tokens_BP: jax.Array,
    lengths_B: jax.Array,
    controls: Controls,
    *,
    slots: int,
    cache_dtype: str,
) -> DecodeState:
    """Reads left-padded prompts and makes the first token of each row; logits are computed at the last slot only.

    A row of length 0 only fills up the batch: it is ended from the start.
    """
    rows, width = tokens_BP.shape
    slot_P = jnp.arange(width)
    positions_BP = jnp.maximum(slot_P - (width - lengths_B)[:, None], -1)
    cache = KVCache.create(model.config, rows, slots, jnp.dtype(cache_dtype))
    output = model.hidden(params, tokens_BP, positions_BP, cache=cache, write_index=0)
    seen_BV = None
    if controls.values.repetition_penalty_B is not None:
        ids_BP = jnp.where(positions_BP >= 0, tokens_BP, model.config.vocab_size)  # padding is not "seen"
        seen_BV = jnp.zeros((rows, model.config.vocab_size), bool)
        seen_BV = seen_BV.at[jnp.arange(rows)[:, None], ids_BP].set(True, mode="drop")
    state = DecodeState(
        cache=output.cache,
        tokens_BS=jnp.pad(tokens_BP.astype(jnp.int32), ((0, 0), (0, slots - width))),
        logprobs_BS=jnp.zeros((rows, slots), jnp.float32),
        filled=jnp.int32(width),
        lengths_B=lengths_B,
        ended_B=lengths_B == 0,
        seen_BV=seen_BV,
    )
    return _append(state, model.logits(params, output.hidden_BTD[:, -1:])[:, 0], controls)


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def decode(
    model: LanguageModel, params: Params, state: DecodeState, controls: Controls, until: jax.Array
) -> DecodeState:
    """Makes tokens until `until` slots are filled or every row has ended. `state` is donated: use the result."""

    def unfinished(state):
        return (state.filled < until) & ~jnp.all(state.ended_B)

    def step(state):
        write_index = state.filled - 1
        newest_B1 = jax.lax.dynamic_slice_in_dim(state.tokens_BS, write_index, 1, axis=1)
        positions_B1 = jnp.where(state.ended_B, -1, state.lengths_B - 1)[:, None]
        output = model.hidden(params, newest_B1, positions_B1, cache=state.cache, write_index=write_index)
        return _append(state._replace(cache=output.cache), model.logits(params, output.hidden_BTD)[:, 0], controls)

    return jax.lax.while_loop(unfinished, step, state)


@functools.partial(jax.jit, static_argnames=("slots",))
def grow(state: DecodeState, slots: int) -> DecodeState:
    """The same state with room for more tokens."""
    more = slots - state.tokens_BS.shape[1]
    return state._replace(
        cache=state.cache.grow(slots),
        tokens_BS=jnp.pad(state.tokens_BS, ((0, 0), (0, more))),
        logprobs_BS=jnp.pad(state.logprobs_BS, ((0, 0), (0, more))),
    )


def _append(state: DecodeState, logits_BV, controls: Controls) -> DecodeState:
    """Chooses the next token of each row. Draws depend on the row's key and the token's position, on nothing else."""
    keys_B = jax.vmap(jax.random.fold_in)(controls.keys_B, state.lengths_B)
    token_B, logprob_B = sample(logits_BV, keys_B, controls.values, state.seen_BV)
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=state.filled, axis=1)
    seen_BV = state.seen_BV
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(token_B.shape[0]), token_B].set(True)
    return state._replace(
        tokens_BS=write(state.tokens_BS, token_B[:, None]),
        logprobs_BS=write(state.logprobs_BS, logprob_B[:, None]),
        filled=state.filled + 1,
        lengths_B=state.lengths_B + ~state.ended_B,
        ended_B=state.ended_B | jnp.isin(token_B, controls.eos_E),
        seen_BV=seen_BV,
    )

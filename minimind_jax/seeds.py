"""One seed a run; every random draw folds in a name and, where it repeats, a step."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import jax


def named_key(seed: int, name: str, step: int | jax.Array | None = None) -> jax.Array:
    """A JAX key for the draw called `name` (at `step`, if it repeats): the same on every machine and process."""
    import jax  # here, so that the processes that tokenise do without it

    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    key = jax.random.key(low)  # of a larger seed JAX would take these bits alone, without a word
    key = jax.random.fold_in(key, high) if high else key
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return key if step is None else jax.random.fold_in(key, step)


def seed_words(seed: int) -> np.ndarray:
    """The 64 bits of a seed as two words, uint32 (2,), the low one first: what `named_keys` takes as data."""
    return np.array([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], np.uint32)


def named_keys(seed_B2: jax.Array, name: str) -> jax.Array:
    """`named_key(seed, name)` of many seeds, given as `seed_words`, in one call that may be compiled; (B,)."""
    import jax

    def key(words):
        low, high = words
        key = jax.random.key(low)
        key = jax.lax.select(high > 0, jax.random.fold_in(key, high), key)
        return jax.random.fold_in(key, zlib.crc32(name.encode()))

    return jax.vmap(key)(seed_B2)


def named_seed(seed: int, *names: str | int) -> int:
    """A 63-bit integer seed for NumPy or grain, a pure function of the seed and the names."""
    text = "/".join(str(part) for part in (seed, *names)).encode()
    return (zlib.crc32(text) << 31) ^ zlib.crc32(text[::-1])

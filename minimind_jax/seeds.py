"""One seed a run; every random draw folds in a name and, where it repeats, a step."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

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


def named_seed(seed: int, *names: str | int) -> int:
    """A 63-bit integer seed for NumPy or grain, a pure function of the seed and the names."""
    text = "/".join(str(part) for part in (seed, *names)).encode()
    return (zlib.crc32(text) << 31) ^ zlib.crc32(text[::-1])

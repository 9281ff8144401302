"""One seed a run: every bit of it counts."""

import itertools
import zlib

import jax
import numpy as np

from minimind_jax.seeds import named_key, named_keys, named_seed, seed_words

SEEDS = (0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 1234567890123456789, 1234567890123456768, 2**63 - 1, -1, -(2**63))


def test_seeds_that_differ_in_any_bit_draw_differently():
    keys = [tuple(np.asarray(jax.random.key_data(named_key(seed, "init"))).tolist()) for seed in SEEDS]
    for (one, first), (other, second) in itertools.combinations(zip(SEEDS, keys, strict=True), 2):
        assert first != second, (one, other)
    assert len({named_seed(seed, "rows") for seed in SEEDS}) == len(SEEDS)


def test_a_small_seed_draws_as_ever():
    plain = jax.random.fold_in(jax.random.key(42), zlib.crc32(b"init"))
    assert (jax.random.key_data(named_key(42, "init")) == jax.random.key_data(plain)).all()


def test_keys_of_many_seeds_in_one_call_are_the_same():
    keys = jax.jit(named_keys, static_argnames="name")(np.stack(list(map(seed_words, SEEDS))), "sampling")
    expected = [jax.random.key_data(named_key(seed, "sampling")) for seed in SEEDS]
    np.testing.assert_array_equal(jax.random.key_data(keys), np.stack(expected))

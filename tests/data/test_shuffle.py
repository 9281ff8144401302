"""The order of rows is grain's own, which runs that were started before go on with."""

import numpy as np
import pytest
from grain.experimental import index_shuffle

from minimind_jax.data.shuffle import shuffled


@pytest.mark.parametrize("count", [1, 2, 3, 5, 100, 257, 999])
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 123456789])
def test_all_rows_at_once_are_shuffled_as_grain_shuffles_each(count, seed):
    order = shuffled(count, seed)
    places = range(count) if count < 100 else [0, 1, count // 2, count - 1]
    assert [int(order[p]) for p in places] == [index_shuffle(p, count - 1, seed, 4) for p in places]
    assert sorted(order) == list(range(count))


@pytest.mark.parametrize("count", [2**16, 2**16 + 1, 2**16 + 2, 100_003, 2**18, 300_000, 1_200_000])
def test_many_rows(count):
    order = shuffled(count, 7)
    places = [*np.random.default_rng(0).integers(0, count, 300).tolist(), 0, count - 1]
    assert [int(order[p]) for p in places] == [index_shuffle(p, count - 1, 7, 4) for p in places]

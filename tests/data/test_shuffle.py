"""The order of rows, which runs that were started before go on with."""

import numpy as np
import pytest

from minimind_jax.data.epoch import Epoch
from minimind_jax.data.packing import plan_pad


@pytest.mark.parametrize("count", [1, 2, 3, 257, 1000])
@pytest.mark.parametrize("seed", [0, 2**31, 2**32 - 1, None])
def test_every_row_stands_once_in_an_epoch(count, seed):
    order = order_of(count, seed)
    assert sorted(order) == list(range(count))
    assert seed is not None or order == list(range(count))


@pytest.mark.parametrize("count", [65_536, 65_537, 65_538])
def test_every_row_stands_once_where_the_shuffle_of_grain_leaves_one_out(count):
    assert sorted(order_of(count, 3)) == list(range(count))


def test_the_order_of_a_seed_is_that_of_earlier_versions():
    assert order_of(7, 12345) == [0, 4, 5, 1, 3, 6, 2]
    assert order_of(100_003, 7, places=5) == [69573, 40007, 9544, 58333, 3612]


def order_of(count, seed, places=None):
    epoch = Epoch(None, np.arange(count), plan_pad(np.full(count, 4), 8), seed, "pad")
    return [epoch.row_at(place) for place in range(places or count)]

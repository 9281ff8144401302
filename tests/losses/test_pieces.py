"""Pieces of the rows: how many there are, and that a length that does not divide changes nothing."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from minimind_jax.losses import pieces
from minimind_jax.losses.pieces import by_columns
from minimind_jax.sharding import MESH_AXES


def shapes_of_pieces(mesh, rows, columns, words=1000):
    """(rows, columns, words) of every device's logits, and how many such pieces there are."""
    seen = []

    def function(kernels, hidden_BTD):
        seen.append((*hidden_BTD.shape[:2], kernels[0].shape[0]))
        return (hidden_BTD[..., 0],)

    shape = jax.ShapeDtypeStruct
    arguments = (shape((words, 8), "float32"),), shape((rows, columns, 8), "float32")
    sizes = [mesh.get(axis, 1) for axis in MESH_AXES]
    with jax.sharding.use_abstract_mesh(AbstractMesh(tuple(sizes), MESH_AXES, (AxisType.Auto,) * 4)):
        text = str(jax.make_jaxpr(lambda *given: by_columns(function, *given))(*arguments))
    (found,) = seen
    return found, int(text.partition("length=")[2].partition("\n")[0] or 1)


@pytest.mark.parametrize(
    ("mesh", "rows", "columns", "expected"),
    [
        ({}, 8, 1024, ((8, 342, 1000), 3)),  # at most 400 columns
        ({}, 8, 2039, ((8, 340, 1000), 6)),  # prime: 6 x 340 - 1
        ({}, 4000, 3, ((4000, 1, 1000), 3)),  # one column is as little as there is
        ({}, 8, 400, ((8, 400, 1000), 1)),
        ({"data": 16}, 128, 1024, ((8, 342, 1000), 3)),  # the rows of one device count
        ({"data": 2, "fsdp": 4}, 64, 1024, ((8, 342, 1000), 3)),
        ({"fsdp": 2, "tensor": 2, "expert": 2}, 16, 2039, ((8, 255, 1000), 2)),  # the other axes share the columns
    ],
)
def test_pieces_are_as_large_as_the_bound_allows(monkeypatch, mesh, rows, columns, expected):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 4 * 8 * 400 * 1000)
    assert shapes_of_pieces(mesh, rows, columns) == expected


@pytest.mark.parametrize("size", [1, 3, 4, 11])
def test_every_token_has_its_own(monkeypatch, size):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 4 * 2 * 50 * size)
    kernel = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    hidden, ids = np.random.default_rng(1).standard_normal((2, 11, 8)).astype(np.float32), np.arange(22).reshape(2, 11)

    def function(kernels, hidden_BTD, ids_BT):
        return pieces.logits(hidden_BTD, *kernels, "cpu"), ids_BT

    found, same = jax.jit(lambda: by_columns(function, (kernel,), hidden, ids))()
    np.testing.assert_allclose(found, hidden @ kernel.T, rtol=1e-5, atol=1e-5)
    assert np.array_equal(same, ids)

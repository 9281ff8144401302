"""FLOPs of the matrix products that a traced step really does, recomputation and loops included."""

import math

from jax.extend.core import ClosedJaxpr, Jaxpr


def product_flops(jaxpr: Jaxpr) -> int:
    """2 x (multiplications of the matrix products) of one run over all devices; kernels (Pallas, cuDNN) count nothing.

    A loop of unknown length counts as one round, of several branches the dearest.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (left, _right), _ = params["dimension_numbers"]
            contracted = math.prod(equation.invars[0].aval.shape[axis] for axis in left)
            total += 2 * contracted * math.prod(equation.outvars[0].aval.shape)
        elif name == "ragged_dot_general":
            total += _ragged_flops(equation)
        elif name == "pallas_call":
            continue
        elif name == "cond":
            total += max(product_flops(branch.jaxpr) for branch in params["branches"])
        else:
            times = params["length"] if name == "scan" else _shards(params) if name == "shard_map" else 1
            total += times * sum(product_flops(inner) for inner in _inner(params))
    return total


def _ragged_flops(equation) -> int:
    """(rows, in) x (groups, in, out): a row meets one group. (rows, in) x (rows, out): the groups cut the rows."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (left, _), _ = numbers.dot_dimension_numbers
    shape, result = equation.invars[0].aval.shape, math.prod(equation.outvars[0].aval.shape)
    flops = 2 * math.prod(shape[axis] for axis in left) * result
    is_cut = numbers.lhs_ragged_dimensions[0] in left
    return flops // equation.invars[2].aval.shape[-1] if is_cut else flops


def _shards(params) -> int:
    return math.prod(params["mesh"].shape[axis] for axis in params.get("manual_axes", params["mesh"].axis_names))


def _inner(params) -> list[Jaxpr]:
    values = [item for value in params.values() for item in (value if isinstance(value, tuple | list) else [value])]
    return [v.jaxpr if isinstance(v, ClosedJaxpr) else v for v in values if isinstance(v, ClosedJaxpr | Jaxpr)]

"""Every path of attention and of a mixture's experts against the plain formula: error of value and gradient, and time.

    python scripts/bench_paths.py       # the 63.9M model's shapes on a GPU or TPU, small ones on a CPU

Paths are those that the code has, so a new one is measured without being named here. Prints a JSON line for each, with
the reason where it cannot run: the norm of the difference over that of the formula in float32, and milliseconds of the
forward pass and of forward and backward, the median of ten. Ends with 1 where a path is wrong or fails.
"""

import argparse
import statistics
import time
import typing

import bench_common as bench
import jax
import jax.numpy as jnp
import numpy as np

from minimind_jax.errors import UserError, first_line
from minimind_jax.model import attention, moe
from minimind_jax.model.config import ModelConfig

ON_CPU = jax.default_backend() == "cpu"
DTYPE = jnp.float32 if ON_CPU else jnp.bfloat16
ROWS, LENGTH, HEADS, KV_HEADS, WIDTH = (2, 256, 4, 2, 32) if ON_CPU else (8, 2048, 8, 4, 96)
MOST_ERROR = 1e-5 if ON_CPU else 0.02  # bfloat16 has 8 bits: 0.002 to 0.004 an operation
TOKENS, HIDDEN, INNER, EXPERTS = (512, 64, 128, 4) if ON_CPU else (16_384, 768, 2432, 4)


def paths_of(kind: object) -> list[str]:
    return [path for path in typing.get_args(kind) if path != "auto"]


def error(found: object, expected: object) -> float:
    """Norm of the difference over the norm of what is expected, the largest of a tree's arrays, in float64."""

    def of(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    return max(map(of, jax.tree.leaves(found), jax.tree.leaves(expected)))


def milliseconds(function: typing.Callable, *arguments: object) -> float:
    jax.block_until_ready(function(*arguments))
    spent = []
    for _ in range(10):
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        spent.append(time.perf_counter() - started)
    return round(1000 * statistics.median(spent), 3)


def measure(total: typing.Callable, path: str, arguments: tuple, expected: tuple) -> dict:
    """total(path, *arguments): a number and an array. expected: its gradients and that array by the formula."""
    positions = tuple(range(1, len(arguments) + 1))
    gradient = jax.jit(jax.grad(total, argnums=positions, has_aux=True), static_argnums=0)
    grads, value = gradient(path, *arguments)
    return {
        "error of value": error(value, expected[1]),
        "error of gradient": error(grads, expected[0]),
        "forward ms": milliseconds(jax.jit(lambda *given: total(path, *given)[1]), *arguments),
        "forward and backward ms": milliseconds(lambda *given: gradient(path, *given), *arguments),
    }


def by_formula(total: typing.Callable, arguments: tuple) -> tuple:
    positions = tuple(range(1, len(arguments) + 1))
    with jax.default_matmul_precision("highest"):
        exact = jax.tree.map(lambda x: x.astype(jnp.float32), arguments)
        return jax.jit(jax.grad(total, argnums=positions, has_aux=True), static_argnums=0)("reference", *exact)


def report(shown: dict, measured: typing.Callable[[], dict]) -> bool:
    """Prints what was measured, or why it was not; False where a path failed that claims it can run."""
    try:
        found = measured()
    except UserError as refused:
        found = {"cannot": str(refused)}
    except Exception as failure:  # one path's failure must not hide the others
        found = {"failed": first_line(failure)}
    if not all(value < MOST_ERROR for name, value in found.items() if name.startswith("error")):
        found = {"failed": f"its errors are not below {MOST_ERROR}", **found}
    bench.print_result("paths", shown, **found)
    return "failed" not in found


def attention_paths(documents: int) -> bool:
    """documents: of a row, of one length; 1 for rows that say of none."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(ROWS, LENGTH, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (jax.random.normal(key, shape, DTYPE) for key, shape in zip(keys, shapes, strict=False))
    weights = jax.random.normal(keys[3], q.shape)
    ids = jnp.broadcast_to(1 + jnp.arange(LENGTH) * documents // LENGTH, (ROWS, LENGTH)) if documents > 1 else None

    def total(path, *inputs):
        out = attention.attention(*inputs, segment_ids_BT=ids, path=path, platform=jax.default_backend())
        return jnp.sum(out * weights), out

    def measured(path):
        attention.choose_path(path, q.shape, KV_HEADS, q.dtype, jax.default_backend())
        return measure(total, path, (q, k, v), expected)

    expected = by_formula(total, (q, k, v))
    shown = {"of": "attention", "rows": ROWS, "length": LENGTH, "documents": documents, "dtype": str(q.dtype)}
    works = [report({**shown, "path": path}, lambda path=path: measured(path)) for path in paths_of(attention.Path)]
    return all(works)


def expert_paths() -> bool:
    config = ModelConfig(hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=1)
    keys = jax.random.split(jax.random.key(0), 5)
    x_MD, logits_ME = jax.random.normal(keys[0], (TOKENS, HIDDEN), DTYPE), jax.random.normal(keys[1], (TOKENS, EXPERTS))
    shapes = [(EXPERTS, HIDDEN, INNER), (EXPERTS, HIDDEN, INNER), (EXPERTS, INNER, HIDDEN)]
    kernels = tuple(jax.random.normal(key, s, DTYPE) / 16 for key, s in zip(keys[2:], shapes, strict=True))

    def total(path, x_MD, kernels):
        out_MD = moe.apply_experts(x_MD, moe.route(config, logits_ME, jnp.ones(TOKENS)), kernels, path)
        return jnp.sum(jnp.sin(out_MD.astype(jnp.float32))), out_MD

    expected = by_formula(total, (x_MD, kernels))
    shown = {"of": "experts", "tokens": TOKENS, "width": HIDDEN, "experts": EXPERTS, "dtype": str(x_MD.dtype)}
    works = [
        report({**shown, "path": path}, lambda path=path: measure(total, path, (x_MD, kernels), expected))
        for path in paths_of(moe.Path)
    ]
    return all(works)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", nargs="+", type=int, default=[1, 8, 64], help="of a row")
    args = parser.parse_args()
    works = [*map(attention_paths, args.documents), expert_paths()]
    raise SystemExit(not all(works))


if __name__ == "__main__":
    main()

"""Low-rank adapters (LoRA, arXiv 2106.09685) on the projections of the layers.

A projection with an adapter computes x W + scale (dropout(x) A) B, with A (in, r), B (r, out) and scale = alpha / r, or
alpha / sqrt(r) (rsLoRA, arXiv 2312.03732). In the tree of parameters `lora_a`, `lora_b` and `lora_scale` lie beside the
projection's `kernel`; like it they are stacked over the layers.

Layers may have different ranks: a projection's stack has the largest, and what is beyond a layer's own rank is 0 in A
and B, which both gradients keep at 0.

Several adapters beside one another (`stack`) are one adapter whose rank is the sum of theirs: each row of a batch names
its own, and the columns of the others count as 0 for it. So one program serves rows of any adapters and of none, and
pays in every row for the ranks of all.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Params = dict[str, Any]
Path = tuple[str, ...]

# The projections of a layer that can have an adapter, and the block of it that each is in.
PROJECTIONS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "attention"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
}
TRAINED = ("lora_a", "lora_b")
LEAVES = (*TRAINED, "lora_scale")
OWNER = "lora_owner"  # beside them where adapters are stacked: the number of the adapter that each column is of


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a network must know of its adapters: a static argument, while their scales and weights are arrays."""

    ranks: tuple[tuple[str, int], ...]  # (projection, its largest rank over the layers), for those that have an adapter
    dropout: float = 0.0  # of their inputs
    by_row: bool = False  # they are several, of which each row of a batch uses its own (see `stack`)

    def rank(self, projection: str) -> int:
        """0 without an adapter."""
        return dict(self.ranks).get(projection, 0)


# Ranks of one adapter: projection -> its rank in each layer, 0 where it has none.
RankTable = Mapping[str, tuple[int, ...]]


def make_adapter(table: RankTable, dropout: float = 0.0) -> Adapter:
    """The static description of adapters with these ranks."""
    return Adapter(tuple((name, max(ranks)) for name, ranks in table.items() if max(ranks)), dropout)


def scale_of(rank: int, alpha: float, rslora: bool) -> float:
    """alpha / rank, or alpha / sqrt(rank); 0 for rank 0."""
    return alpha / (rank**0.5 if rslora else rank) if rank else 0.0


def init_adapters(key: Array, kernels: Params, table: RankTable, alpha: float, rslora: bool) -> Params:
    """Fresh adapters, which change nothing yet: A uniform in +-1 / sqrt(in), as peft draws it, and B = 0.

    kernels: the parameters of the model, or their shapes. Returns the tree of the adapters alone (see `join`).
    """
    layers: Params = {}
    for number, (name, ranks) in enumerate(table.items()):
        if not max(ranks):
            continue
        block = PROJECTIONS[name]
        L, width, out = kernels["layers"][block][name]["kernel"].shape
        bound, rank = width**-0.5, max(ranks)
        a = jax.random.uniform(jax.random.fold_in(key, number), (L, width, rank), jnp.float32, -bound, bound)
        has_rank = np.arange(rank) < np.array(ranks)[:, None, None]
        layers.setdefault(block, {})[name] = {
            "lora_a": jnp.where(has_rank, a, 0),
            "lora_b": jnp.zeros((L, rank, out), jnp.float32),
            "lora_scale": jnp.array([scale_of(r, alpha, rslora) for r in ranks], jnp.float32),
        }
    return {"layers": layers}


def stack(adapters: Sequence[Params], dtype: Any = np.float32) -> tuple[Adapter, Params]:
    """Several adapters beside one another, and what a model must know of them; number n is the n-th of them.

    adapters: their trees alone, of any ranks and on any projections. dtype: of A and B. Returns the tree to `join` to
    the parameters of their base model.
    """
    layers: Params = {}
    for name, block in PROJECTIONS.items():
        own = {number: tree["layers"].get(block, {}).get(name) for number, tree in enumerate(adapters)}
        columns = [_columns(number, leaves, dtype) for number, leaves in own.items() if leaves]
        if columns:
            joined = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), *columns)
            layers.setdefault(block, {})[name] = {**joined, "lora_b": jnp.swapaxes(joined["lora_b"], 1, 2)}
    ranks = tuple((name, leaves[OWNER].shape[1]) for block in layers.values() for name, leaves in block.items())
    return Adapter(ranks, by_row=True), {"layers": layers}


def _columns(number: int, leaves: Params, dtype: Any) -> Params:
    """One projection's adapter with its rank as the last axis of all, B's too."""
    L, _, rank = leaves["lora_a"].shape
    scale_L1 = jnp.asarray(leaves["lora_scale"], jnp.float32)[:, None]
    return {
        "lora_a": jnp.asarray(leaves["lora_a"], dtype),
        "lora_b": jnp.swapaxes(jnp.asarray(leaves["lora_b"], dtype), 1, 2),
        "lora_scale": jnp.broadcast_to(scale_L1, (L, rank)),
        OWNER: jnp.full((L, rank), number, jnp.int32),
    }


def merge(params: Params) -> Params:
    """The parameters with every adapter added into its kernel: W + scale A B, computed in float32.

    params: arrays of NumPy or JAX, stacked over the layers, of one adapter (ValueError if they are not). Returns a tree
    without adapters.
    """
    _check_stacked(params)

    def merged(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        kept = {name: merged(child) for name, child in node.items() if name not in LEAVES}
        if OWNER in node:
            raise ValueError("these parameters hold several adapters; merge one of them, before they are stacked")
        if "lora_a" in node:
            a, b, scale = (jnp.asarray(node[name], jnp.float32) for name in LEAVES)
            delta = jnp.einsum("lir,lro,l->lio", a, b, scale, precision=jax.lax.Precision.HIGHEST)
            kept["kernel"] = (jnp.asarray(node["kernel"], jnp.float32) + delta).astype(node["kernel"].dtype)
        return kept

    return merged(params)


def without_adapters(params: Params) -> Params:
    """The model as it is with its adapters off: the same arrays, stacked (ValueError if they are not)."""
    _check_stacked(params)
    return split(params, lambda path: path[-1] not in (*LEAVES, OWNER))[0]


def _check_stacked(params: Params) -> None:
    if not isinstance(params.get("layers", {}), dict):  # of a tower alone there are none
        raise ValueError("the layers of these parameters were unstacked for generation; give those they were made of")


# Trees of parameters: nested dicts ------------------------------------------------------------------------------------


def split(tree: Params, keep: Callable[[Path], bool], path: Path = ()) -> tuple[Params, Params]:
    """(leaves whose path `keep` takes, the others), each in the dicts they come from; empty dicts vanish."""
    parts: tuple[Params, Params] = ({}, {})
    for name, child in tree.items():
        here = (*path, name)
        if isinstance(child, dict):
            for part, found in zip(parts, split(child, keep, here), strict=True):
                if found:
                    part[name] = found
        else:
            parts[0 if keep(here) else 1][name] = child
    return parts


def join(*trees: Params) -> Params:
    """One tree of trees that have no leaf in common; what `split` took apart."""
    return functools.reduce(_join, trees, {})


def _join(first: Params, second: Params) -> Params:
    joined = dict(first)
    for name, child in second.items():
        if name in joined and not (isinstance(child, dict) and isinstance(joined[name], dict)):
            raise ValueError(f"{name} is in both trees")
        joined[name] = _join(joined[name], child) if name in joined else child
    return joined

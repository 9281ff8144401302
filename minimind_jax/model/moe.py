"""Mixture of experts as in Qwen3-MoE: a softmax router, the k best experts of each token, no token dropped.

Four ways to apply the experts, equal in value and gradient: `reference` runs every expert on every token; the others
sort the tokens by expert. `ragged` is `jax.lax.ragged_dot`, a kernel of its own on TPUs; on GPUs and CPUs it costs as
much as `reference`. `tiled` is for GPUs: tiles of the sorted rows, all in one product with a copy of their expert's
kernels, or one after another where there are too many; `blocked` is for CPUs, with blocks of two sizes that leave
little over.

On a mesh each device works on its own rows with its own experts (`mixture`): left to the compiler, every device would
gather and sort the rows of all.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from minimind_jax.model.config import ModelConfig, Platform
from minimind_jax.model.loose_experts import LooseKernels, apply_loose, apply_to_one
from minimind_jax.model.tiles import make_tiles
from minimind_jax.sharding import ROW_AXES, RULES, current_mesh

Path = Literal["auto", "reference", "ragged", "tiled", "blocked"]
Kernels = tuple[Array, Array, Array]  # gate_EDF, up_EDF, down_EFD
AnyKernels = Kernels | tuple[LooseKernels, LooseKernels, LooseKernels]

COPIED_BYTES = 2**30  # of kernels, up to which `tiled` copies them for every tile

# The mesh axes over which kernels are cut.
EXPERT, EMBED, MLP = (RULES[axis] for axis in ("experts", "embed", "mlp"))
DATA = tuple(axis for axis in ROW_AXES if axis != EMBED)  # axes of the rows over which they are not


class Routing(NamedTuple):
    """experts_Mk: int32 chosen experts of M tokens, best first. weights_Mk: float32 factors of their outputs.
    loss: load-balancing loss, float32 scalar."""

    experts_Mk: Array
    weights_Mk: Array
    loss: Array


def mixture(
    config: ModelConfig,
    x_MD: Array,
    logits_ME: Array,
    is_token_M: Array | None,
    kernels: AnyKernels,
    path: Path,
    platform: Platform,
) -> tuple[Array, Array]:
    """Routes M tokens by the router's logits and applies their experts: (M, D) in the dtype of x, load-balancing loss.

    On a mesh (`jax.set_mesh`) M is cut over data x fsdp. The devices of an expert axis have the same rows; each applies
    its own experts to those of their tokens that chose them, and the outputs are summed. No token is dropped.
    """
    if is_token_M is None:
        is_token_M = jnp.ones(x_MD.shape[0])
    if current_mesh() is None or isinstance(kernels[0], LooseKernels):
        routing = route(config, logits_ME, is_token_M)
        return apply_experts(x_MD, routing, kernels, choose_path(path, x_MD.shape[0], platform)), routing.loss
    rows, into, out_of = PartitionSpec(ROW_AXES), PartitionSpec(EXPERT, EMBED, MLP), PartitionSpec(EXPERT, MLP, EMBED)
    part = functools.partial(_mixture_part, config, path, platform)
    on_mesh = jax.shard_map(part, in_specs=(rows, rows, rows, (into, into, out_of)), out_specs=(rows, PartitionSpec()))
    return on_mesh(x_MD, logits_ME, is_token_M, kernels)


def _mixture_part(config, path, platform, x_MD, logits_ME, is_token_M, kernels):
    """`mixture` on one device of a mesh: its rows, its part of the kernels, gathered over fsdp."""
    routing = route(config, logits_ME, is_token_M, ROW_AXES)
    gate_EDF, up_EDF = (jax.lax.all_gather(kernel, EMBED, axis=1, tiled=True) for kernel in kernels[:2])
    down_EFD = jax.lax.all_gather(kernels[2], EMBED, axis=2, tiled=True)
    # Marked as different on all devices, each gradient is summed over the axes on which the value was the same.
    vary = functools.partial(jax.lax.pcast, to="varying")
    kernels = tuple(vary(kernel, DATA) for kernel in (gate_EDF, up_EDF, down_EFD))
    x_MD, experts_Mk, weights_Mk = (vary(array, (EXPERT, MLP)) for array in (x_MD, *routing[:2]))
    own_Mk = experts_Mk - jax.lax.axis_index(EXPERT) * gate_EDF.shape[0]
    is_part = gate_EDF.shape[0] < config.num_experts
    path = choose_path(path, x_MD.shape[0], platform)
    out_MD = apply_experts(x_MD, Routing(own_Mk, weights_Mk, routing.loss), kernels, path, is_part=is_part)
    return jax.lax.psum(out_MD, (EXPERT, MLP)), routing.loss


def route(config: ModelConfig, logits_ME: Array, is_token_M: Array, axes: tuple[str, ...] = ()) -> Routing:
    """Chooses experts from the router's logits.

    Weights are the chosen probabilities, divided by their sum when norm_topk_prob. With one expert a token that is
    always 1, so by default p / stop_gradient(p) stands in for it: 1 in value, with p's gradient.
    Loss: coef * E * sum_e(load_e * mean_probability_e) over the tokens (is_token_M is 1) of all devices along `axes`,
    load_e being the share of tokens that chose e, summed over the k choices (Switch, arXiv 2101.03961, eq. 4).
    """
    probs_ME = jax.nn.softmax(logits_ME.astype(jnp.float32), axis=-1)
    weights_Mk, experts_Mk = jax.lax.top_k(probs_ME, config.num_experts_per_tok)
    if config.norm_topk_prob and config.num_experts_per_tok > 1:
        weights_Mk = weights_Mk / jnp.sum(weights_Mk, axis=-1, keepdims=True)
    elif config.norm_topk_prob and config.router_gradient == "straight_through":
        weights_Mk = weights_Mk / jax.lax.stop_gradient(weights_Mk)
    elif config.norm_topk_prob:
        weights_Mk = jnp.ones_like(weights_Mk)
    return Routing(experts_Mk, weights_Mk, _balance_loss(config, probs_ME, experts_Mk, is_token_M, axes))


def _balance_loss(config: ModelConfig, probs_ME, experts_Mk, is_token_M, axes):
    chosen_ME = jnp.sum(jax.nn.one_hot(experts_Mk, config.num_experts, dtype=jnp.float32), axis=1)
    over_tokens = functools.partial(jnp.matmul, is_token_M, precision=jax.lax.Precision.HIGHEST)
    sums = (jnp.sum(is_token_M), over_tokens(chosen_ME), over_tokens(probs_ME))
    tokens, load_E, probability_E = jax.lax.psum(sums, axes) if axes else sums
    tokens = jnp.maximum(tokens, 1)
    return config.router_aux_loss_coef * config.num_experts * jnp.sum((load_E / tokens) * (probability_E / tokens))


def choose_path(path: Path, tokens: int, platform: Platform) -> Path:
    """The path that `auto` stands for. Few tokens are bound by reading the weights, which `reference` does once."""
    if path != "auto":
        return path
    if tokens < 64:
        return "reference"
    return {"cpu": "blocked", "tpu": "ragged"}.get(platform, "tiled")


def apply_experts(x_MD: Array, routing: Routing, kernels: AnyKernels, path: Path, is_part: bool = False) -> Array:
    """sum_j weights_Mj * down_e(silu(gate_e(x)) * up_e(x)), e = experts_Mj, in the dtype of x; (M, D).

    path: one that `choose_path` gave; LooseKernels have their own. is_part: experts_Mk may name experts that are none
    of the E in `kernels` (those of other devices); they add nothing.
    """
    is_loose = isinstance(kernels[0], LooseKernels)
    if path == "reference" and not is_loose:
        return _reference(x_MD, routing, *kernels)
    if is_loose and len(x_MD) == 1 and not is_part:
        return apply_to_one(x_MD, routing.experts_Mk[0], routing.weights_Mk[0], *kernels)
    (M, k), E = routing.experts_Mk.shape, len(kernels[0])
    is_own_Mk = (routing.experts_Mk >= 0) & (routing.experts_Mk < E)
    experts_P = jnp.where(is_own_Mk, routing.experts_Mk, E).reshape(-1)  # others' rows go behind the own
    order_P = jnp.argsort(experts_P, stable=True)
    place_P = jnp.argsort(order_P, stable=True)  # where each (token, choice) went
    sizes_E = jnp.sum(experts_P[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)
    sorted_PD = _permute(jnp.repeat(x_MD, k, axis=0), order_P, place_P)
    if is_loose:
        apply = apply_loose
    else:
        copies = len(sorted_PD) // _tile_size(len(sorted_PD), E) + E  # of the three kernels, one for every tile
        is_loop = is_part or copies * 3 * kernels[0][0].size * x_MD.dtype.itemsize > COPIED_BYTES
        tiled = functools.partial(_looped, is_part) if is_loop else _tiled
        apply = {"ragged": _ragged, "tiled": tiled, "blocked": _blocked}[path]
    out_PD = apply(sorted_PD, sizes_E, *kernels)
    out_MkD = _permute(out_PD, place_P, order_P).reshape(M, k, -1)
    weights_Mk = jnp.where(is_own_Mk, routing.weights_Mk, 0)
    return jnp.einsum("Mk,MkD->MD", weights_Mk.astype(x_MD.dtype), out_MkD)


def _reference(x_MD, routing, gate_EDF, up_EDF, down_EFD):
    hidden_EMF = jax.nn.silu(jnp.einsum("MD,EDF->EMF", x_MD, gate_EDF)) * jnp.einsum("MD,EDF->EMF", x_MD, up_EDF)
    out_EMD = jnp.einsum("EMF,EFD->EMD", hidden_EMF, down_EFD)
    weights_ME = jnp.einsum("Mk,MkE->ME", routing.weights_Mk, jax.nn.one_hot(routing.experts_Mk, gate_EDF.shape[0]))
    return jnp.einsum("ME,EMD->MD", weights_ME.astype(x_MD.dtype), out_EMD)


def _ragged(x_PD, sizes_E, gate_EDF, up_EDF, down_EFD):
    # What ragged_dot makes of rows behind the last group is not specified, in neither direction.
    is_own_P1 = jnp.arange(x_PD.shape[0])[:, None] < jnp.sum(sizes_E)
    x_PD = jnp.where(is_own_P1, x_PD, 0)
    hidden_PF = jax.nn.silu(jax.lax.ragged_dot(x_PD, gate_EDF, sizes_E)) * jax.lax.ragged_dot(x_PD, up_EDF, sizes_E)
    return jnp.where(is_own_P1, jax.lax.ragged_dot(hidden_PF, down_EFD, sizes_E), 0)


@jax.custom_vjp
def _permute(x_PD, order_P, inverse_P):
    """x[order], whose gradient is a gather by the inverse permutation, not the slow scatter of a general index."""
    return x_PD[order_P]


_permute.defvjp(
    lambda x_PD, order_P, inverse_P: (x_PD[order_P], inverse_P),
    lambda inverse_P, grad_PD: (grad_PD[inverse_P], None, None),
)


def _expert(x_PD, gate_DF, up_DF, down_FD):
    """gates, ups and the output of one expert, or of one a tile where all have a leading axis."""
    gates_PF, ups_PF = x_PD @ gate_DF, x_PD @ up_DF
    return gates_PF, ups_PF, (jax.nn.silu(gates_PF) * ups_PF) @ down_FD


def _expert_gradients(x_PD, gates_PF, ups_PF, grad_PD, gate_DF, up_DF, down_FD):
    """Of one expert's rows and of its kernels."""
    hidden_PF, swiglu_vjp = jax.vjp(lambda gates, ups: jax.nn.silu(gates) * ups, gates_PF, ups_PF)
    grad_gates, grad_ups = swiglu_vjp(grad_PD @ down_FD.mT)
    grad_x_PD = grad_gates @ gate_DF.mT + grad_ups @ up_DF.mT
    return grad_x_PD, x_PD.mT @ grad_gates, x_PD.mT @ grad_ups, hidden_PF.mT @ grad_PD


def _block_sizes(rows: int, experts: int) -> tuple[int, int]:
    """A large and a small block: an expert's rows are covered by large ones, and the rest by small ones."""
    small = max(1, min(128, rows // (4 * experts)))
    return 4 * small, small


def _for_blocks(start, size, block_sizes, body, carry):
    """carry = body(block size, first row, carry) over blocks that cover the rows start..start+size; the last block
    may reach beyond them."""
    for block in block_sizes:
        count = size // block if block == block_sizes[0] else -(-size // block)
        carry = jax.lax.fori_loop(
            0, count, lambda i, carry, block=block, start=start: body(block, start + i * block, carry), carry
        )
        start, size = start + count * block, size - count * block
    return carry


def _set_rows(array, rows, first):
    return jax.lax.dynamic_update_slice_in_dim(array, rows, first, axis=0)


def _empty(padded_PD, F):
    """Where gates, ups and outputs of all rows go."""
    empty_PF = jnp.zeros_like(padded_PD, shape=(len(padded_PD), F))
    return empty_PF, empty_PF, jnp.zeros_like(padded_PD)


def _write_rows(made, padded_PD, first, size, kernels):
    """`made` with what one expert makes of the rows first..first+size; those behind its own are written over later."""
    rows = _expert(jax.lax.dynamic_slice_in_dim(padded_PD, first, size), *kernels)
    return tuple(_set_rows(array, new, first) for array, new in zip(made, rows, strict=True))


def _rows_gradients(arrays, first, size, stop, kernels):
    """`_expert_gradients` of the rows first..first+size of the arrays x, gates, ups and gradient, of which those from
    `stop` on are another expert's."""
    x, gates, ups, grad = (jax.lax.dynamic_slice_in_dim(array, first, size) for array in arrays)
    is_own = (first + jnp.arange(size) < stop)[:, None]
    return _expert_gradients(x, gates, ups, jnp.where(is_own, grad, 0), *kernels)


@jax.custom_vjp
def _blocked(x_PD, sizes_E, gate_EDF, up_EDF, down_EFD):
    """The experts on rows sorted by expert, sizes_E rows each; rows behind these get any finite values.

    Experts are taken in order. An expert's last block runs into the rows of the next one, which overwrites what was
    put there; so nothing needs padding between experts, only one block behind the last row.
    """
    return _blocked_forward(x_PD, sizes_E, gate_EDF, up_EDF, down_EFD)[0]


def _blocked_forward(x_PD, sizes_E, *kernels):
    P, (E, _, F) = len(x_PD), kernels[0].shape
    blocks = _block_sizes(P, E)
    padded_PD = jnp.pad(x_PD, ((0, blocks[0]), (0, 0)))

    def expert(made, inputs):
        start, size, *own = inputs

        def body(block, first, made):
            return _write_rows(made, padded_PD, first, block, own)

        return _for_blocks(start, size, blocks, body, made), None

    inputs = (jnp.cumsum(sizes_E) - sizes_E, sizes_E, *kernels)
    (gates_PF, ups_PF, out_PD), _ = jax.lax.scan(expert, _empty(padded_PD, F), inputs)
    return out_PD[:P], (padded_PD, gates_PF, ups_PF, inputs)


def _blocked_backward(saved, grad_PD):
    padded_PD, gates_PF, ups_PF, inputs = saved
    P, dtype = grad_PD.shape[0], grad_PD.dtype
    blocks = _block_sizes(P, len(inputs[0]))
    grad_PD = jnp.pad(grad_PD, ((0, blocks[0]), (0, 0)))
    arrays = (padded_PD, gates_PF, ups_PF, grad_PD)

    def expert(grad_x_PD, inputs):
        start, size, *own = inputs

        def body(block, first, carry):
            grad_x_PD, *totals = carry
            grad_x, *grads = _rows_gradients(arrays, first, block, start + size, own)
            return _set_rows(grad_x_PD, grad_x, first), *map(jnp.add, totals, grads)

        zeros = [jnp.zeros_like(kernel, jnp.float32) for kernel in own]
        grad_x_PD, *grads = _for_blocks(start, size, blocks, body, (grad_x_PD, *zeros))
        return grad_x_PD, [grad.astype(dtype) for grad in grads]

    grad_x_PD, grads = jax.lax.scan(expert, jnp.zeros_like(grad_PD), inputs)
    return grad_x_PD[:P], None, *grads


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _tile_size(rows: int, experts: int) -> int:
    size = max(1, min(2048, rows // (8 * experts)))  # so that an eighth of the work is wasted at most
    return size - (size % 128 if size > 128 else 0)


@jax.custom_vjp
def _tiled(x_PD, sizes_E, gate_EDF, up_EDF, down_EFD):
    """The experts on rows sorted by expert, sizes_E rows each."""
    return _tiled_forward(x_PD, sizes_E, gate_EDF, up_EDF, down_EFD)[0]


def _tiled_forward(x_PD, sizes_E, *kernels):
    tiles = make_tiles(sizes_E, len(x_PD), _tile_size(len(x_PD), len(sizes_E)))
    gates_NSF, ups_NSF, out_NSD = _expert(tiles.cut(x_PD), *(kernel[tiles.experts_N] for kernel in kernels))
    return tiles.join(out_NSD), (x_PD, sizes_E, gates_NSF, ups_NSF, kernels)


def _tiled_backward(saved, grad_PD):
    x_PD, sizes_E, gates_NSF, ups_NSF, kernels = saved
    tiles = make_tiles(sizes_E, len(x_PD), _tile_size(len(x_PD), len(sizes_E)))
    # Behind a barrier, or XLA takes the forward pass's copies and keeps those of all layers.
    kernels, grad_PD = jax.lax.optimization_barrier((kernels, grad_PD))
    copies = (kernel[tiles.experts_N] for kernel in kernels)
    grad_x_NSD, *grads = _expert_gradients(tiles.cut(x_PD), gates_NSF, ups_NSF, tiles.cut(grad_PD), *copies)
    # A product adds the tiles of an expert up in one order, which a scatter on a GPU does not.
    of_expert_NE = jax.nn.one_hot(tiles.experts_N, len(sizes_E), dtype=grad_PD.dtype)
    return tiles.join(grad_x_NSD), None, *(jnp.einsum("NE,N...->E...", of_expert_NE, grad) for grad in grads)


_tiled.defvjp(_tiled_forward, _tiled_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _looped(is_part, x_PD, sizes_E, gate_EDF, up_EDF, down_EFD):
    """`_tiled` with one tile after another; a tile that reaches into the rows of the next is overwritten there.

    is_part: most tiles may not be needed and are left out. Else the loop's length is fixed, so that a GPU need not ask
    the host.
    """
    return _looped_forward(is_part, x_PD, sizes_E, gate_EDF, up_EDF, down_EFD)[0]


def _looped_forward(is_part, x_PD, sizes_E, *kernels):
    P, F = x_PD.shape[0], kernels[0].shape[2]
    tiles = make_tiles(sizes_E, P, _tile_size(P, len(sizes_E)))
    padded_PD = jnp.pad(x_PD, ((0, tiles.size), (0, 0)))

    def body(tile, made):
        own = [kernel[tiles.experts_N[tile]] for kernel in kernels]
        return _write_rows(made, padded_PD, tiles.firsts_N[tile], tiles.size, own)

    gates_PF, ups_PF, out_PD = jax.lax.fori_loop(0, tiles.count(is_part), body, _empty(padded_PD, F))
    return out_PD[:P], (padded_PD, sizes_E, gates_PF, ups_PF, kernels)


def _looped_backward(is_part, saved, grad_PD):
    padded_PD, sizes_E, gates_PF, ups_PF, kernels = saved
    P = grad_PD.shape[0]
    tiles = make_tiles(sizes_E, P, _tile_size(P, len(sizes_E)))
    arrays = (padded_PD, gates_PF, ups_PF, jnp.pad(grad_PD, ((0, tiles.size), (0, 0))))

    def body(tile, carry):
        grad_x_PD, *totals = carry
        first, expert = tiles.firsts_N[tile], tiles.experts_N[tile]
        own = [kernel[expert] for kernel in kernels]
        grad_x, *grads = _rows_gradients(arrays, first, tiles.size, tiles.stops_N[tile], own)
        totals = (total.at[expert].add(grad) for total, grad in zip(totals, grads, strict=True))
        return _set_rows(grad_x_PD, grad_x, first), *totals

    zeros = [jnp.zeros_like(kernel, jnp.float32) for kernel in kernels]
    grad_x_PD, *grads = jax.lax.fori_loop(0, tiles.count(is_part), body, (jnp.zeros_like(padded_PD), *zeros))
    return grad_x_PD[:P], None, *(grad.astype(grad_PD.dtype) for grad in grads)


_looped.defvjp(_looped_forward, _looped_backward)

"""log p(target) from hidden states, computed over pieces of the vocabulary where the logits would not fit.

Logits of 8 x 1,024 tokens over Qwen3's 151,936 words take 4.6 GiB, and their gradient as much again. Here the
logarithmic sum is kept up to date over pieces of the vocabulary (the online softmax of arXiv 1805.02867), and the
backward pass makes each piece's logits again, as FlashAttention does with scores (arXiv 2205.14135). On a mesh each
device takes its own rows and its own part of the vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from minimind_jax.losses.pieces import PIECE_BYTES
from minimind_jax.model.config import Platform
from minimind_jax.sharding import ROW_AXES, RULES, current_mesh

WHOLE_BYTES = 2**30  # logits of a device up to this are made whole and kept for the gradient; else PIECE_BYTES at once

VOCAB, EMBED = RULES["vocab"], RULES["embed"]  # the mesh axes over which the kernel is cut
ROWS, LOGITS = PartitionSpec(ROW_AXES), PartitionSpec(ROW_AXES, None, VOCAB)


class TokenScores(NamedTuple):
    """log_probs_BT: log p(target) = logits[target] - log_sums. log_sums_BT: logsumexp(logits). Both float32."""

    log_probs_BT: Array
    log_sums_BT: Array


def piece_size(tokens: int, vocab: int) -> int:
    """Words whose logits a device makes at once: the whole vocabulary, or a multiple of 128.

    tokens, vocab: those of one micro-batch on one device.
    """
    if 4 * tokens * vocab <= WHOLE_BYTES:
        return vocab
    return min(vocab, 128 * max(1, PIECE_BYTES // (4 * 128 * tokens)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def token_scores(hidden_BTD: Array, kernel_VD: Array, targets_BT: Array, platform: Platform) -> TokenScores:
    """The scores of `targets_BT` under logits = hidden kernel^T, differentiable in hidden and kernel.

    The kernel is taken in the dtype of the hidden states; products add up in float32 and all behind them is float32.
    The gradient of the logits is rounded to that dtype for its two products. On a mesh (`jax.set_mesh`) the rows must
    divide by data x fsdp, as `shard_batch` sees to. platform: of the devices that compute it.
    """
    return _forward(hidden_BTD, kernel_VD, targets_BT, platform)[0]


def _forward(hidden_BTD, kernel_VD, targets_BT, platform):
    if current_mesh() is None:
        scores, logits_BTV = _forward_part(hidden_BTD, kernel_VD, targets_BT, axes=())
    else:
        part = functools.partial(_forward_part, axes=(VOCAB,))
        specs = (ROWS, PartitionSpec(VOCAB), ROWS)
        part = jax.shard_map(part, in_specs=specs, out_specs=(ROWS, LOGITS), check_vma=False)
        scores, logits_BTV = part(hidden_BTD, kernel_VD.astype(hidden_BTD.dtype), targets_BT)
    return scores, (hidden_BTD, kernel_VD, targets_BT, scores.log_sums_BT, logits_BTV)


def _backward(platform, saved, grads: TokenScores):
    hidden_BTD, kernel_VD, targets_BT, log_sums_BT, logits_BTV = saved
    part, part_kernel_VD = functools.partial(_backward_part, platform, axes=()), kernel_VD
    if current_mesh() is not None:
        part = functools.partial(_backward_part, platform, axes=(VOCAB,))
        specs = (ROWS, PartitionSpec(VOCAB), ROWS, ROWS, LOGITS, ROWS)
        part = jax.shard_map(part, in_specs=specs, out_specs=(ROWS, PartitionSpec(VOCAB, EMBED)), check_vma=False)
        part_kernel_VD = kernel_VD.astype(hidden_BTD.dtype)
    to_hidden_BTD, to_kernel_VD = part(hidden_BTD, part_kernel_VD, targets_BT, log_sums_BT, logits_BTV, grads)
    return to_hidden_BTD, to_kernel_VD.astype(kernel_VD.dtype), None


token_scores.defvjp(_forward, _backward)


def _forward_part(hidden_BTD, kernel_VD, targets_BT, axes):
    """Scores, and the logits where they were made whole. axes: the mesh axes of the vocabulary, () without a mesh."""
    targets_BT = targets_BT - jax.lax.axis_index(axes) * kernel_VD.shape[0]
    starts_P, size = _pieces(targets_BT, kernel_VD)
    logits_BTV = None
    if len(starts_P) == 1:
        logits_BTV = _product("BTD,VD->BTV", hidden_BTD, kernel_VD.astype(hidden_BTD.dtype))
        sums = _sums(logits_BTV, targets_BT)
    else:

        def add(sums, start):
            _, _, logits_BTV, targets = _piece(hidden_BTD, kernel_VD, targets_BT, start, size)
            return _merge(sums, _sums(logits_BTV, targets)), None

        zeros_BT = jnp.zeros(targets_BT.shape, jnp.float32)
        sums, _ = jax.lax.scan(add, _Sums(zeros_BT - jnp.inf, zeros_BT, zeros_BT), starts_P)
    if axes:
        largest_BT = jax.lax.pmax(sums.largest_BT, axes)
        total_BT = sums.total_BT * jnp.exp(sums.largest_BT - largest_BT)
        sums = _Sums(largest_BT, *jax.lax.psum((total_BT, sums.chosen_BT), axes))
    log_sums_BT = sums.largest_BT + jnp.log(sums.total_BT)
    return TokenScores(sums.chosen_BT - log_sums_BT, log_sums_BT), logits_BTV


def _backward_part(platform, hidden_BTD, kernel_VD, targets_BT, log_sums_BT, logits_BTV, grads, axes):
    """d logits = d log_probs * onehot(target) + (d log_sums - d log_probs) * softmax; then the two products."""
    targets_BT = targets_BT - jax.lax.axis_index(axes) * kernel_VD.shape[0]
    at_softmax_BT1 = (grads.log_sums_BT - grads.log_probs_BT)[..., None]

    def products(kernel_VD, logits_BTV, targets_BT):
        grad_BTV = at_softmax_BT1 * jnp.exp(logits_BTV - log_sums_BT[..., None])
        grad_BTV = _add_at(grad_BTV, targets_BT, grads.log_probs_BT, platform).astype(hidden_BTD.dtype)
        to_hidden_BTD = _product("BTV,VD->BTD", grad_BTV, kernel_VD.astype(hidden_BTD.dtype))
        return to_hidden_BTD, _product("BTV,BTD->VD", grad_BTV, hidden_BTD)

    starts_P, size = _pieces(targets_BT, kernel_VD)
    if len(starts_P) == 1:
        to_hidden_BTD, to_kernel_VD = products(kernel_VD, logits_BTV, targets_BT)
    else:

        def add(carry, start):
            to_hidden_BTD, to_kernel_VD = carry
            first, *piece = _piece(hidden_BTD, kernel_VD, targets_BT, start, size)
            more_BTD, rows_VD = products(*piece)
            rows_VD += jax.lax.dynamic_slice_in_dim(to_kernel_VD, first, size)
            to_kernel_VD = jax.lax.dynamic_update_slice_in_dim(to_kernel_VD, rows_VD, first, axis=0)
            return (to_hidden_BTD + more_BTD, to_kernel_VD), None

        zeros = (jnp.zeros(hidden_BTD.shape, jnp.float32), jnp.zeros(kernel_VD.shape, jnp.float32))
        (to_hidden_BTD, to_kernel_VD), _ = jax.lax.scan(add, zeros, starts_P)
    if axes:
        to_hidden_BTD = jax.lax.psum(to_hidden_BTD, axes)
        to_kernel_VD = jax.lax.psum_scatter(to_kernel_VD, EMBED, scatter_dimension=1, tiled=True)
        to_kernel_VD = jax.lax.psum(to_kernel_VD, [axis for axis in ROW_AXES if axis != EMBED])
    return to_hidden_BTD.astype(hidden_BTD.dtype), to_kernel_VD


def _pieces(targets_BT, kernel_VD) -> tuple[np.ndarray, int]:
    """The first word of each piece, and the size of all."""
    size = piece_size(targets_BT.size, kernel_VD.shape[0])
    return np.arange(0, kernel_VD.shape[0], size), size


def _piece(hidden_BTD, kernel_VD, targets_BT, start, size):
    """(first, kernel, logits, targets) of the words first..first + size, targets counted from `first`.

    The last piece reaches back into the one before it; words before `start` have logits of -inf and are no targets.
    """
    first = jnp.minimum(start, kernel_VD.shape[0] - size)
    piece_VD = jax.lax.dynamic_slice_in_dim(kernel_VD, first, size)
    logits_BTV = _product("BTD,VD->BTV", hidden_BTD, piece_VD.astype(hidden_BTD.dtype))
    logits_BTV = jnp.where(first + jnp.arange(size) >= start, logits_BTV, -jnp.inf)
    return first, piece_VD, logits_BTV, jnp.where(targets_BT >= start, targets_BT - first, -1)


class _Sums(NamedTuple):
    """Over some words: the largest logit, the sum of exp(logit - largest), and the target's logit, 0 if elsewhere."""

    largest_BT: Array
    total_BT: Array
    chosen_BT: Array


def _sums(logits_BTV, targets_BT) -> _Sums:
    largest_BT = jnp.max(logits_BTV, axis=-1)
    total_BT = jnp.sum(jnp.exp(logits_BTV - largest_BT[..., None]), axis=-1)
    V = logits_BTV.shape[-1]
    chosen_BT1 = jnp.take_along_axis(logits_BTV, jnp.clip(targets_BT, 0, V - 1)[..., None], axis=-1)
    is_here_BT = (targets_BT >= 0) & (targets_BT < V)
    return _Sums(largest_BT, total_BT, jnp.where(is_here_BT, chosen_BT1[..., 0], 0))


def _merge(a: _Sums, b: _Sums) -> _Sums:
    largest_BT = jnp.maximum(a.largest_BT, b.largest_BT)
    total_BT = a.total_BT * jnp.exp(a.largest_BT - largest_BT) + b.total_BT * jnp.exp(b.largest_BT - largest_BT)
    return _Sums(largest_BT, total_BT, a.chosen_BT + b.chosen_BT)


def _add_at(x_BTV, targets_BT, values_BT, platform):
    """Adds values to the entries of the targets. On a CPU by index: XLA would put the sum into both products behind it,
    and compute everything before it twice, once in strides."""
    if platform != "cpu":
        return x_BTV + jnp.where(targets_BT[..., None] == jnp.arange(x_BTV.shape[-1]), values_BT[..., None], 0)
    place_BT = jnp.where(targets_BT < 0, x_BTV.shape[-1], targets_BT)  # beyond the end, where nothing is added
    rows_B1, columns_T = jnp.arange(targets_BT.shape[0])[:, None], jnp.arange(targets_BT.shape[1])
    return x_BTV.at[rows_B1, columns_T, place_BT].add(values_BT, mode="drop")


def _product(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)

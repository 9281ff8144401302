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

from minimind_jax.losses import Batch
from minimind_jax.losses.pieces import PIECE_BYTES
from minimind_jax.model.config import Platform
from minimind_jax.model.transformer import LanguageModel, ModelOutput, Params
from minimind_jax.sharding import ROW_AXES, RULES, current_mesh

WHOLE_BYTES = 2**30  # logits of a device up to this are made whole and kept for the gradient; else PIECE_BYTES at once

NO_LOGIT = -1e30  # of a word that does not count: finite, so that 0 times it is 0

VOCAB, EMBED = RULES["vocab"], RULES["embed"]  # the mesh axes over which the kernel is cut
ROWS, KERNEL, LOGITS = PartitionSpec(ROW_AXES), PartitionSpec(VOCAB), PartitionSpec(ROW_AXES, None, VOCAB)


class TokenScores(NamedTuple):
    """Float32, of the distribution softmax(logits)."""

    log_probs_BT: Array  # log p(target) = logits[target] - log_sums
    log_sums_BT: Array  # logsumexp(logits)
    entropies_BT: Array | None = None  # -sum p log p over the words; None where not asked for


def piece_size(tokens: int, vocab: int) -> int:
    """Words whose logits a device makes at once: the whole vocabulary, or a multiple of 128.

    tokens, vocab: those of one micro-batch on one device.
    """
    if 4 * tokens * vocab <= WHOLE_BYTES:
        return vocab
    return min(vocab, 128 * max(1, PIECE_BYTES // (4 * 128 * tokens)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def token_scores(
    hidden_BTD: Array,
    kernel_VD: Array,
    targets_BT: Array,
    platform: Platform,
    temperature: float = 1.0,
    with_entropies: bool = False,
) -> TokenScores:
    """The scores of `targets_BT` under logits = hidden kernel^T / temperature, differentiable in hidden and kernel.

    The kernel is taken in the dtype of the hidden states; products add up in float32 and all behind them is float32.
    The gradient of the logits is rounded to that dtype for its two products. On a mesh (`jax.set_mesh`) the rows must
    divide by data x fsdp, as `shard_batch` sees to. platform: of the devices that compute it.
    """
    return _forward(hidden_BTD, kernel_VD, targets_BT, platform, temperature, with_entropies)[0]


def _forward(hidden_BTD, kernel_VD, targets_BT, platform, temperature, with_entropies):
    part = functools.partial(_forward_part, temperature, with_entropies)
    part = _on_mesh(part, (ROWS, KERNEL, ROWS), (ROWS, LOGITS))
    scores, logits_BTV = part(hidden_BTD, kernel_VD, targets_BT)
    return scores, (hidden_BTD, kernel_VD, targets_BT, scores, logits_BTV)


def _backward(platform, temperature, _, saved, grads: TokenScores):
    hidden_BTD, kernel_VD, targets_BT, scores, logits_BTV = saved
    part = functools.partial(_backward_part, platform, temperature)
    part = _on_mesh(part, (ROWS, KERNEL, ROWS, ROWS, LOGITS, ROWS), (ROWS, PartitionSpec(VOCAB, EMBED)))
    to_hidden_BTD, to_kernel_VD = part(hidden_BTD, kernel_VD, targets_BT, scores, logits_BTV, grads)
    return to_hidden_BTD, to_kernel_VD.astype(kernel_VD.dtype), None


token_scores.defvjp(_forward, _backward)


def target_scores(
    model: LanguageModel,
    params: Params,
    batch: Batch,
    key: Array | None = None,
    temperature: float = 1.0,
    with_entropies: bool = False,
) -> tuple[TokenScores, ModelOutput]:
    """The scores of the batch's `targets` (B, C), the last C of its T columns, and the model's output. key: of dropout,
    None for none."""
    output, targets_BC = model.read_batch(params, batch, key), batch["targets"]
    hidden_BCD = output.hidden_BTD[:, -targets_BC.shape[1] :]
    with jax.named_scope("head"):
        kernel_VD = model.head_kernel(params)
        return token_scores(hidden_BCD, kernel_VD, targets_BC, model.platform, temperature, with_entropies), output


def _on_mesh(part, in_specs, out_specs):
    """part(axes, hidden, kernel, ...) on each device's rows and words, the kernel being sent in the dtype of the hidden
    states. axes: the mesh axes of the vocabulary, () without a mesh."""
    if current_mesh() is None:
        return functools.partial(part, ())
    part = functools.partial(part, (VOCAB,))
    part = jax.shard_map(part, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return lambda hidden_BTD, kernel_VD, *rest: part(hidden_BTD, kernel_VD.astype(hidden_BTD.dtype), *rest)


def _forward_part(temperature, with_entropies, axes, hidden_BTD, kernel_VD, targets_BT):
    """Scores, and the logits where they were made whole. axes: as of `_on_mesh`."""
    targets_BT = targets_BT - jax.lax.axis_index(axes) * kernel_VD.shape[0]
    starts_P, size = _pieces(targets_BT, kernel_VD)
    logits_BTV = None
    if len(starts_P) == 1:
        logits_BTV = _logits(hidden_BTD, kernel_VD, temperature)
        sums = _sums(logits_BTV, targets_BT, with_entropies)
    else:

        def add(sums, start):
            _, _, logits_BTV, targets = _piece(hidden_BTD, kernel_VD, targets_BT, start, size, temperature)
            return _merge(sums, _sums(logits_BTV, targets, with_entropies)), None

        zeros_BT = jnp.zeros(targets_BT.shape, jnp.float32)
        none_yet = _Sums(zeros_BT + NO_LOGIT, zeros_BT, zeros_BT, zeros_BT if with_entropies else None)
        sums, _ = jax.lax.scan(add, none_yet, starts_P)
    if axes:
        sums = _relative_to(jax.lax.pmax(sums.largest_BT, axes), sums)
        sums = _Sums(sums.largest_BT, *jax.lax.psum(sums[1:], axes))
    log_sums_BT = sums.largest_BT + jnp.log(sums.total_BT)
    entropies_BT = jnp.log(sums.total_BT) - sums.weighted_BT / sums.total_BT if with_entropies else None
    return TokenScores(sums.chosen_BT - log_sums_BT, log_sums_BT, entropies_BT), logits_BTV


def _backward_part(platform, temperature, axes, hidden_BTD, kernel_VD, targets_BT, scores, logits_BTV, grads):
    """With p = softmax(logits), d logits = d log_probs * onehot(target) + (d log_sums - d log_probs) * p
    - d entropies * (log p + entropies) * p; then the two products."""
    targets_BT = targets_BT - jax.lax.axis_index(axes) * kernel_VD.shape[0]
    at_softmax_BT1 = (grads.log_sums_BT - grads.log_probs_BT)[..., None]

    def products(kernel_VD, logits_BTV, targets_BT):
        log_probs_BTV, at_softmax = logits_BTV - scores.log_sums_BT[..., None], at_softmax_BT1
        if grads.entropies_BT is not None:
            surprise_BTV = log_probs_BTV + scores.entropies_BT[..., None]
            at_softmax = at_softmax - grads.entropies_BT[..., None] * surprise_BTV
        grad_BTV = _add_at(at_softmax * jnp.exp(log_probs_BTV), targets_BT, grads.log_probs_BT, platform)
        grad_BTV = _heated(grad_BTV, temperature).astype(hidden_BTD.dtype)
        to_hidden_BTD = _in_float32("BTV,VD->BTD", grad_BTV, kernel_VD.astype(hidden_BTD.dtype))
        return to_hidden_BTD, _in_float32("BTV,BTD->VD", grad_BTV, hidden_BTD)

    starts_P, size = _pieces(targets_BT, kernel_VD)
    if len(starts_P) == 1:
        to_hidden_BTD, to_kernel_VD = products(kernel_VD, logits_BTV, targets_BT)
    else:

        def add(carry, start):
            to_hidden_BTD, to_kernel_VD = carry
            first, *piece = _piece(hidden_BTD, kernel_VD, targets_BT, start, size, temperature)
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


def _piece(hidden_BTD, kernel_VD, targets_BT, start, size, temperature):
    """(first, kernel, logits, targets) of the words first..first + size, targets counted from `first`.

    The last piece reaches back into the one before it; words before `start` have no logits there and are no targets.
    """
    first = jnp.minimum(start, kernel_VD.shape[0] - size)
    piece_VD = jax.lax.dynamic_slice_in_dim(kernel_VD, first, size)
    logits_BTV = _logits(hidden_BTD, piece_VD, temperature)
    logits_BTV = jnp.where(first + jnp.arange(size) >= start, logits_BTV, NO_LOGIT)
    return first, piece_VD, logits_BTV, jnp.where(targets_BT >= start, targets_BT - first, -1)


class _Sums(NamedTuple):
    """Over some words: the largest logit, the sum of exp(logit - largest), the target's logit, 0 if elsewhere, and the
    sum of (logit - largest) exp(logit - largest), None where no entropy is asked for."""

    largest_BT: Array
    total_BT: Array
    chosen_BT: Array
    weighted_BT: Array | None


def _sums(logits_BTV, targets_BT, with_entropies) -> _Sums:
    largest_BT = jnp.max(logits_BTV, axis=-1)
    below_BTV = logits_BTV - largest_BT[..., None]
    total_BT = jnp.sum(jnp.exp(below_BTV), axis=-1)
    weighted_BT = jnp.sum(below_BTV * jnp.exp(below_BTV), axis=-1) if with_entropies else None
    V = logits_BTV.shape[-1]
    chosen_BT1 = jnp.take_along_axis(logits_BTV, jnp.clip(targets_BT, 0, V - 1)[..., None], axis=-1)
    is_here_BT = (targets_BT >= 0) & (targets_BT < V)
    return _Sums(largest_BT, total_BT, jnp.where(is_here_BT, chosen_BT1[..., 0], 0), weighted_BT)


def _merge(a: _Sums, b: _Sums) -> _Sums:
    largest_BT = jnp.maximum(a.largest_BT, b.largest_BT)
    sums = jax.tree.map(jnp.add, _relative_to(largest_BT, a)[1:], _relative_to(largest_BT, b)[1:])
    return _Sums(largest_BT, *sums)


def _relative_to(largest_BT: Array, sums: _Sums) -> _Sums:
    """The same sums with another logit in place of their largest."""
    more_BT = sums.largest_BT - largest_BT
    factor_BT, weighted_BT = jnp.exp(more_BT), sums.weighted_BT
    if weighted_BT is not None:
        weighted_BT = (weighted_BT + more_BT * sums.total_BT) * factor_BT
    return _Sums(largest_BT, sums.total_BT * factor_BT, sums.chosen_BT, weighted_BT)


def _logits(hidden_BTD, kernel_VD, temperature):
    return _heated(_in_float32("BTD,VD->BTV", hidden_BTD, kernel_VD.astype(hidden_BTD.dtype)), temperature)


def _heated(x, temperature):
    return x if temperature == 1 else x / temperature


def _add_at(x_BTV, targets_BT, values_BT, platform):
    """Adds values to the entries of the targets. On a CPU by index: XLA would put the sum into both products behind it,
    and compute everything before it twice, once in strides."""
    if platform != "cpu":
        return x_BTV + jnp.where(targets_BT[..., None] == jnp.arange(x_BTV.shape[-1]), values_BT[..., None], 0)
    place_BT = jnp.where(targets_BT < 0, x_BTV.shape[-1], targets_BT)  # beyond the end, where nothing is added
    rows_B1, columns_T = jnp.arange(targets_BT.shape[0])[:, None], jnp.arange(targets_BT.shape[1])
    return x_BTV.at[rows_B1, columns_T, place_BT].add(values_BT, mode="drop")


def _in_float32(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)

"""Causal attention within documents, grouped-query, softmax in float32: one function, six paths.

`reference` is the plain formula over a full boolean mask. `grouped` is the fast one on a CPU and lean anywhere: the G
query heads that share a key/value head become rows of one matrix product per (batch, key/value head), rows ordered by
time (R = T * G, row t * G + g), so that a block of queries is a contiguous slice; it is multiplied only with the keys
that the causal mask lets it see. The backward pass computes the softmax again from its logarithmic sums instead of
keeping it, as FlashAttention does (arXiv 2205.14135), so that only the scores of one block are ever held. `cudnn`,
`cudnn_packed`, `tokamax` and `splash` are fused operations of GPUs and TPUs, in `fused_attention`.
"""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh

from minimind_jax.errors import UserError
from minimind_jax.model import fused_attention as fused
from minimind_jax.model.config import Platform
from minimind_jax.model.kv_cache import LayerCache
from minimind_jax.sharding import current_mesh

# Values of the forward pass that recomputation policies keep, because making them again is most of attention's work.
# (cuDNN's have no name: with such a policy its forward pass runs twice.)
SAVED_NAMES = ("attention_out", "attention_log_sums", fused.SPLASH_SAVED_NAME)
Path = Literal["auto", "reference", "grouped", "cudnn", "cudnn_packed", "tokamax", "splash"]
# Functions of `fused_attention`, and where they run.
FUSED: dict[Path, Platform] = {"cudnn": "gpu", "cudnn_packed": "gpu", "tokamax": "gpu", "splash": "tpu"}

BLOCK = 256  # most queries whose scores `grouped` holds at once
LONGEST = (4, 16)  # 1 / 4 and 1 / 16 of the rows of a cache, the longest, go alone through blocks that no others see
FEW_KEYS = 256  # scores of so many stay in a TPU's own memory between two products, where splash would only fill up


# Compiled for it and compared with the plain formula through what they are asked, but not computed on a card yet.
UNTRIED = "not cudnn_packed or tokamax, which need no mask of documents but have not run on a GPU yet"


class Choice(NamedTuple):
    """path: the one taken. reason: why not the best one of this platform, or what makes it slow; None for nothing."""

    path: Path
    reason: str | None = None


def choose_path(
    path: Path,
    query_shape: tuple[int, int, int, int],
    kv_heads: int,
    dtype: jnp.dtype,
    platform: Platform,
    mesh: Mesh | AbstractMesh | None = None,
    deterministic: bool = False,
) -> Choice:
    """The path for whole rows, queries being (B, T, N, H); `cached_attention` has none to choose. Raises UserError when
    a fused one is asked for that cannot run there. deterministic: `compute.deterministic`."""
    own = {"gpu": "cudnn", "tpu": "splash"}.get(platform)
    if path == "auto" and own is not None:
        obstacle = _obstacle(own, query_shape, kv_heads, dtype, mesh, deterministic)
        if obstacle is not None:
            return Choice("grouped", f"not {own}: {obstacle}")
        return Choice(own, UNTRIED if own == "cudnn" else None)
    if path in FUSED:
        obstacle = f"this is a {platform}"
        if FUSED[path] == platform:
            obstacle = _obstacle(path, query_shape, kv_heads, dtype, mesh, deterministic)
        if obstacle is not None:
            raise UserError(f"compute.attention {path} cannot run here: {obstacle}; auto takes a path that can")
    if path == "cudnn_packed":
        room = fused.document_room(query_shape[1])
        return Choice(path, f"room for {room} documents a row on average; rows with more also take cudnn's mask")
    return Choice("grouped" if path == "auto" else path)


def choose_full_path(
    path: Path,
    query_shape: tuple[int, int, int, int],
    dtype: jnp.dtype,
    platform: Platform,
    deterministic: bool = False,
) -> Choice:
    """The path of `full_attention` on a device's own queries (N, P, heads, H): a fused one, or `reference`.

    Raises UserError as `choose_path`.
    """
    choice = choose_path(path, query_shape, query_shape[2], dtype, platform, None, deterministic)
    if FUSED.get(choice.path) == "gpu":  # which all are cuDNN's where there are no documents
        obstacle = _obstacle("cudnn", query_shape, query_shape[2], dtype, None, deterministic)
        return Choice("cudnn") if obstacle is None else Choice("reference", f"not cudnn: {obstacle}")
    if choice.path == "grouped":  # which is for tokens that see what is before them
        return choice._replace(path="reference")
    if choice.path == "splash" and path == "auto" and query_shape[1] <= FEW_KEYS:
        return Choice("reference", f"not splash: {query_shape[1]} patches are few")
    return choice


def _obstacle(path: Path, query_shape, kv_heads, dtype, mesh, deterministic) -> str | None:
    """Why a fused path cannot be taken on its platform."""
    if deterministic and path in ("cudnn", "cudnn_packed"):
        return "compute.deterministic is set, and its gradient is summed in the order in which threads come"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16, not {jnp.dtype(dtype).name}"
    tensor = 1 if mesh is None or mesh.empty else mesh.shape["tensor"]
    if kv_heads % tensor:
        return f"{kv_heads} key/value heads do not divide by mesh.tensor {tensor}"
    return None if path == "splash" else getattr(fused, f"{path}_obstacle")(query_shape[-1])


def attention(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, *, segment_ids_BT: Array | None = None, path: Path, platform: Platform
) -> Array:
    """softmax(q k^T / sqrt(H)) v over the keys a query may see, (B, T, N, H).

    Query t sees keys s <= t of its own segment; all of a row is one segment when segment_ids_BT is None. What queries
    in segment 0 (padding) read means nothing: 0, or from fused operations what padding says to padding, as clearing it
    would take as long as writing it. Query head n uses key/value head n // G, G = N / K. path: one that `choose_path`
    gave.
    """
    if path == "grouped":
        return _grouped(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, platform)
    if path == "reference":
        k_BKHT, v_BKTH = k_BTKH.transpose(0, 2, 3, 1), v_BTKH.transpose(0, 2, 1, 3)
        T = q_BTNH.shape[1]
        return _reference(q_BTNH, k_BKHT, v_BKTH, _mask(segment_ids_BT, segment_ids_BT, 0, T, T), platform)
    return fused.on_mesh(getattr(fused, path), jax.sharding.get_abstract_mesh())(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


def full_attention(q_BTNH: Array, k_BTNH: Array, v_BTNH: Array, path: Path, platform: Platform) -> Array:
    """softmax(q k^T / sqrt(H)) v over all keys, (B, T, N, H): of the patches of an image, among which is no order.

    path: one that `choose_full_path` gave; a fused one has no place on a mesh but inside `jax.shard_map`.
    """
    if path != "reference":
        return getattr(fused, path)(q_BTNH, k_BTNH, v_BTNH, None, is_causal=False)
    everything_111 = jnp.ones((1, 1, 1), bool)
    return _reference(q_BTNH, k_BTNH.transpose(0, 2, 3, 1), v_BTNH.transpose(0, 2, 1, 3), everything_111, platform)


def cached_attention(
    q_BTNH: Array, cache: LayerCache, positions_BT: Array, platform: Platform, rows_B: Array | None = None
) -> Array:
    """`attention` over the slots of a cache, in which slot s holds the token at position s of its row: a query at
    position p sees slots 0..p. In the dtype of the queries; on a CPU block by block, elsewhere the plain formula.

    rows_B: the rows of the cache that the queries belong to; see `LayerCache.of_rows`."""
    if platform == "cpu":
        return _by_blocks(q_BTNH, cache, positions_BT, rows_B)
    take_rows = cache.of_rows(rows_B)
    k_BKHS, v_BKSH = (take_rows(x).astype(q_BTNH.dtype) for x in cache.join())
    mask_BTS = jnp.arange(v_BKSH.shape[2]) <= positions_BT[:, :, None]
    return _reference(q_BTNH, k_BKHS, v_BKSH, mask_BTS, platform)


def _mask(query_ids_Bt: Array | None, key_ids_BS: Array | None, start, queries: int, keys: int) -> Array:
    """Which of the first `keys` keys the queries start..start + queries see, boolean (B or 1, queries, keys). Ids are
    those of their segments; None where a row is one."""
    causal_tS = start + jnp.arange(queries)[:, None] >= jnp.arange(keys)
    if query_ids_Bt is None:
        return causal_tS[None]
    return causal_tS & (query_ids_Bt[:, :, None] == key_ids_BS[:, None]) & (query_ids_Bt[:, :, None] > 0)


def _softmax_parts(scores: Array, mask: Array) -> tuple[Array, Array, Array]:
    """exp(score - largest) over the last axis, its sum and the largest score; where the mask hides all, zeros and a
    sum that is not 0. Finite bounds do it without the comparisons with infinity that break XLA's fused loops."""
    scores = jnp.where(mask, scores, -1e30)
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), -1e29))
    weights = jnp.exp(scores - largest)
    return weights, jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30), largest


def _in_float32(subscripts: str, a: Array, b: Array, platform: Platform) -> Array:
    """A matrix product that adds up in float32."""
    if platform == "cpu":  # where XLA lacks bfloat16 x bfloat16 -> float32 for some layouts
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _reference(q_BTNH, k_BKHS, v_BKSH, mask_BTS, platform):
    B, T, N, H = q_BTNH.shape
    K = v_BKSH.shape[1]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = _in_float32("BTKGH,BKHS->BKGTS", q_BTKGH, k_BKHS, platform) / math.sqrt(H)
    weights_BKGTS, total_BKGT1, _ = _softmax_parts(scores_BKGTS, mask_BTS[:, None, None])
    probs_BKGTS = (weights_BKGTS / total_BKGT1).astype(v_BKSH.dtype)
    return _in_float32("BKGTS,BKSH->BTKGH", probs_BKGTS, v_BKSH, platform).astype(q_BTNH.dtype).reshape(B, T, N, H)


def _by_blocks(q_BTNH, cache: LayerCache, positions_BT, rows_B):
    """`_reference` on a CPU: block by block, up to the last slot that a query sees, so that time follows the tokens
    and not the size of the cache; the last blocks for the longest rows alone. Sums so far are rescaled when a larger
    score is found (arXiv 2205.14135). The queries that share a key are the rows of one product (R = T * G). XLA copies
    a block before a product, in one thread unless it computes something on the way: those not seen become 0."""
    B, T, N, H = q_BTNH.shape
    C, _, K, size, _ = cache.v_CBKsH.shape
    q_BTKGH = q_BTNH.astype(jnp.float32).reshape(B, T, K, N // K, H) / math.sqrt(H)
    q_BKRH = q_BTKGH.transpose(0, 2, 1, 3, 4).reshape(B, K, -1, H)
    last_B1R1 = jnp.repeat(positions_BT, N // K, axis=1)[:, None, :, None]

    def add_blocks(first, stop, state, q_BKRH, last_B1R1, rows_B):
        """The sums with blocks first..stop of some rows added."""
        take_rows, last_B111 = cache.of_rows(rows_B), jnp.max(last_B1R1, axis=2, keepdims=True)

        def add_block(index, state):
            out_BKRH, total_BKR1, largest_BKR1 = state
            k_BKHs, v_BKsH = (take_rows(jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)) for x in cache)
            slots_s = index * size + jnp.arange(size)
            k_BKHs = jnp.where(slots_s <= last_B111, k_BKHs, 0)
            v_BKsH = jnp.where(slots_s[:, None] <= last_B111, v_BKsH, 0)
            scores_BKRs = jnp.where(slots_s <= last_B1R1, jnp.einsum("BKRH,BKHs->BKRs", q_BKRH, k_BKHs), -1e30)
            new_largest_BKR1 = jnp.maximum(largest_BKR1, jnp.max(scores_BKRs, axis=-1, keepdims=True))
            weights_BKRs, kept_BKR1 = jnp.exp(scores_BKRs - new_largest_BKR1), jnp.exp(largest_BKR1 - new_largest_BKR1)
            new_out_BKRH = jnp.einsum("BKRs,BKsH->BKRH", weights_BKRs, v_BKsH)
            new_total_BKR1 = jnp.sum(weights_BKRs, axis=-1, keepdims=True)
            return out_BKRH * kept_BKR1 + new_out_BKRH, total_BKR1 * kept_BKR1 + new_total_BKR1, new_largest_BKR1

        return jax.lax.fori_loop(first, stop, add_block, state)

    column = functools.partial(jnp.full, (B, K, T * (N // K), 1), dtype=jnp.float32)
    state = (jnp.zeros(q_BKRH.shape, jnp.float32), column(0), column(-1e29))
    ends_B = jnp.minimum(jnp.max(positions_BT, axis=1) // size + 1, C)
    seen_C = jnp.sum(ends_B[:, None] > jnp.arange(C), axis=0)  # by how many rows
    # Rows that a mesh cuts stay where they are; and a branch converts all of a cache that is not in float32.
    fits = current_mesh() is None and cache.v_CBKsH.dtype == jnp.float32
    fewer = [B // part for part in LONGEST if fits and B // part > 1]
    stops = [jnp.sum(seen_C > count) for count in (*fewer, 0)]
    state = add_blocks(0, stops[0], state, q_BKRH, last_B1R1, rows_B)

    def add_longest(state):
        order_B = jnp.argsort(-ends_B)
        for count, first, stop in zip(fewer, stops, stops[1:], strict=False):
            chosen_b = order_B[:count]
            rows_b = chosen_b if rows_B is None else rows_B[chosen_b]
            some = tuple(x[chosen_b] for x in state)
            some = add_blocks(first, stop, some, q_BKRH[chosen_b], last_B1R1[chosen_b], rows_b)
            state = tuple(x.at[chosen_b].set(y) for x, y in zip(state, some, strict=True))
        return state

    if fewer:
        state = jax.lax.cond(stops[0] < stops[-1], add_longest, lambda state: state, state)
    out_BKRH, total_BKR1, _ = state
    out_BKTGH = (out_BKRH / jnp.maximum(total_BKR1, 1e-30)).reshape(B, K, T, N // K, H)
    return out_BKTGH.transpose(0, 2, 1, 3, 4).reshape(B, T, N, H).astype(q_BTNH.dtype)


def _grouped(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, platform):
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BTKGH = (q_BTNH * (1 / math.sqrt(H))).reshape(B, T, K, N // K, H)
    q_BKRH = q_BTKGH.transpose(0, 2, 1, 3, 4).reshape(B, K, -1, H)
    k_BKTH, v_BKTH = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
    out_BKRH = _triangle(platform, q_BKRH, k_BKTH, v_BKTH, segment_ids_BT)
    return out_BKRH.reshape(B, K, T, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)


def _ranges(length: int) -> tuple[list[tuple[int, int]], int]:
    """(first, behind the last) of at most 8 ranges of queries, as more would hide little more and take long to compile;
    and into how many blocks each is cut."""
    count = min(8, math.ceil(length / 96))
    blocks = math.ceil(length / (count * BLOCK))
    size = math.ceil(length / (count * blocks)) * blocks
    return [(first, min(first + size, length)) for first in range(0, length, size)], blocks


def _over_blocks(step, length: int, carry, ids_BT, *rows_BKRX):
    """carry and outputs of `step(carry, mask, stop, rows of a block ...)` over blocks of queries.

    A block is multiplied with the keys up to the end of its range; those of a range come one after another, the last
    filled up with zeros. mask: (B or 1, 1, block's rows, stop) of the keys 0..stop. rows_BKRX: G rows for each query.
    """
    group = rows_BKRX[0].shape[2] // length
    ranges, blocks = _ranges(length)
    outs = []
    for first, stop in ranges:
        size = math.ceil((stop - first) / blocks)
        key_ids = None if ids_BT is None else ids_BT[:, :stop]

        def cut(x, axis, rows=1, first=first, stop=stop, size=size):
            x = jax.lax.slice_in_dim(x, first * rows, stop * rows, axis=axis)
            missing = (size * blocks - (stop - first)) * rows
            x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
            return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, -1, *x.shape[axis + 1 :]), axis, 0)

        def run(carry, block, key_ids=key_ids, stop=stop, size=size):
            start, query_ids, rows = block
            mask = jnp.repeat(_mask(query_ids, key_ids, start, size, stop), group, axis=1)[:, None]
            return step(carry, mask, stop, *rows)

        ids = None if ids_BT is None else cut(ids_BT, 1)
        inputs = first + size * jnp.arange(blocks), ids, [cut(x, 2, group) for x in rows_BKRX]
        carry, found = jax.lax.scan(run, carry, inputs, unroll=blocks == 1)
        joined = (jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1, x.shape[-1]) for x in found)
        outs.append([x[:, :, : (stop - first) * group] for x in joined])
    return carry, [jnp.concatenate(parts, axis=2) for parts in zip(*outs, strict=True)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _triangle(platform, q_BKRH, k_BKTH, v_BKTH, segment_ids_BT):
    """Attention of scaled query rows, block by block of queries."""
    return _triangle_forward(platform, q_BKRH, k_BKTH, v_BKTH, segment_ids_BT)[0]


def _triangle_forward(platform, q_BKRH, k_BKTH, v_BKTH, segment_ids_BT):
    T = k_BKTH.shape[2]

    def step(_, mask, stop, q):
        k, v = k_BKTH[:, :, :stop], v_BKTH[:, :, :stop]
        weights, total, largest = _softmax_parts(_in_float32("BKRH,BKSH->BKRS", q, k, platform), mask)
        out = _in_float32("BKRS,BKSH->BKRH", weights.astype(v.dtype), v, platform) / total
        return None, (out.astype(q.dtype), largest + jnp.log(total))

    _, outs = _over_blocks(step, T, None, segment_ids_BT, q_BKRH)
    out_BKRH, log_sums_BKR1 = (checkpoint_name(x, name) for x, name in zip(outs, SAVED_NAMES, strict=False))
    return out_BKRH, (q_BKRH, k_BKTH, v_BKTH, segment_ids_BT, out_BKRH, log_sums_BKR1)


def _triangle_backward(platform, saved, grad_BKRH):
    q_BKRH, k_BKTH, v_BKTH, segment_ids_BT, out_BKRH, log_sums_BKR1 = saved
    dtype, T = q_BKRH.dtype, k_BKTH.shape[2]
    # sum_s(probs * grad of probs), the part of the softmax's gradient that all keys share
    shared_BKR1 = _in_float32("BKRH,BKRH->BKR", grad_BKRH, out_BKRH, platform)[..., None]

    def step(carry, mask, stop, q, grad, log_sums, shared):
        grad_k, grad_v = carry
        k, v = k_BKTH[:, :, :stop], v_BKTH[:, :, :stop]
        scores = _in_float32("BKRH,BKSH->BKRS", q, k, platform) - log_sums
        probs = jnp.exp(jnp.where(mask, scores, -jnp.inf))
        grad_scores = probs * (_in_float32("BKRH,BKSH->BKRS", grad, v, platform) - shared)
        probs, grad_scores = probs.astype(dtype), grad_scores.astype(dtype)
        grad_v = grad_v.at[:, :, :stop].add(_in_float32("BKRS,BKRH->BKSH", probs, grad, platform))
        grad_k = grad_k.at[:, :, :stop].add(_in_float32("BKRS,BKRH->BKSH", grad_scores, q, platform))
        return (grad_k, grad_v), [_in_float32("BKRS,BKSH->BKRH", grad_scores, k, platform).astype(dtype)]

    zeros = jnp.zeros(k_BKTH.shape, jnp.float32)
    rows = (q_BKRH, grad_BKRH, log_sums_BKR1, shared_BKR1)
    (grad_k, grad_v), (grad_q,) = _over_blocks(step, T, (zeros, zeros), segment_ids_BT, *rows)
    return grad_q, grad_k.astype(dtype), grad_v.astype(dtype), None


_triangle.defvjp(_triangle_forward, _triangle_backward)

"""Causal attention within documents, grouped-query, softmax in float32: one function, four paths.

`reference` is the plain formula over a full boolean mask. `grouped` is the fast one on a CPU and lean anywhere: the G
query heads that share a key/value head become rows of one matrix product per (batch, key/value head), rows ordered by
time (R = T * G, row t * G + g), so that a block of queries is a contiguous slice; it is multiplied only with the keys
that the causal mask lets it see. The backward pass computes the softmax again from its logarithmic sums instead of
keeping it, as FlashAttention does (arXiv 2205.14135). `cudnn` and `splash` are kernels of GPUs and TPUs, in
`attention_kernels`.
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
from minimind_jax.model import attention_kernels as kernels
from minimind_jax.model.kv_cache import LayerCache

# Values of the forward pass that recomputation policies keep, because making them again is most of attention's work.
# (cuDNN's have no name: with such a policy its forward pass runs twice.)
SAVED_NAMES = ("attention_out", "attention_log_sums", kernels.SPLASH_SAVED_NAME)
Path = Literal["auto", "reference", "grouped", "cudnn", "splash"]


class Choice(NamedTuple):
    """path: the one taken. reason: why not the kernel of this platform, None where it is taken or there is none."""

    path: Path
    reason: str | None = None


def choose_path(
    path: Path,
    query_shape: tuple[int, int, int, int],
    kv_heads: int,
    dtype: jnp.dtype,
    mesh: Mesh | AbstractMesh | None = None,
) -> Choice:
    """The path for whole rows, queries being (B, T, N, H); `cached_attention` has none to choose.

    `auto` depends on where the computation runs: on the devices of `mesh`, else on JAX's default ones.

    Raises UserError when a kernel is asked for that cannot run there.
    """
    platform = _platform(mesh)
    kernel = {"gpu": "cudnn", "tpu": "splash"}.get(platform)
    if path == "auto" and kernel is not None:
        obstacle = _obstacle(kernel, query_shape, kv_heads, dtype, mesh)
        return Choice(kernel) if obstacle is None else Choice("grouped", f"not {kernel}: {obstacle}")
    if path in ("cudnn", "splash"):
        obstacle = f"this is a {platform}" if path != kernel else _obstacle(path, query_shape, kv_heads, dtype, mesh)
        if obstacle is not None:
            raise UserError(f"compute.attention {path} cannot run here: {obstacle}; auto takes a path that can")
    return Choice("grouped" if path == "auto" else path)


def _platform(mesh) -> str:
    device = None if mesh is None or mesh.empty else mesh.abstract_mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def _obstacle(kernel: Path, query_shape, kv_heads, dtype, mesh) -> str | None:
    """Why `kernel` cannot do it on its platform."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16, not {jnp.dtype(dtype).name}"
    tensor = 1 if mesh is None or mesh.empty else mesh.shape["tensor"]
    if kv_heads % tensor:
        return f"{kv_heads} key/value heads do not divide by mesh.tensor {tensor}"
    return kernels.cudnn_obstacle(query_shape[-1]) if kernel == "cudnn" else None


def attention(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    *,
    segment_ids_BT: Array | None = None,
    path: Path = "auto",
) -> Array:
    """softmax(q k^T / sqrt(H)) v over the keys a query may see, (B, T, N, H); 0 for a query that sees none.

    Query t sees keys s <= t of its own segment, and nothing in segment 0 (padding); all of a row is one segment when
    segment_ids_BT is None. Query head n uses key/value head n // G, G = N / K.
    """
    mesh = jax.sharding.get_abstract_mesh()
    path = choose_path(path, q_BTNH.shape, k_BTKH.shape[2], q_BTNH.dtype, mesh).path
    if path == "grouped":
        return _grouped(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    if path == "reference":
        k_BKHT, v_BKTH = k_BTKH.transpose(0, 2, 3, 1), v_BTKH.transpose(0, 2, 1, 3)
        return _reference(q_BTNH, k_BKHT, v_BKTH, causal_mask(segment_ids_BT, 0, q_BTNH.shape[1]))
    kernel = kernels.cudnn if path == "cudnn" else kernels.splash
    return kernels.on_mesh(kernel, mesh)(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


def cached_attention(
    q_BTNH: Array, cache: LayerCache, query_positions_BT: Array, key_positions_BS: Array, used: Array | int
) -> Array:
    """`attention` over the slots of a cache: a query at position p sees the keys at positions 0..p; -1 marks an empty
    slot, and all behind the first `used` ones are empty. The plain formula, in the dtype of the queries; on a CPU block
    by block for a single one."""
    is_past_BTS = key_positions_BS[:, None, :] <= query_positions_BT[:, :, None]
    mask_BTS = is_past_BTS & (key_positions_BS >= 0)[:, None, :]
    if q_BTNH.shape[1] == 1 and jax.default_backend() == "cpu":
        return _single_query(q_BTNH, cache, mask_BTS, used)
    k_BKHS, v_BKSH = (x.astype(q_BTNH.dtype) for x in cache.join())
    return _reference(q_BTNH, k_BKHS, v_BKSH, mask_BTS)


def causal_mask(segment_ids_BT: Array | None, start: int, stop: int) -> Array:
    """Which of the keys 0..stop the queries start..stop see, boolean (B or 1, stop - start, stop)."""
    causal_TS = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)
    if segment_ids_BT is None:
        return causal_TS[None]
    query_BT1, key_B1S = segment_ids_BT[:, start:stop, None], segment_ids_BT[:, None, :stop]
    return causal_TS & (query_BT1 == key_B1S) & (query_BT1 > 0)


def _softmax_parts(scores: Array, mask: Array) -> tuple[Array, Array, Array]:
    """exp(score - largest) over the last axis, its sum and the largest score; where the mask hides all, zeros and a
    sum that is not 0. Finite bounds do it without the comparisons with infinity that break XLA's fused loops."""
    scores = jnp.where(mask, scores, -1e30)
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), -1e29))
    weights = jnp.exp(scores - largest)
    return weights, jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30), largest


def _product(subscripts: str, a: Array, b: Array) -> Array:
    """A matrix product that adds up in float32."""
    if jax.default_backend() == "cpu":  # where XLA lacks bfloat16 x bfloat16 -> float32 for some layouts
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _reference(q_BTNH, k_BKHS, v_BKSH, mask_BTS):
    B, T, N, H = q_BTNH.shape
    K = v_BKSH.shape[1]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = _product("BTKGH,BKHS->BKGTS", q_BTKGH, k_BKHS) / math.sqrt(H)
    weights_BKGTS, total_BKGT1, _ = _softmax_parts(scores_BKGTS, mask_BTS[:, None, None])
    probs_BKGTS = (weights_BKGTS / total_BKGT1).astype(v_BKSH.dtype)
    return _product("BKGTS,BKSH->BTKGH", probs_BKGTS, v_BKSH).astype(q_BTNH.dtype).reshape(B, T, N, H)


def _single_query(q_B1NH, cache: LayerCache, mask_B1S, used):
    """`_reference` for one query a row on a CPU: block by block, up to the last used slot, so that time follows the
    tokens and not the size of the cache. Sums so far are rescaled when a larger score is found (arXiv 2205.14135)."""
    B, _, N, H = q_B1NH.shape
    K, size = cache.v_CBKsH.shape[2:4]
    q_BKGH = q_B1NH.astype(jnp.float32).reshape(B, K, N // K, H) / math.sqrt(H)

    def add_block(index, state):
        out_BKGH, total_BKG1, largest_BKG1 = state
        take = functools.partial(jax.lax.dynamic_index_in_dim, index=index, axis=0, keepdims=False)
        mask_B1s = jax.lax.dynamic_slice_in_dim(mask_B1S, index * size, size, axis=2)
        scores_BKGs = jnp.einsum("BKGH,BKHs->BKGs", q_BKGH, take(cache.k_CBKHs))
        scores_BKGs = jnp.where(mask_B1s[:, None], scores_BKGs, -1e30)
        new_largest_BKG1 = jnp.maximum(largest_BKG1, jnp.max(scores_BKGs, axis=-1, keepdims=True))
        weights_BKGs, kept_BKG1 = jnp.exp(scores_BKGs - new_largest_BKG1), jnp.exp(largest_BKG1 - new_largest_BKG1)
        new_out_BKGH = jnp.einsum("BKGs,BKsH->BKGH", weights_BKGs, take(cache.v_CBKsH))
        new_total_BKG1 = jnp.sum(weights_BKGs, axis=-1, keepdims=True)
        return out_BKGH * kept_BKG1 + new_out_BKGH, total_BKG1 * kept_BKG1 + new_total_BKG1, new_largest_BKG1

    column = functools.partial(jnp.full, (B, K, N // K, 1), dtype=jnp.float32)
    start = (jnp.zeros(q_BKGH.shape, jnp.float32), column(0), column(-1e29))
    out_BKGH, total_BKG1, _ = jax.lax.fori_loop(0, -(-used // size), add_block, start)
    out_BKGH = out_BKGH / jnp.maximum(total_BKG1, 1e-30)
    return out_BKGH.astype(q_B1NH.dtype).reshape(B, 1, N, H)


def _grouped(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BTKGH = (q_BTNH * (1 / math.sqrt(H))).reshape(B, T, K, N // K, H)
    q_BKRH = q_BTKGH.transpose(0, 2, 1, 3, 4).reshape(B, K, -1, H)
    k_BKTH, v_BKTH = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
    out_BKRH = _triangle(q_BKRH, k_BKTH, v_BKTH, segment_ids_BT)
    return out_BKRH.reshape(B, K, T, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)


def _query_blocks(length: int) -> list[tuple[int, int]]:
    """Equal ranges of about 96 queries, at most 8: more would hide little more and take long to compile."""
    count = min(8, math.ceil(length / 96))
    size = math.ceil(length / count)
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _row_mask(segment_ids_BT, start, stop, group):
    """`causal_mask` for query rows, (B or 1, 1, rows, stop)."""
    return jnp.repeat(causal_mask(segment_ids_BT, start, stop), group, axis=1)[:, None]


@jax.custom_vjp
def _triangle(q_BKRH, k_BKTH, v_BKTH, segment_ids_BT):
    """Attention of scaled query rows, block by block of queries."""
    return _triangle_forward(q_BKRH, k_BKTH, v_BKTH, segment_ids_BT)[0]


def _triangle_forward(q_BKRH, k_BKTH, v_BKTH, segment_ids_BT):
    T = k_BKTH.shape[2]
    G = q_BKRH.shape[2] // T
    outs, log_sums = [], []
    for start, stop in _query_blocks(T):
        k, v = k_BKTH[:, :, :stop], v_BKTH[:, :, :stop]
        scores = _product("BKRH,BKSH->BKRS", q_BKRH[:, :, start * G : stop * G], k)
        weights, total, largest = _softmax_parts(scores, _row_mask(segment_ids_BT, start, stop, G))
        outs.append((_product("BKRS,BKSH->BKRH", weights.astype(v.dtype), v) / total).astype(q_BKRH.dtype))
        log_sums.append(largest + jnp.log(total))
    out_BKRH = checkpoint_name(jnp.concatenate(outs, axis=2), SAVED_NAMES[0])
    log_sums_BKR1 = checkpoint_name(jnp.concatenate(log_sums, axis=2), SAVED_NAMES[1])
    return out_BKRH, (q_BKRH, k_BKTH, v_BKTH, segment_ids_BT, out_BKRH, log_sums_BKR1)


def _triangle_backward(saved, grad_BKRH):
    q_BKRH, k_BKTH, v_BKTH, segment_ids_BT, out_BKRH, log_sums_BKR1 = saved
    dtype, T = q_BKRH.dtype, k_BKTH.shape[2]
    G = q_BKRH.shape[2] // T
    # sum_s(probs * grad of probs), the part of the softmax's gradient that all keys share
    shared_BKR1 = _product("BKRH,BKRH->BKR", grad_BKRH, out_BKRH)[..., None]
    grad_q, grad_k, grad_v = [], jnp.zeros(k_BKTH.shape, jnp.float32), jnp.zeros(v_BKTH.shape, jnp.float32)
    for start, stop in _query_blocks(T):
        rows = slice(start * G, stop * G)
        q, grad, k, v = q_BKRH[:, :, rows], grad_BKRH[:, :, rows], k_BKTH[:, :, :stop], v_BKTH[:, :, :stop]
        scores = _product("BKRH,BKSH->BKRS", q, k) - log_sums_BKR1[:, :, rows]
        probs = jnp.exp(jnp.where(_row_mask(segment_ids_BT, start, stop, G), scores, -jnp.inf))
        grad_scores = probs * (_product("BKRH,BKSH->BKRS", grad, v) - shared_BKR1[:, :, rows])
        probs, grad_scores = probs.astype(dtype), grad_scores.astype(dtype)
        grad_v = grad_v.at[:, :, :stop].add(_product("BKRS,BKRH->BKSH", probs, grad))
        grad_k = grad_k.at[:, :, :stop].add(_product("BKRS,BKRH->BKSH", grad_scores, q))
        grad_q.append(_product("BKRS,BKSH->BKRH", grad_scores, k).astype(dtype))
    return jnp.concatenate(grad_q, axis=2), grad_k.astype(dtype), grad_v.astype(dtype), None


_triangle.defvjp(_triangle_forward, _triangle_backward)

"""Attention in one fused operation of a GPU or TPU, and its place on a mesh.

All take padding (segment 0) for a document like any other, so that every query sees at least itself. All need rows of
certain lengths; the causal mask hides the keys appended for that from every query that counts, and where there is none,
as among the patches of an image, a segment of their own.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, PartitionSpec

from minimind_jax.private import private_module
from minimind_jax.sharding import ROW_AXES
from minimind_jax.shell import install_command

# Splash attention's output and logarithmic sums, for policies of recomputation.
SPLASH_SAVED_NAME = "splash_attention"
# Tokens for each document that `cudnn_packed` has room for: in rows of 2,048 there may be 16 of them on average. cuDNN
# takes longer with every one there is room for, and keeps as many logarithmic sums for each token.
DOCUMENT_TOKENS, LEAST_ROOM = 128, 8
LANES = 128  # a TPU's vector registers are 8 x 128; splash attention's blocks are multiples of it

FusedAttention = Callable[[Array, Array, Array, Array | None], Array]


def on_mesh(fused: FusedAttention, mesh: AbstractMesh) -> FusedAttention:
    """`fused` as attention within documents (see `attention`), each device having its own rows and heads.

    The compiler cannot cut one operation, so that is said here: rows over data x fsdp, and over expert where they
    divide, heads over tensor.
    """

    def attend_cut(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
        rows = (*ROW_AXES, "expert")
        if q_BTNH.shape[0] % math.prod(mesh.shape[axis] for axis in rows):
            rows = ROW_AXES
        heads, ids = PartitionSpec(rows, None, "tensor"), PartitionSpec(rows)
        cut = jax.shard_map(fused, in_specs=(heads, heads, heads, ids), out_specs=heads, check_vma=False)
        return cut(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)

    return fused if mesh.empty or mesh.size == 1 else attend_cut


def cudnn(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segment_ids_BT: Array | None, is_causal: bool = True) -> Array:
    """cuDNN's flash attention (NVIDIA GPUs), (B, T, N, H). Without segment ids nothing of size T x T is in memory.

    With them there is a mask (B, 1, T, T) of two bytes each, and until jax 0.12 a gradient of it.
    """
    T = q_BTNH.shape[1]
    if T % 2 and not is_causal:
        segment_ids_BT = jnp.ones(q_BTNH.shape[:2], jnp.int32)
    q_BTNH, k_BTKH, v_BTKH = (_lengthen(x, T % 2) for x in (q_BTNH, k_BTKH, v_BTKH))  # it takes even lengths only
    mask_B1TT = None
    if segment_ids_BT is not None:
        ids_BT = _lengthen(segment_ids_BT, T % 2)
        mask_B1TT = ids_BT[:, None, :, None] == ids_BT[:, None, None, :]
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, mask=mask_B1TT, is_causal=is_causal, implementation="cudnn"
    )
    return out_BTNH[:, :T]


def cudnn_obstacle(head_dim: int) -> str | None:
    """Why cuDNN's flash attention cannot do it on the GPU at hand or compiled for."""
    # 256 on Hopper and later, which no model here has.
    if head_dim % 8 or head_dim > 128:
        return f"it takes heads whose width is a multiple of 8 up to 128, not {head_dim}"
    # A version as "9.0" with CUDA, a name as "gfx942" with ROCm, nothing where a CPU compiles for a GPU elsewhere.
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability is not None and not (capability[0].isdigit() and float(capability) >= 8):
        return f"it needs an NVIDIA GPU of compute capability 8.0 or more, not {capability}"
    return None


def cudnn_packed(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segment_ids_BT: Array | None) -> Array:
    """cuDNN's flash attention over each document apart (NVIDIA's Hopper and newer), (B, T, N, H): no mask, and nothing
    is computed of what other documents say. A document's tokens are in one run.

    There is room for `document_room` documents a row, on average over a device's rows (see `list_documents`). Rows
    with documents left over are computed by `cudnn` and its mask as well, in the same program.
    """
    if segment_ids_BT is None:
        return cudnn(q_BTNH, k_BTKH, v_BTKH, None)
    T = q_BTNH.shape[1]
    *inputs, ids_BT = (_lengthen(x, T % 2) for x in (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT))
    return _packed(*inputs, ids_BT, list_documents(ids_BT, document_room(T)))[:, :T]


def document_room(length: int) -> int:
    """Documents that `cudnn_packed` has room for in a row of so many tokens, on average."""
    return max(LEAST_ROOM, length // DOCUMENT_TOKENS)


class Documents(NamedTuple):
    """The documents of B rows as cuDNN's packed layout has them: M entries a row, of which those that are not -1 are
    read one after another. An entry belongs to any row that is not before it.

    starts_BM: place of the first token, counted from the beginning of the entry's row. lengths_BM: tokens.
    is_left_BT: tokens in an entry of more than one document, which is the last of its row.
    """

    starts_BM: Array
    lengths_BM: Array
    is_left_BT: Array


def list_documents(segment_ids_BT: Array, room: int) -> Documents:
    """All documents in their order, padding as one of them, so that every token is in an entry: cuDNN leaves what is in
    none as the memory was, in gradients as well. The first r rows have the first r * room entries."""
    B, T = segment_ids_BT.shape
    is_first_BT = jnp.diff(segment_ids_BT, axis=1, prepend=-1) != 0
    document_BT = jnp.cumsum(is_first_BT, dtype=jnp.int32).reshape(B, T) - 1
    last_B1 = room * jnp.arange(1, B + 1, dtype=jnp.int32)[:, None] - 1
    entry_BT = jnp.minimum(document_BT, last_B1)
    lengths_E = jnp.zeros(B * room, jnp.int32).at[entry_BT].add(1)
    starts_BM = (jnp.cumsum(lengths_E) - lengths_E).reshape(B, room) - T * jnp.arange(B, dtype=jnp.int32)[:, None]
    lengths_BM = lengths_E.reshape(B, room)
    starts_BM, lengths_BM = (jnp.where(lengths_BM > 0, x, -1) for x in (starts_BM, lengths_BM))
    return Documents(starts_BM, lengths_BM, (entry_BT == last_B1) & (document_BT[:, -1:] > last_B1))


def _by_entries(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, documents: Documents) -> Array:
    """cuDNN's packed attention. Its offsets are starts and nothing else, though there is one more of them a row."""
    private = _private_cudnn()
    offsets = jnp.pad(documents.starts_BM, ((0, 0), (0, 1)), constant_values=-1)
    return private.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH,
        q_seqlen=documents.lengths_BM, kv_seqlen=documents.lengths_BM, q_offsets=offsets, kv_offsets=offsets,
        scale=1 / math.sqrt(q_BTNH.shape[-1]), mask_type=private.MaskType.PADDING_CAUSAL,
    )  # fmt: skip


@jax.custom_vjp
def _packed(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, documents: Documents):
    """`_by_entries`, and then the documents that are left."""
    return _packed_forward(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, documents)[0]


def _packed_forward(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, documents):
    inputs = q_BTNH, k_BTKH, v_BTKH
    packed_BTNH, pull_back = jax.vjp(functools.partial(_by_entries, documents=documents), *inputs)

    def mend(row, choose, masked_TNH, _, out_BTNH):
        return out_BTNH.at[row].set(choose(masked_TNH, out_BTNH[row]))

    out_BTNH = _over_rows(mend, inputs, segment_ids_BT, documents, packed_BTNH)
    # Only the gradient of what is mended itself is another with this, and is mended, too: one array less is kept.
    pull_back = jax.tree.map(lambda leaf: out_BTNH if leaf is packed_BTNH else leaf, pull_back)
    return out_BTNH, (inputs, segment_ids_BT, documents, pull_back)


def _packed_backward(saved, grad_BTNH):
    inputs, segment_ids_BT, documents, pull_back = saved

    def mend(row, choose, _, pull_row_back, grads):
        of_row = pull_row_back(grad_BTNH[row])
        return tuple(grad.at[row].set(choose(own[0], grad[row])) for grad, own in zip(grads, of_row, strict=True))

    return *_over_rows(mend, inputs, segment_ids_BT, documents, pull_back(grad_BTNH)), None, None


_packed.defvjp(_packed_forward, _packed_backward)


def _over_rows(step, inputs, segment_ids_BT, documents: Documents, carry):
    """`carry` after `step(row, a choice between two (T, ...) by what is left, the row's attention by the mask (T, N, H)
    and the gradient of that, carry)` for every row in which something is left. In most batches the loop has no round,
    and unlike a branch it leaves arrays where they are."""
    has_left_B = jnp.any(documents.is_left_BT, axis=1)
    rows_B = jnp.argsort(~has_left_B)

    def run(index, carry):
        row = rows_B[index]

        def attend(*qkv):
            return cudnn(*qkv, segment_ids_BT[row][None])[0]

        choose = functools.partial(jnp.where, documents.is_left_BT[row, :, None, None])
        return step(row, choose, *jax.vjp(attend, *(x[row][None] for x in inputs)), carry)

    return jax.lax.fori_loop(0, jnp.sum(has_left_B), run, carry)


def cudnn_packed_obstacle(head_dim: int) -> str | None:
    """Why `cudnn_packed` cannot do it on the GPU at hand or compiled for, with the JAX that is installed."""
    # Until then keys of shared heads were read at the queries' offsets (jax pull request 39521), and nothing said so.
    if jax.__version_info__ < (0, 11, 1):
        return f"jax {jax.__version__} reads wrong keys in cuDNN's packed layout; install jax 0.11.2 or newer"
    if not _private_cudnn().check_compute_capability("9.0"):
        return "it needs an NVIDIA GPU of compute capability 9.0 or more (Hopper)"
    return cudnn_obstacle(head_dim)


def tokamax(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segment_ids_BT: Array | None) -> Array:
    """Flash attention of the tokamax library (NVIDIA's Hopper and Blackwell for data centres), (B, T, N, H): no mask,
    forward nothing is computed of documents before a block's own. A document's tokens are in one run."""
    if segment_ids_BT is None:
        return cudnn(q_BTNH, k_BTKH, v_BTKH, None)
    masks, kernels, _ = _private_tokamax()
    mask = masks.Mask(k_start=first_keys(segment_ids_BT)[:, None], is_causal=True)
    return kernels.PallasMosaicGpuFlashAttention()(q_BTNH, k_BTKH, v_BTKH, mask=mask)


def first_keys(segment_ids_BT: Array) -> Array:
    """Where each token's document begins, int32 (B, T): the first key that it sees. Causality hides those behind it."""
    is_first_BT = jnp.diff(segment_ids_BT, axis=1, prepend=-1) != 0
    return jax.lax.cummax(jnp.where(is_first_BT, jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32), 0), axis=1)


def tokamax_obstacle(head_dim: int) -> str | None:
    """Why `tokamax` cannot do it on the GPU at hand or compiled for."""
    if importlib.util.find_spec("tokamax") is None:
        return f"it needs a package (Python 3.12 or newer): {install_command('tokamax')}"
    _, _, gpu_utils = _private_tokamax()
    if not (gpu_utils.is_sm90() or gpu_utils.is_sm100()):
        return "it needs an NVIDIA GPU of compute capability 9 or 10"
    return cudnn_obstacle(head_dim)


def _private_cudnn() -> ModuleType:
    """JAX's public attention has no packed layout. Imported here because no other platform needs it."""
    names = "check_compute_capability", "dot_product_attention", "MaskType.PADDING_CAUSAL"
    return private_module("jax._src.cudnn.fused_attention_stablehlo", *names)


def _private_tokamax() -> tuple[ModuleType, ModuleType, ModuleType]:
    """Its public attention has no first keys. Imported here because it is optional."""
    return (
        private_module("tokamax._src.ops.attention.base", "Mask"),
        private_module("tokamax._src.ops.attention.pallas_mosaic_gpu", "PallasMosaicGpuFlashAttention"),
        private_module("tokamax._src.gpu_utils", "is_sm90", "is_sm100"),
    )


def splash(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    segment_ids_BT: Array | None,
    is_causal: bool = True,
    interpret: bool = False,
) -> Array:
    """Splash attention (TPUs), (B, T, N, H): skips blocks that the causal mask hides, compares segment ids as it
    goes, and reads shared key/value heads where they are. interpret: without a TPU, slowly."""
    # Imported here because it takes a while and no other platform needs it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    T, N, H = q_BTNH.shape[1:]
    block = splash_block(T)
    length = math.ceil(T / block) * block
    mask = splash_attention_mask.CausalMask if is_causal else splash_attention_mask.FullMask
    if length > T and not is_causal:
        segment_ids_BT = jnp.ones(q_BTNH.shape[:2], jnp.int32)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    attend = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask((length, length))] * N),
        block_sizes=splash_attention_kernel.BlockSizes(**dict.fromkeys(names, block)),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SPLASH_SAVED_NAME,
        interpret=interpret,
    )
    scaled_BTNH = (q_BTNH.astype(jnp.float32) / math.sqrt(H)).astype(q_BTNH.dtype)
    heads_first = [_lengthen(x, length - T).transpose(0, 2, 1, 3) for x in (scaled_BTNH, k_BTKH, v_BTKH)]
    segment_ids = None
    if segment_ids_BT is not None:
        ids_BT = _lengthen(segment_ids_BT, length - T)
        segment_ids = splash_attention_kernel.SegmentIds(ids_BT, ids_BT)
    out_BNTH = jax.vmap(attend)(*heads_first, segment_ids)
    return out_BNTH.transpose(0, 2, 1, 3)[:, :T]


def splash_block(length: int) -> int:
    """Queries, and keys, that splash attention takes at once: a multiple of 128 up to 512, with the least padding for
    that number of blocks."""
    blocks = math.ceil(length / 512)
    return math.ceil(length / (blocks * LANES)) * LANES


def _lengthen(x_BT: Array, count: int) -> Array:
    """`x_BT...` with zeros appended to its rows."""
    return jnp.pad(x_BT, ((0, 0), (0, count)) + ((0, 0),) * (x_BT.ndim - 2))

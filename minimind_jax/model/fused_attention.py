"""Attention in one fused operation of a GPU or TPU, and its place on a mesh.

Both take padding (segment 0) for a document like any other, so that every query sees at least itself, and `on_mesh`
clears what comes out for it. Both need rows of certain lengths; the causal mask hides the keys appended for
that from every query that counts, and where there is none, as among the patches of an image, a segment of their own.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, PartitionSpec

from minimind_jax.sharding import ROW_AXES

# Splash attention's output and logarithmic sums, for policies of recomputation.
SPLASH_SAVED_NAME = "splash_attention"
LANES = 128  # a TPU's vector registers are 8 x 128; splash attention's blocks are multiples of it

FusedAttention = Callable[[Array, Array, Array, Array | None], Array]


def on_mesh(fused: FusedAttention, mesh: AbstractMesh) -> FusedAttention:
    """`fused` as attention within documents (see `attention`), each device having its own rows and heads.

    The compiler cannot cut one operation, so that is said here: rows over data x fsdp, and over expert where they
    divide, heads over tensor. Queries in segment 0 give 0.
    """

    def attend(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
        out_BTNH = fused(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
        return out_BTNH if segment_ids_BT is None else jnp.where((segment_ids_BT > 0)[:, :, None, None], out_BTNH, 0)

    def attend_cut(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
        rows = (*ROW_AXES, "expert")
        if q_BTNH.shape[0] % math.prod(mesh.shape[axis] for axis in rows):
            rows = ROW_AXES
        heads, ids = PartitionSpec(rows, None, "tensor"), PartitionSpec(rows)
        cut = jax.shard_map(attend, in_specs=(heads, heads, heads, ids), out_specs=heads, check_vma=False)
        return cut(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)

    return attend if mesh.empty or mesh.size == 1 else attend_cut


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

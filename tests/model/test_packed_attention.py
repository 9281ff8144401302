"""Attention over documents without a mask: what JAX hands to cuDNN's packed layout, and what tokamax is told, computed
from just that by XLA, against the plain formula. `test_attention_compiled` compiles both, `training/test_gpu.py` runs
them where there is a GPU.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minimind_jax.errors import UserError
from minimind_jax.model import fused_attention as fused
from minimind_jax.model.attention import Choice, attention, choose_full_path, choose_path

SHAPE = (8, 64, 8, 96)


def packed_by_xla(monkeypatch):
    """`cudnn_packed` with what JAX would hand to cuDNN's packed layout computed from just that."""
    private, plain = fused._private_cudnn(), jax.nn.dot_product_attention

    def attend(q_BTNH, k_BTKH, v_BTKH, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
        (B, T, N, H), K, M = q_BTNH.shape, k_BTKH.shape[2], q_seqlen.shape[1]
        assert mask_type is private.MaskType.PADDING_CAUSAL and q_offsets.shape == kv_offsets.shape == (B, M + 1)
        lengths, kv_lengths, offsets, kv_offsets = (
            x.ravel() for x in private._fix_seqlen_offsets(q_seqlen, kv_seqlen, q_offsets, kv_offsets, q_BTNH, k_BTKH)
        )
        starts, place = offsets[: B * M] // (N * H), jnp.arange(B * T)
        is_in = (starts[:, None] <= place) & (place < (starts + lengths)[:, None])
        entry = jnp.where(is_in.any(axis=0), is_in.argmax(axis=0), -1)
        sees = (entry[:, None] == entry) & (place[:, None] >= place) & (entry >= 0)
        flat = [x.reshape(1, B * T, -1, H) for x in (q_BTNH, k_BTKH, v_BTKH)]
        out = plain(*flat, mask=sees[None, None], scale=scale)
        said = jnp.all(lengths == kv_lengths) & jnp.all(is_in.sum(axis=0) < 2)
        if jax.__version_info__ >= (0, 11, 1):
            said &= jnp.all(kv_offsets // (K * H) == offsets // (N * H))
        out = jnp.where((entry >= 0)[None, :, None, None] & said, out, jnp.nan)  # what is in no entry is never written
        return out.reshape(q_BTNH.shape)

    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *inputs, implementation, **options: plain(*inputs, **options)
    )
    monkeypatch.setattr(private, "dot_product_attention", attend)
    return fused.cudnn_packed


def random_packing(seed, T):
    """Rows in any order: of 1, of 64 and of two other numbers of documents with padding behind them, one of those with
    padding in front as well, a full one and an empty one."""
    rng = np.random.default_rng(seed)
    rows = [np.sort(rng.integers(1, 9, size=T)), np.zeros(T, int)]
    for count in (1, 64, *rng.integers(2, 25, size=2)):
        ends = np.sort(rng.choice(np.arange(1, T), count, replace=False))
        rows.append(np.where(np.arange(T) < ends[-1], np.searchsorted(ends, np.arange(T), side="right") + 1, 0))
    rows[-1][:3] = 0
    return jnp.asarray(np.stack(rng.permutation(rows)).astype(np.int32))


def agree_with_the_reference(attend, packings):
    """Value and gradient of `attend(q, k, v, segment ids)`, compiled once."""
    T, N, K, H = packings[0].shape[1], 4, 2, 8
    attend = fused.on_mesh(attend, jax.sharding.AbstractMesh((), ()))
    weights_BTNH = np.float32(np.random.default_rng(1).standard_normal((6, T, N, H)))

    def reference(*qkv_ids):
        return attention(*qkv_ids[:3], segment_ids_BT=qkv_ids[3], path="reference", platform="cpu")

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(attend, ids_BT, *qkv):
        def total(*qkv):
            out_BTNH = attend(*qkv, ids_BT) * (ids_BT > 0)[:, :, None, None]
            return jnp.sum(out_BTNH * weights_BTNH), out_BTNH

        return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(*qkv)

    for seed, ids_BT in enumerate(packings):
        rng = np.random.default_rng(seed)
        qkv = [jnp.asarray(np.float32(2 * rng.standard_normal((6, T, heads, H)))) for heads in (N, K, K)]
        actual, expected = gradient(attend, ids_BT, *qkv), gradient(reference, ids_BT, *qkv)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(np.asarray(b)).max())


def test_documents_of_any_number_by_the_packed_layout_are_the_reference_s(monkeypatch):
    packings = [random_packing(seed, 99) for seed in range(8)]
    agree_with_the_reference(packed_by_xla(monkeypatch), packings)
    left = [int(fused.list_documents(ids_BT, fused.LEAST_ROOM).is_left_BT.any(axis=1).sum()) for ids_BT in packings]
    assert len(set(left)) > 2  # rows with documents that have no room: none, one, several


def test_documents_of_any_number_by_their_first_keys_are_the_reference_s():
    def by_first_keys(*qkv_ids):
        starts_BT, place = fused.first_keys(qkv_ids[3]), jnp.arange(qkv_ids[3].shape[1])
        sees_BTT = (starts_BT[:, :, None] <= place) & (place <= place[:, None])
        return jax.nn.dot_product_attention(*qkv_ids[:3], mask=sees_BTT[:, None])

    agree_with_the_reference(by_first_keys, [random_packing(seed, 99) for seed in range(4)])


def test_tokamax_is_told_the_documents(monkeypatch):
    """By what the library itself computes with XLA where it has no GPU."""
    pytest.importorskip("tokamax", reason="needs tokamax: pip install 'minimind-jax[tokamax]'")
    from tokamax._src.ops.attention import base, pallas_mosaic_gpu

    monkeypatch.setattr(pallas_mosaic_gpu, "PallasMosaicGpuFlashAttention", base.DotProductAttention)
    agree_with_the_reference(fused.tokamax, [random_packing(seed, 99) for seed in range(2)])


def test_the_packed_layout_needs_a_jax_and_a_gpu_that_have_it_right(monkeypatch):
    asked = "cudnn_packed", SHAPE, 4, jnp.bfloat16, "gpu"
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    with pytest.raises(UserError, match=r"reads wrong keys in cuDNN's packed layout; install jax 0\.11\.2 or newer"):
        choose_path(*asked)
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    with pytest.raises(UserError, match=r"compute capability 9\.0"):
        choose_path(*asked)
    monkeypatch.setattr(fused._private_cudnn(), "check_compute_capability", lambda least: True)
    assert choose_path(*asked).path == "cudnn_packed" and "room for 8 documents a row" in choose_path(*asked).reason
    assert choose_full_path("cudnn_packed", SHAPE, jnp.dtype("bfloat16"), "gpu") == Choice("cudnn")
    with pytest.raises(UserError, match=r"this is a tpu"):
        choose_path(*asked[:-1], "tpu")


def test_tokamax_is_a_package_and_needs_a_gpu():
    told = (
        r"compute capability 9 or 10" if importlib.util.find_spec("tokamax") else r"3.12 or newer.*install 'tokamax>="
    )
    for deterministic in (False, True):  # each of its sums is one thread's
        with pytest.raises(UserError, match=told):
            choose_path("tokamax", SHAPE, 4, jnp.bfloat16, "gpu", deterministic=deterministic)


def test_patches_are_not_cudnn_s_either_where_sums_have_a_fixed_order(monkeypatch):
    monkeypatch.setattr(fused, "tokamax_obstacle", lambda head_dim: None)
    for deterministic, path in ((False, "cudnn"), (True, "reference")):
        assert choose_path("tokamax", SHAPE, 4, jnp.bfloat16, "gpu", deterministic=deterministic).path == "tokamax"
        assert choose_full_path("tokamax", SHAPE, jnp.dtype("bfloat16"), "gpu", deterministic).path == path

"""Attention: each path against a formula in float64 NumPy or the plain one, in value and gradient.

The kernels run as far as they do without their device: splash attention interpreted, what is asked of cuDNN computed by
XLA. `test_attention_compiled` compiles both.
"""

import functools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minimind_jax.errors import UserError
from minimind_jax.model import attention as attention_module
from minimind_jax.model import fused_attention as fused
from minimind_jax.model.attention import (
    UNTRIED,
    Choice,
    attention,
    cached_attention,
    choose_full_path,
    choose_path,
    full_attention,
)  # fmt: skip
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.kv_cache import CPU_BLOCK, KVCache, LayerCache
from minimind_jax.sharding import MESH_AXES

# Compiled as in the model: each of their operations alone would be a program of its own.
attention = jax.jit(functools.partial(attention, platform="cpu"), static_argnames="path")
cached_attention = jax.jit(functools.partial(cached_attention, platform="cpu"))


def make_inputs(B, T, N, K, H, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(np.float32(2 * rng.standard_normal((B, T, heads, H)))) for heads in (N, K, K))


def make_segments(B, T, seed=0):
    """Rows of documents of random lengths, the second row with padding at both ends."""
    rng = np.random.default_rng(seed)
    segments = np.cumsum(rng.random((B, T)) < 4 / T, axis=1) + 1
    segments[1, : T // 8] = 0
    segments[1, -T // 5 :] = 0
    return jnp.asarray(segments.astype(np.int32))


def numpy_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
    """The definition, one query at a time, in float64."""
    q_BTNH, k_BTKH, v_BTKH = (np.asarray(x, np.float64) for x in (q_BTNH, k_BTKH, v_BTKH))
    out_BTNH = np.zeros_like(q_BTNH)
    B, T, N, H = q_BTNH.shape
    for b in range(B):
        for t in range(T):
            own = [s for s in range(t + 1) if 0 < segment_ids_BT[b, s] == segment_ids_BT[b, t]]
            for n in range(N if own else 0):
                head = n // (N // k_BTKH.shape[2])
                weights = np.exp(k_BTKH[b, own, head] @ q_BTNH[b, t, n] / np.sqrt(H))
                out_BTNH[b, t, n] = weights @ v_BTKH[b, own, head] / weights.sum()
    return out_BTNH


@pytest.mark.parametrize("path", ["reference", "grouped"])
def test_value_is_the_definition_s(path):
    q, k, v = make_inputs(2, 30, 4, 2, 8)
    segment_ids_BT = make_segments(2, 30)
    out_BTNH = attention(q, k, v, segment_ids_BT=segment_ids_BT, path=path)
    np.testing.assert_allclose(out_BTNH, numpy_attention(q, k, v, np.asarray(segment_ids_BT)), atol=2e-6)


@pytest.mark.parametrize(
    ("T", "N", "K", "packed"),
    [(230, 4, 2, True), (230, 4, 2, False), (97, 3, 3, True), (1, 2, 1, False), (40, 6, 1, True),
     (500, 2, 1, True), (500, 2, 1, False)],
)  # fmt: skip
def test_paths_agree_in_value_and_gradient(monkeypatch, T, N, K, packed):
    if T == 500:  # blocks of a long row: several in each range, the last ones filled up
        monkeypatch.setattr(attention_module, "BLOCK", 24)
    inputs = make_inputs(2, T, N, K, 16)
    segment_ids_BT = make_segments(2, T) if packed else None
    weights_BTNH = np.float32(np.random.default_rng(1).standard_normal(inputs[0].shape))

    def total(path, *inputs):
        out_BTNH = attention(*inputs, segment_ids_BT=segment_ids_BT, path=path)
        return jnp.sum(out_BTNH * weights_BTNH), out_BTNH

    @jax.jit
    def both(*inputs):
        gradient = jax.grad(total, argnums=(1, 2, 3), has_aux=True)
        return gradient("reference", *inputs), gradient("grouped", *inputs)

    expected, actual = both(*inputs)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(np.asarray(b)).max()))


def test_memory_grows_with_the_row_and_not_with_its_square():
    """Of the gradient, as the compiler counts it."""

    def temporaries(T):
        q, k, v = (jax.ShapeDtypeStruct((1, T, heads, 64), jnp.float32) for heads in (8, 2, 2))
        total = lambda *qkv: jnp.sum(jnp.square(attention(*qkv, path="grouped")))  # noqa: E731
        compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, k, v).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(4096), temporaries(16384)
    assert long < 4.4 * short
    assert long < 4 * (4 * 8 * attention_module.BLOCK * 16384)  # float32 scores of a block of queries, 8 heads


@pytest.mark.parametrize("path", ["reference", "grouped"])
def test_queries_that_see_nothing_give_zero_and_no_gradient(path):
    inputs = make_inputs(2, 16, 2, 1, 8)
    segment_ids_BT = np.zeros((2, 16), np.int32)
    segment_ids_BT[0, 4:] = 1

    def total(*inputs):
        return jnp.sum(attention(*inputs, segment_ids_BT=segment_ids_BT, path=path) ** 2)

    out_BTNH = np.asarray(attention(*inputs, segment_ids_BT=segment_ids_BT, path=path))
    assert not out_BTNH[1].any() and not out_BTNH[0, :4].any() and np.all(out_BTNH[0, 4:] != 0)
    for gradient in map(np.asarray, jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*inputs)):
        assert np.isfinite(gradient).all()
        assert not gradient[1].any() and not gradient[0, :4].any()


@pytest.mark.parametrize("path", ["reference", "grouped"])
def test_bfloat16_stays_near_float32_with_large_scores(path):
    inputs = tuple(4 * x for x in make_inputs(1, 64, 2, 1, 16))
    rounded = tuple(x.astype(jnp.bfloat16) for x in inputs)
    out_BTNH = attention(*rounded, path=path)
    assert out_BTNH.dtype == jnp.bfloat16
    expected_BTNH = attention(*(x.astype(jnp.float32) for x in rounded), path="reference")
    # bfloat16 holds 8 bits of the probabilities, of the output, and (grouped) of the scaled queries
    assert float(jnp.max(jnp.abs(out_BTNH - expected_BTNH)) / jnp.max(jnp.abs(expected_BTNH))) < 0.05


def make_cache(k_BSKH, v_BSKH) -> LayerCache:
    """All slots written, in the dtype of the keys."""
    B, S, K, H = k_BSKH.shape
    config = ModelConfig(hidden_size=K * H, num_attention_heads=K, num_key_value_heads=K, num_hidden_layers=1)
    positions_BS = jnp.broadcast_to(jnp.arange(S), (B, S))
    return KVCache.create(config, B, S, k_BSKH.dtype, "cpu").layers[0].write(k_BSKH, v_BSKH, positions_BS)


def test_a_query_sees_the_slots_up_to_its_position():
    q, k, v = make_inputs(2, 3, 2, 1, 8)
    all_k, all_v = (jnp.concatenate((x, x + 1), axis=1) for x in (k, v))
    positions_BT = jnp.array([[0, 1, 2], [2, 3, 4]])
    out_BTNH = cached_attention(q, make_cache(all_k, all_v), positions_BT)
    first = attention(q[:1], k[:1], v[:1], path="reference")
    np.testing.assert_allclose(out_BTNH[0], first[0], atol=1e-6)
    keys, values = all_k[1:, :4], all_v[1:, :4]  # what the query at position 3 of the second row sees
    weights = jax.nn.softmax(jnp.einsum("NH,SH->NS", q[1, 1], keys[0, :, 0]) / np.sqrt(8))
    np.testing.assert_allclose(out_BTNH[1, 1], weights @ values[0, :, 0], atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_query_at_a_time_equals_all_of_them(dtype):
    q, k, v = (x.astype(dtype) for x in make_inputs(2, 6, 4, 2, 8))
    cache = make_cache(k, v)
    positions_BT = jnp.array([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]])
    together = cached_attention(q, cache, positions_BT)
    for t in range(6):
        alone = cached_attention(q[:, t : t + 1], cache, positions_BT[:, t : t + 1])
        assert alone.dtype == dtype
        # the probabilities of many queries are rounded to bfloat16, and so are both outputs
        tolerance = 1e-6 if dtype == jnp.float32 else 0.01
        pair = (np.asarray(x, np.float32) for x in (alone[:, 0], together[:, t]))
        np.testing.assert_allclose(*pair, rtol=tolerance, atol=tolerance)


def test_one_query_goes_over_blocks_of_slots_and_stops_behind_the_last_one_seen():
    slots, lasts = 3 * CPU_BLOCK, (CPU_BLOCK + 4, 2, 0)
    q, k, v = make_inputs(3, slots, 4, 2, 8)
    query = q[:, :1] * 3  # scores that grow from block to block, and shrink
    poisoned = [jnp.where(jnp.arange(slots)[:, None, None] < 2 * CPU_BLOCK, x, jnp.nan) for x in (k, v)]
    out_BNH = cached_attention(query, make_cache(*poisoned), jnp.array(lasts)[:, None])[:, 0]
    for row, last in enumerate(lasts):
        keys, values = (np.repeat(np.float64(x[row, : last + 1]), 2, axis=1) for x in (k, v))
        scores = np.einsum("NH,SNH->NS", np.float64(query[row, 0]), keys) / np.sqrt(8)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = np.einsum("NS,SNH->NH", weights / weights.sum(-1, keepdims=True), values)
        rounding = np.abs(scores).max() * 2**-23  # of a score in float32, and so of its weight
        np.testing.assert_allclose(out_BNH[row], expected, atol=4 * rounding)


@pytest.mark.parametrize("lengths", ["unequal", "equal", "one is long"])
def test_many_rows_of_unequal_lengths_give_what_each_gives_alone(lengths):
    slots, rows = 4 * CPU_BLOCK, 32
    _, k, v = make_inputs(rows + 3, slots, 4, 2, 8)
    q = make_inputs(rows, 1, 4, 2, 8, seed=5)[0]
    last_B = np.random.default_rng(0).permutation(rows) * (slots - 1) // (rows - 1)
    last_B = {"unequal": last_B, "equal": np.full(rows, slots // 2), "one is long": last_B // 8}[lengths]
    last_B = jnp.array(last_B).at[3].set(slots - 1 if lengths == "one is long" else last_B[3])
    held_BS = jnp.zeros((rows + 3, slots), bool)
    rows_B = jnp.array(np.random.default_rng(1).permutation(rows + 3)[:rows])
    held_BS = held_BS.at[rows_B].set(jnp.arange(slots) <= last_B[:, None])
    k, v = (jnp.where(held_BS[..., None, None], x, 1e9) for x in (k, v))  # what no query sees
    together = cached_attention(q, make_cache(k, v), last_B[:, None], rows_B=rows_B)
    for n, row in enumerate(rows_B):
        of_row = make_cache(k[row : row + 1], v[row : row + 1])
        alone = cached_attention(q[n : n + 1], of_row, last_B[n : n + 1, None])
        np.testing.assert_allclose(together[n], alone[0], rtol=1e-6, atol=1e-6)  # values up to 5: a few roundings


def abstract_mesh(**sizes):
    return jax.sharding.AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)


NO_MESH = jax.sharding.AbstractMesh((), ())


def cudnn_by_xla(monkeypatch):
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *inputs, implementation, **options: plain(*inputs, **options)
    )
    return fused.cudnn


@pytest.mark.parametrize(
    ("name", "T", "H", "packed"),
    [("splash", 150, 96, True), ("splash", 128, 16, False), ("cudnn", 31, 16, True), ("cudnn", 31, 16, False)],
)
def test_fused_paths_agree_with_the_reference_in_value_and_gradient(monkeypatch, name, T, H, packed):
    function = functools.partial(fused.splash, interpret=True) if name == "splash" else cudnn_by_xla(monkeypatch)
    inputs = make_inputs(2, T, 4, 2, H)
    segment_ids_BT = make_segments(2, T) if packed else None
    is_token_BT11 = (jnp.ones((2, T)) if segment_ids_BT is None else segment_ids_BT > 0)[:, :, None, None]
    weights_BTNH = np.float32(np.random.default_rng(1).standard_normal(inputs[0].shape))
    reference = functools.partial(attention, path="reference")

    def total(function, *inputs):
        out_BTNH = function(*inputs) * is_token_BT11  # what is no number in padding would show
        return jnp.sum(out_BTNH * weights_BTNH), out_BTNH

    gradient = jax.grad(total, argnums=(1, 2, 3), has_aux=True)
    function = fused.on_mesh(function, NO_MESH)

    def compiled(function):
        return jax.jit(functools.partial(gradient, function))(*inputs)

    actual = compiled(lambda *qkv: function(*qkv, segment_ids_BT))
    expected = compiled(lambda *qkv: reference(*qkv, segment_ids_BT=segment_ids_BT))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(np.asarray(b)).max()))


@pytest.mark.parametrize(("name", "P"), [("splash", 49), ("splash", 128), ("cudnn", 49), ("cudnn", 64)])
def test_patches_attend_to_all_by_the_fused_paths_as_by_the_plain_one(monkeypatch, name, P):
    function = functools.partial(fused.splash, interpret=True) if name == "splash" else cudnn_by_xla(monkeypatch)
    monkeypatch.setattr(fused, name, function)
    inputs = make_inputs(2, P, 2, 2, 16)

    def gradient(path):
        def total(*qkv):
            out_BPNH = full_attention(*qkv, path, "cpu")
            return jnp.sum(jnp.sin(out_BPNH)), out_BPNH

        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*inputs)

    for a, b in zip(jax.tree.leaves(gradient(name)), jax.tree.leaves(gradient("reference")), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("path", "platform", "patches", "dtype", "expected"),
    [
        ("auto", "cpu", 64, "float32", Choice("reference")),
        ("grouped", "gpu", 64, "bfloat16", Choice("reference")),
        ("auto", "gpu", 64, "bfloat16", Choice("cudnn")),
        ("cudnn", "gpu", 64, "bfloat16", Choice("cudnn")),
        ("auto", "gpu", 64, "float32", Choice("reference", "not cudnn: it takes bfloat16, not float32")),
        ("auto", "tpu", 256, "bfloat16", Choice("reference", "not splash: 256 patches are few")),
        ("auto", "tpu", 576, "bfloat16", Choice("splash")),
        ("splash", "tpu", 64, "bfloat16", Choice("splash")),
    ],
)
def test_patches_take_the_fused_path_where_it_is_worth_it(path, platform, patches, dtype, expected):
    assert choose_full_path(path, (8, patches, 12, 64), jnp.dtype(dtype), platform) == expected


@pytest.mark.parametrize(("length", "block", "padded"), [(1, 128, 128), (340, 384, 384), (768, 384, 768),
                                                         (1100, 384, 1152), (2048, 512, 2048)])  # fmt: skip
def test_splash_pads_little(length, block, padded):
    assert fused.splash_block(length) == block
    assert -(-length // block) * block == padded


SHAPE = (8, 64, 8, 96)


@pytest.mark.parametrize(
    ("platform", "sizes", "dtype", "head_dim", "expected"),
    [
        ("cpu", {}, "float32", 96, Choice("grouped")),
        ("gpu", {}, "bfloat16", 96, Choice("cudnn", UNTRIED)),
        ("gpu", {}, "float32", 96, Choice("grouped", "not cudnn: it takes bfloat16, not float32")),
        ("gpu", {"tensor": 4, "data": 2}, "bfloat16", 128, Choice("cudnn", UNTRIED)),
        ("gpu", {}, "bfloat16", 100,
         Choice("grouped", "not cudnn: it takes heads whose width is a multiple of 8 up to 128, not 100")),
        ("tpu", {"fsdp": 8}, "bfloat16", 100, Choice("splash")),
        ("tpu", {"tensor": 8}, "bfloat16", 96,
         Choice("grouped", "not splash: 4 key/value heads do not divide by mesh.tensor 8")),
    ],
)  # fmt: skip
def test_auto_takes_the_fused_path_of_the_platform_or_says_why_not(platform, sizes, dtype, head_dim, expected):
    shape = (*SHAPE[:-1], head_dim)
    assert choose_path("auto", shape, 4, jnp.dtype(dtype), platform, abstract_mesh(**sizes)) == expected


def test_the_gpu_at_hand_must_have_it(monkeypatch):
    assert choose_path("auto", SHAPE, 4, jnp.bfloat16, "gpu").path == "cudnn"
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability="7.5")])
    expected = "not cudnn: it needs an NVIDIA GPU of compute capability 8.0 or more, not 7.5"
    assert choose_path("auto", SHAPE, 4, jnp.bfloat16, "gpu") == Choice("grouped", expected)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability="gfx942")])
    assert choose_path("auto", SHAPE, 4, jnp.bfloat16, "gpu").path == "grouped"


@pytest.mark.parametrize(("platform", "path", "full"), [("gpu", "grouped", "reference"), ("tpu", "splash", "splash"),
                                                         ("cpu", "grouped", "reference")])  # fmt: skip
def test_sums_in_a_fixed_order_have_a_path_on_every_platform(platform, path, full):
    """cuDNN's gradient has none; a TPU's kernels have, as all of its operations."""
    chosen = choose_path("auto", SHAPE, 4, jnp.bfloat16, platform, deterministic=True)
    of_patches = choose_full_path("auto", (8, 400, 12, 64), jnp.bfloat16, platform, deterministic=True)
    assert (chosen.path, of_patches.path) == (path, full)
    assert platform != "gpu" or (chosen.reason == of_patches.reason and "compute.deterministic" in chosen.reason)
    with pytest.raises(UserError, match=r"attention cudnn cannot run here: .*; auto takes a path that can"):
        choose_path("cudnn", SHAPE, 4, jnp.bfloat16, platform, deterministic=True)


def test_a_path_asked_for_where_it_cannot_run():
    with pytest.raises(UserError, match=r"compute\.attention splash cannot run here: this is a cpu; auto takes"):
        choose_path("splash", SHAPE, 4, jnp.bfloat16, "cpu")
    with pytest.raises(UserError, match=r"compute\.attention cudnn cannot run here: it takes bfloat16"):
        choose_path("cudnn", SHAPE, 4, jnp.float32, "gpu")


def main():
    """In a process with eight devices: `grouped`, cut as a fused path is, against the reference; prints errors."""
    from minimind_jax.config.sections import MeshConfig
    from minimind_jax.model.attention import _grouped

    grouped = functools.partial(_grouped, platform="cpu")
    from minimind_jax.sharding import batch_sharding, make_mesh

    inputs, segment_ids_BT = make_inputs(8, 16, 4, 2, 8), make_segments(8, 16)
    report = {}

    def total(function, *inputs):
        out_BTNH = function(*inputs)
        return jnp.sum(out_BTNH * jnp.sin(out_BTNH)), out_BTNH

    gradient = jax.grad(total, argnums=(1, 2, 3), has_aux=True)
    for sizes in ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 4, "expert": 2}, {"data": 1, "fsdp": 8}):
        mesh = make_mesh(MeshConfig(**sizes))
        for ids in (segment_ids_BT, None):

            def cut(*qkv, mesh=mesh, ids=ids):
                with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                    return fused.on_mesh(grouped, jax.sharding.get_abstract_mesh())(*qkv, ids)

            actual = jax.jit(functools.partial(gradient, cut))(*jax.device_put(inputs, batch_sharding(mesh)))
            whole = functools.partial(attention, segment_ids_BT=ids, path="reference")
            expected = jax.jit(functools.partial(gradient, whole))(*inputs)
            errors = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), actual, expected)
            report[f"{sizes} {ids is None}"] = max(jax.tree.leaves(errors))
    print(json.dumps(report))


def test_fused_paths_on_a_mesh_give_what_one_device_gives():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, timeout=600,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report) == 6 and max(report.values()) < 1e-4, report


if __name__ == "__main__":
    main()

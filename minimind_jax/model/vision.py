"""Images as tokens: a SigLIP tower, a projector, and the splice that puts images in the places of their markers.

    I images of a row    C 3 channels    P patches of an image    W width of the tower    M image tokens of a row

A batch that has images holds, beside the arrays of its texts,

    pixels    uint8 (B, I, image_size, image_size, C): the pictures of each row, resized; what is behind a row's own is
              never looked at, and may be zeros
    features  (B, I, P, W), in place of pixels: what `features` made of them before, of a tower that is frozen

An image stands among a row's tokens as `Vision.image_tokens` markers. The markers of a row, counted from its beginning
through all its documents, are those of its images in order: the first `image_tokens` are image 0 wherever they stand,
so that images may follow one another directly. A row may end within an image. A marker beyond the row's I images is
the ordinary token. A batch without these arrays is one of texts.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from minimind_jax.model.attention import Choice, Path, choose_full_path, full_attention
from minimind_jax.model.config import ComputeConfig, Platform, TowerConfig, Vision
from minimind_jax.model.linear import multiply
from minimind_jax.sharding import ROW_AXES, current_mesh

Params = dict[str, Any]

VISION = "vision"  # the branch of a model's parameters: {"tower": ..., "projector": ...}
CHANNELS = 3
IMAGES_AT_ONCE = 8  # that a device looks at; so many are skipped at once where a batch has no more
PROJECTOR_EPS = 1e-5  # of the norm of `minimind_v`

_ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


# Parameters -----------------------------------------------------------------------------------------------------------


class _Leaf(NamedTuple):
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]

    def stacked(self, layers: int) -> "_Leaf":
        return _Leaf((layers, *self.shape), ("layers", *self.axes))


def _is_leaf(node: Any) -> bool:
    return isinstance(node, _Leaf)


def _linear(inputs: int, outputs: int, axes: tuple[str | None, str | None] = ("embed", None)) -> Params:
    return {"kernel": _Leaf((inputs, outputs), axes), "bias": _Leaf((outputs,), (None,))}


def _norm(width: int) -> Params:
    return {"scale": _Leaf((width,), (None,)), "bias": _Leaf((width,), (None,))}


def _tower_leaves(tower: TowerConfig) -> Params:
    W, F = tower.hidden_size, tower.intermediate_size
    layer = {
        "norm1": _norm(W),
        **{name: _linear(W, W) for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
        "norm2": _norm(W),
        "fc1": _linear(W, F),
        "fc2": _linear(F, W, (None, "embed")),
    }
    return {
        "patch": _linear(tower.patch_size**2 * CHANNELS, W, (None, "embed")),
        "position": {"embedding": _Leaf((tower.grid**2, W), (None, "embed"))},
        "layers": jax.tree.map(lambda leaf: leaf.stacked(tower.num_hidden_layers), layer, is_leaf=_is_leaf),
        "post_norm": _norm(W),
    }


def _leaves(vision: Vision, width: int) -> Params:
    inputs = vision.tower.hidden_size * vision.pixel_shuffle**2
    projector = {"linear_1": _linear(inputs, width), "linear_2": _linear(width, width)}
    if vision.projector == "minimind_v":
        projector = {"norm": _norm(inputs), **projector}
    return {"tower": _tower_leaves(vision.tower), "projector": projector}


def init_vision(vision: Vision, width: int, std: float, key: Array) -> Params:
    """Fresh parameters beside a language model of that width: N(0, std) for matrices, 1 for norms, 0 for biases."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(_leaves(vision, width), is_leaf=_is_leaf)

    def draw(path, leaf, key):
        if path[-1].key in ("kernel", "embedding"):
            return std * jax.random.normal(key, leaf.shape, jnp.float32)
        return jnp.full(leaf.shape, float(path[-1].key == "scale"), jnp.float32)

    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(tree, [draw(*leaf, key) for leaf, key in zip(leaves, keys, strict=True)])


def empty_tower(tower: TowerConfig) -> Params:
    """NumPy arrays to be filled with the parameters of a tower."""
    return jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), _tower_leaves(tower), is_leaf=_is_leaf)


def vision_axes(vision: Vision) -> Params:
    """Logical axes of `init_vision`."""
    return jax.tree.map(lambda leaf: leaf.axes, _leaves(vision, 1), is_leaf=_is_leaf)


# The tower and the projector ------------------------------------------------------------------------------------------


def tower_path(tower: TowerConfig, compute: ComputeConfig, dtype: jnp.dtype, platform: Platform) -> Choice:
    """How a device's own patches attend to one another, of the paths that `compute` allows."""
    heads = tower.num_attention_heads
    queries = (IMAGES_AT_ONCE, tower.grid**2, heads, tower.hidden_size // heads)
    return choose_full_path(compute.attention, queries, dtype, platform, compute.deterministic)


def features(
    vision: Vision, tower: Params, pixels_NHWC: Array, dtype: jnp.dtype, platform: Platform, path: Path = "reference"
) -> Array:
    """What the tower says of N images, (N, P, W) in `dtype`: for a projector to read.

    pixels_NHWC: uint8 as they are in a batch, or floats that were rescaled and normalised already. tower: its branch of
    the parameters. path: of `tower_path`; on a mesh only inside `jax.shard_map`.
    """
    config = vision.tower
    if pixels_NHWC.dtype == jnp.uint8:
        mean, std = (jnp.array(values, jnp.float32) for values in (config.image_mean, config.image_std))
        pixels_NHWC = (pixels_NHWC.astype(jnp.float32) * config.rescale_factor - mean) / std
    x_NPW = _apply(tower["patch"], _patches(config, pixels_NHWC).astype(dtype), platform)
    x_NPW += tower["position"]["embedding"].astype(dtype)
    layers = jax.tree.map(lambda leaf: leaf[: config.num_hidden_layers + 1 + vision.feature_layer], tower["layers"])
    with jax.named_scope("tower"):
        x_NPW, _ = jax.lax.scan(lambda x, layer: (_layer(config, layer, x, path, platform), None), x_NPW, layers)
    return x_NPW if vision.projector == "llava" else _normalise(tower["post_norm"], x_NPW, config.layer_norm_eps)


def project(vision: Vision, projector: Params, features_NPW: Array, dtype: jnp.dtype, platform: Platform) -> Array:
    """Tokens of images, (..., image_tokens, D) in `dtype`, from `features` (..., P, W)."""
    x = _shuffle(vision, features_NPW.astype(dtype))
    with jax.named_scope("projector"):
        if vision.projector == "minimind_v":
            x = _normalise(projector["norm"], x, PROJECTOR_EPS)
        x = _ACTIVATIONS[vision.projector_act](_apply(projector["linear_1"], x, platform))
        return _apply(projector["linear_2"], x, platform)


def _patches(tower: TowerConfig, pixels_NHWC: Array) -> Array:
    """(N, P, patch_size^2 * 3), row by row."""
    side, size = tower.grid, tower.patch_size
    cut = pixels_NHWC[:, : side * size, : side * size].reshape(-1, side, size, side, size, CHANNELS)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(len(pixels_NHWC), side**2, -1)


def _shuffle(vision: Vision, features: Array) -> Array:
    """Squares of s x s patches as one, its patches side by side, row by row: (..., P / s^2, s^2 W)."""
    side, s = vision.tower.grid, vision.pixel_shuffle
    lead, W = features.shape[:-2], features.shape[-1]
    squares = features.reshape(-1, side // s, s, side // s, s, W).transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(*lead, vision.image_tokens, s * s * W)


def _layer(tower: TowerConfig, layer: Params, x_NPW: Array, path: Path, platform: Platform) -> Array:
    """x + attention(norm(x)), then x + mlp(norm(x)); every patch sees all."""
    N, P, _ = x_NPW.shape
    y_NPW = _normalise(layer["norm1"], x_NPW, tower.layer_norm_eps)
    heads = (N, P, tower.num_attention_heads, -1)
    q, k, v = (_apply(layer[name], y_NPW, platform).reshape(heads) for name in ("q_proj", "k_proj", "v_proj"))
    x_NPW += _apply(layer["out_proj"], full_attention(q, k, v, path, platform).reshape(N, P, -1), platform)
    y_NPW = _normalise(layer["norm2"], x_NPW, tower.layer_norm_eps)
    hidden_NPF = _ACTIVATIONS[tower.hidden_act](_apply(layer["fc1"], y_NPW, platform))
    return x_NPW + _apply(layer["fc2"], hidden_NPF, platform)


def _apply(linear: Params, x: Array, platform: Platform) -> Array:
    return multiply(x, linear["kernel"], platform) + linear["bias"].astype(x.dtype)


def _normalise(norm: Params, x: Array, eps: float) -> Array:
    """(x - mean) / sqrt(variance + eps) * scale + bias, float32 inside."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    return (centred * inverse * norm["scale"] + norm["bias"]).astype(x.dtype)


# Rows -----------------------------------------------------------------------------------------------------------------


def splice(x_BTD: Array, is_marker_BT: Array, images_BMD: Array) -> Array:
    """The rows with the n-th image token of each in the place of its n-th marker, one gather for all."""
    rank_BT = jnp.cumsum(is_marker_BT, axis=1) - 1
    M = images_BMD.shape[1]
    seen_BTD = jnp.take_along_axis(images_BMD, jnp.clip(rank_BT, 0, M - 1)[:, :, None], axis=1)
    return jnp.where((is_marker_BT & (rank_BT < M))[:, :, None], seen_BTD.astype(x_BTD.dtype), x_BTD)


def row_features(
    vision: Vision,
    tower: Params,
    pixels_BIHWC: Array,
    is_marker_BT: Array,
    dtype: jnp.dtype,
    platform: Platform,
    compute: ComputeConfig,
) -> Array:
    """`features` of the images of rows, (B, I, P, W); zeros for those that no marker stands for, which the tower does
    not look at. Each device has its own rows."""
    path = tower_path(vision.tower, compute, dtype, platform).path
    count_B = -(-jnp.sum(is_marker_BT, axis=1) // vision.image_tokens)

    def look(tower, pixels_BIHWC, count_B):
        B, I = pixels_BIHWC.shape[:2]  # noqa: E741
        pixels_NHWC = pixels_BIHWC.reshape(B * I, *pixels_BIHWC.shape[2:])
        is_own_N = (jnp.arange(I) < count_B[:, None]).reshape(-1)
        order_N = jnp.argsort(~is_own_N, stable=True)  # what there is to see comes first
        size = min(IMAGES_AT_ONCE, B * I)
        blocks = math.ceil(B * I / size)
        shape = (size, vision.tower.grid**2, vision.tower.hidden_size)

        def block(_, item):
            number, indices = item
            encode = lambda: features(vision, tower, pixels_NHWC[indices], dtype, platform, path)  # noqa: E731
            is_needed = number * size < jnp.sum(is_own_N)
            return None, jax.lax.cond(is_needed, encode, lambda: jnp.zeros(shape, dtype))

        indices = jnp.pad(order_N, (0, blocks * size - B * I)).reshape(blocks, size)
        # A tower that is trained keeps the values of one block, not of all that there is room for.
        _, found = jax.lax.scan(jax.checkpoint(block, prevent_cse=False), None, (jnp.arange(blocks), indices))
        found_NPW = found.reshape(-1, *shape[1:])[jnp.argsort(order_N)]
        return jnp.where(is_own_N[:, None, None], found_NPW, 0).reshape(B, I, *shape[1:])

    if current_mesh() is not None:
        rows = PartitionSpec(ROW_AXES)
        look = jax.shard_map(look, in_specs=(PartitionSpec(), rows, rows), out_specs=rows, check_vma=False)
    return look(tower, pixels_BIHWC, count_B)

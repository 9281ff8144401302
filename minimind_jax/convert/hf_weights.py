"""Tensors of a Qwen3 or Qwen3-MoE checkpoint and the parameters of a model: one table of names, used both ways.

torch's Linear weights are (out, in), the kernels here (in, out) and stacked over layers (and experts); the rotary
embedding is the same half-split one, so nothing else changes.
"""

import dataclasses
import functools
import operator
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minimind_jax.convert.vision_weights import vision_tensors
from minimind_jax.errors import UserError
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.heads import SCORE
from minimind_jax.model.transformer import LanguageModel, Params
from minimind_jax.model.vision import VISION
from minimind_jax.texts import listed, read_object, write_json

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

_LAYER_TENSORS = {
    "input_layernorm.weight": ("input_norm", "scale"),
    "self_attn.q_proj.weight": ("attention", "q_proj", "kernel"),
    "self_attn.k_proj.weight": ("attention", "k_proj", "kernel"),
    "self_attn.v_proj.weight": ("attention", "v_proj", "kernel"),
    "self_attn.o_proj.weight": ("attention", "o_proj", "kernel"),
    "self_attn.q_norm.weight": ("attention", "q_norm", "scale"),
    "self_attn.k_norm.weight": ("attention", "k_norm", "scale"),
    "post_attention_layernorm.weight": ("post_attention_norm", "scale"),
}
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_MLP_TENSORS = {f"mlp.{name}.weight": ("mlp", name, "kernel") for name in _PROJECTIONS}
_ROUTER_TENSORS = {"mlp.gate.weight": ("mlp", "router", "kernel")}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint that is read when it is needed."""

    shape: tuple[int, ...]
    dtype: str  # a key of `DTYPES`
    read: Callable[[Any], np.ndarray]  # of an index what `array[index]` is, in that dtype; `...` for the whole array

    def equals(self, other: "StoredTensor") -> bool:
        return self.shape == other.shape and np.array_equal(self.read(...), other.read(...))


def hf_tensors(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """Every tensor of the checkpoint under its Hugging Face name and in torch's layout, without a copy; of a model with
    a head of scores (see `model.heads`) that head in place of the language model's.

    The values are views of `params`, writable if those are NumPy arrays. There is no `lm_head.weight` in a tied model.
    """
    host = jax.tree.map(np.asarray, params)
    layers = host["layers"]
    tensors = {"model.embed_tokens.weight": host["embed"]["embedding"]}
    names = _LAYER_TENSORS | (_ROUTER_TENSORS if config.is_moe else _MLP_TENSORS)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name, path in names.items():
            array = functools.reduce(operator.getitem, path, layers)[layer]
            tensors[f"{prefix}.{name}"] = array.T if path[-1] == "kernel" else array
        for expert in range(config.num_experts):
            for name in _PROJECTIONS:
                kernel_DF = layers["mlp"]["experts"][name]["kernel"][layer, expert]
                tensors[f"{prefix}.mlp.experts.{expert}.{name}.weight"] = kernel_DF.T
    tensors["model.norm.weight"] = host["norm"]["scale"]
    if SCORE in host:
        tensors["score.weight"] = host[SCORE]["kernel"].T
    elif not config.tie_word_embeddings:
        tensors["lm_head.weight"] = host["lm_head"]["kernel"].T
    return tensors if config.vision is None else tensors | vision_tensors(host[VISION])


def read_params(config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> Params:
    """Parameters in float32 (NumPy arrays on the host) from `matching_tensors`."""
    params = _empty_params(config, tensors)
    for name, view in hf_tensors(config, params).items():
        view[...] = tensors[name].read(...)
    return params


def matching_tensors(config: ModelConfig, stored: Mapping[str, StoredTensor], where: str) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint under the names of `hf_tensors`, in that order; none is read yet.

    5.x's fused expert tensors are taken apart. A tied model may come with an `lm_head.weight` if it equals the
    embedding, as MiniMind's files do.

    Raises UserError: tensors are missing or left over, or have another shape than the configuration says.
    """
    stored = _unfuse_experts(stored)
    expected = {name: view.shape for name, view in hf_tensors(config, _empty_params(config, stored)).items()}
    if config.tie_word_embeddings and "lm_head.weight" in stored:
        head, embedding = stored.pop("lm_head.weight"), stored.get("model.embed_tokens.weight")
        if embedding is not None and not head.equals(embedding):
            raise UserError(
                f"{where}: tie_word_embeddings is true but lm_head.weight differs from model.embed_tokens.weight; "
                "set tie_word_embeddings to false"
            )
    check_names_and_shapes(expected, stored, where)
    return {name: stored[name] for name in expected}


def _empty_params(config: ModelConfig, stored: Mapping[str, StoredTensor]) -> Params:
    """Parameters to be filled, with a head of scores where the checkpoint has one."""
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), LanguageModel(config).abstract_params())
    if "score.weight" in stored:
        params[SCORE] = {"kernel": np.empty(stored["score.weight"].shape[::-1], np.float32)}
    return params


def check_names_and_shapes(expected: Mapping[str, tuple], stored: Mapping[str, StoredTensor], where: str) -> None:
    """Raises UserError, with a few of them, for tensors that are missing, left over, or of another shape."""
    missing, unexpected = expected.keys() - stored.keys(), stored.keys() - expected.keys()
    problems = [f"missing tensors: {listed(sorted(missing), 4)}"] if missing else []
    problems += [f"unexpected tensors: {listed(sorted(unexpected), 4)}"] if unexpected else []
    problems += [
        f"{name} has shape {stored[name].shape}, the configuration says {shape}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ][:4]
    if problems:
        raise UserError(f"{where}: the weights are not those of this configuration; {'; '.join(problems)}")


def _unfuse_experts(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Per-expert tensors for `experts.gate_up_proj` (E, 2I, H; gate rows first) and `experts.down_proj` (E, H, I)."""
    result = {}
    for name, tensor in stored.items():
        fused = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
        if not fused:
            result[name] = tensor
            continue
        prefix, kind = fused.groups()
        if len(tensor.shape) != 3 or (kind == "gate_up_proj" and tensor.shape[1] % 2):
            raise UserError(f"{name} has shape {tensor.shape}; fused experts have three axes, gate and up of one size")
        experts, rows, columns = tensor.shape
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        size = rows // len(parts)
        for expert in range(experts):
            for part, projection in enumerate(parts):
                index = (expert, slice(part * size, (part + 1) * size))
                result[f"{prefix}.{expert}.{projection}.weight"] = _part(tensor, index, (size, columns))
    return result


def _part(tensor: StoredTensor, index: tuple, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(shape, tensor.dtype, lambda inner: tensor.read(index)[inner])


def finite(place: str, read: Callable[[Any], np.ndarray]) -> Callable[[Any], np.ndarray]:
    """`read`, which raises UserError for NaN and infinity: a model with one of them answers nothing, and has no loss
    from the first step on. place: file and tensor."""

    def checked(index: Any) -> np.ndarray:
        array = read(index)
        if not np.isfinite(array).all():
            raise UserError(
                f"{place} holds numbers that are infinite or none (NaN): its training went wrong, or the file is "
                "damaged; take an earlier checkpoint of it, or download it again"
            )
        return array

    return checked


def cast(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """`array` as a contiguous array of `dtype`; UserError if float16 cannot hold it."""
    with np.errstate(over="ignore"):
        result = np.ascontiguousarray(array, DTYPES[dtype])
    if dtype == "float16" and not np.isfinite(result).all() and np.isfinite(array).all():
        raise UserError(f"{name} has values beyond float16's range (65504); export bfloat16 or float32 instead")
    return result


def write_safetensors(folder: Path, tensors: Mapping[str, np.ndarray], dtype: str, max_shard_bytes: float):
    """`model.safetensors`, or numbered shards with an index if the whole is larger than `max_shard_bytes`.

    One shard is converted to `dtype` and written at a time. Raises UserError for an unknown dtype.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; it must be {', '.join(DTYPES)}")
    plan = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda array: array.size * np.dtype(DTYPES[dtype]).itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in plan.filename_to_tensors.items():
        converted = {name: cast(name, tensors[name], dtype) for name in names}
        save_file(converted, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def read_shards(index: Path, read: Callable[[Path], Mapping[str, "StoredTensor"]]) -> dict[str, "StoredTensor"]:
    """The tensors of the files that an index names, beside it."""
    folder = index.parent
    weight_map = read_object(index, "download it again").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index}: not an index of shards: weight_map is no object of file names; download it again")
    result = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).exists():
            raise UserError(f"{folder / file}: no such file, but {index.name} names it; download it again")
        result |= {name: tensor for name, tensor in read(folder / file).items() if weight_map.get(name) == file}
    return result


def read_safetensors_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. Raises UserError when it is damaged or holds another type than those in `DTYPES`."""
    result = {}
    try:
        file = safe_open(path, framework="numpy")
        for name in file.keys():
            described = file.get_slice(name)
            dtype = described.get_dtype()
            if dtype not in _SAFETENSORS_DTYPES:
                raise UserError(f"{path}: {name} is stored as {dtype}; only F32, BF16 and F16 are supported")
            read = finite(f"{path}: {name}", described.__getitem__)
            result[name] = StoredTensor(tuple(described.get_shape()), _SAFETENSORS_DTYPES[dtype], read)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: not a complete safetensors file ({error}); export or download it again (in a clone: git lfs pull)"
        ) from error
    return result

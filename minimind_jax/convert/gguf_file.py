"""A GGUF file as such: the `gguf` package writes it, and of its tensors one at a time is read, encoded and written."""

import contextlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from minimind_jax.convert.hf_weights import cast
from minimind_jax.errors import UserError

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}  # ours and llama.cpp's
FILE_TYPES = {"float32": 0, "float16": 1, "q8_0": 7, "bfloat16": 32}


class Tensor(NamedTuple):
    """A tensor of the file: read gives it in any float dtype, when it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def plan_tensor(name: str, shape: tuple[int, ...], dtype: str, read: Callable[[Any], np.ndarray]) -> Tensor:
    """llama.cpp wants vectors, positions and the router in float32; Q8_0 has blocks of 32 numbers of a row."""
    if len(shape) == 1 or "ffn_gate_inp" in name or "position_embd" in name:
        dtype = "float32"
    elif dtype == "q8_0" and shape[-1] % 32:
        dtype = "float16"
    return Tensor(name, shape, dtype, lambda: read(...))


def write_gguf_file(
    path: Path, kind: gguf.MODEL_ARCH, describe: Callable[[gguf.GGUFWriter], None], tensors: Iterable[Tensor]
) -> None:
    """kind: of model, as llama.cpp knows it. describe: adds the metadata."""
    tensors = list(tensors)
    with contextlib.closing(gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[kind])) as writer:
        for tensor in tensors:
            encoding = gguf.GGMLQuantizationType[DTYPES[tensor.dtype]]
            size = math.prod(gguf.quant_shape_to_byte_shape(tensor.shape, encoding))
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, encoding)
        describe(writer)
        writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(encoded(tensor))


def encoded(tensor: Tensor) -> np.ndarray:
    """The numbers as they are in the file. Raises UserError where its dtype cannot hold them."""
    array = tensor.read()
    if tensor.dtype == "float16":
        return cast(tensor.name, array, "float16")
    array = np.ascontiguousarray(array, np.float32)
    if tensor.dtype == "q8_0" and not np.abs(array).max(initial=0) <= 127 * 65504:
        raise UserError(f"{tensor.name} has values beyond q8_0's range, or that are no numbers; write float32 instead")
    return gguf.quantize(array, gguf.GGMLQuantizationType[DTYPES[tensor.dtype]])

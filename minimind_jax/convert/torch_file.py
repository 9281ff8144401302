"""PyTorch files of tensors, read without running anything that is in them; and the weights of a folder, in any form."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minimind_jax.convert.hf_weights import DTYPES, StoredTensor, cast, finite, read_safetensors_file, read_shards
from minimind_jax.data.written import replacing_files
from minimind_jax.errors import UserError
from minimind_jax.shell import needing

_WRAPPERS = r"^(_orig_mod\.|module\.)*"  # what compilation and data parallelism put before the names


def read_torch(path: str | Path) -> dict[str, StoredTensor]:
    """The tensors of a state dict, or of the `model` in a file for resuming, under their plain names. Raises UserError:
    there is no such file, it holds anything but tensors and plain values, or torch is missing."""
    torch, path = _import_torch(), Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with open(path, "rb") as file:
        if not file.read(2).startswith((b"PK", b"\x80")):  # a zip archive, or a pickle as torch once saved
            raise UserError(f"{path}: not a PyTorch file; from-torch reads a state dict saved by torch.save")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused, because it holds more than tensors and plain values and could run code when loaded; "
            "save a state dict instead"
        ) from error
    except Exception as error:  # torch raises whatever a damaged file makes its reader raise
        raise UserError(f"{path}: not a complete PyTorch file ({error})") from error
    state = content.get("model", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise UserError(f"{path}: expected a state dict (names to tensors), or a dict with one under 'model'")
    return {re.sub(_WRAPPERS, "", name): _stored(name, tensor, path) for name, tensor in state.items()}


def read_weights(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a Hugging Face folder under the names of its files. Raises UserError where there are none."""
    # MiniMind writes its own architecture as the second.
    for name, read in (("model.safetensors", read_safetensors_file), ("pytorch_model.bin", read_torch)):
        if (folder / name).exists():
            return read(folder / name)
        if (index := folder / f"{name}.index.json").exists():
            return read_shards(index, read)
    raise UserError(
        f"{folder}: there are no weights: neither model.safetensors nor pytorch_model.bin, nor an index of their parts "
        "(model.safetensors.index.json)"
    )


def write_torch(path: str | Path, tensors: Mapping[str, np.ndarray], aliases: Mapping[str, str]):
    """A state dict in float16, replacing `path` when it is complete.

    aliases: further names of a tensor, stored once.
    """
    torch, path = _import_torch(), Path(path)
    if not path.name or path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file to write, such as model.pth")
    if path.exists() and path.stat().st_size and not zipfile.is_zipfile(path):  # what torch.save writes is a zip file
        raise UserError(f"{path} is there already and is no PyTorch file; choose another name")
    state = {name: torch.from_numpy(cast(name, array, "float16")) for name, array in tensors.items()}
    state |= {alias: state[name] for alias, name in aliases.items()}
    with replacing_files(path) as (partial,):
        try:
            torch.save(state, partial)
        except RuntimeError as error:  # how torch tells of a full disk
            raise OSError(str(error)) from error


def _import_torch() -> Any:
    with needing("PyTorch files need torch", "torch"):
        import torch
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        # CVE-2025-32434: before 2.6 a file could run code in spite of weights_only.
        raise UserError(f"torch {torch.__version__} cannot load files safely; pip install 'torch>=2.6'")
    return torch


def _stored(name: str, tensor: Any, path: Path) -> StoredTensor:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise UserError(f"{path}: {name} is {dtype}; only {', '.join(DTYPES)} are supported")

    def read(index: Any) -> np.ndarray:
        return tensor[index].float().numpy().astype(DTYPES[dtype], copy=False)

    return StoredTensor(tuple(tensor.shape), dtype, finite(f"{path}: {name}", read))

"""The file, or files, in which a folder has its weights."""

from pathlib import Path

from minimind_jax.convert.hf_weights import StoredTensor, read_safetensors
from minimind_jax.convert.torch_file import read_torch
from minimind_jax.errors import UserError


def read_weights(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a Hugging Face folder under the names of its files. Raises UserError where there are none."""
    if any((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        return read_safetensors(folder)
    if (folder / "pytorch_model.bin").exists():  # how MiniMind writes its own architecture
        return read_torch(folder / "pytorch_model.bin")
    raise UserError(f"{folder}: neither model.safetensors, model.safetensors.index.json nor pytorch_model.bin is there")

"""Hugging Face folders: the form in which every model here is stored, and that transformers loads as it is.

A folder holds `config.json`, `generation_config.json`, `model.safetensors` (or shards) and the tokenizer's files.
It appears, or replaces an older one, in one step when it is complete.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from minimind_jax.convert.hf_config import from_hf_config, to_generation_config, to_hf_config
from minimind_jax.convert.hf_weights import (
    StoredTensor,
    check_dtype,
    hf_tensors,
    params_from_hf,
    read_safetensors,
    write_safetensors,
)
from minimind_jax.convert.torch_file import read_torch
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.transformer import Params
from minimind_jax.paths import absolute, as_path, is_remote, local_folder, upload_folder

MAX_SHARD_BYTES = 5e9


def save_hf(
    folder: str | Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None = None,
    dtype: str = "bfloat16",
    max_shard_bytes: float = MAX_SHARD_BYTES,
    generation_config: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a model as a Hugging Face folder; an older model there is replaced only when the new one is complete.

    dtype: float32, bfloat16 or float16, of all tensors. tokenizer: its files are copied, and its ids of the begin, end
    and padding tokens go into the configuration. max_shard_bytes: larger weights are cut into several files.
    generation_config: sampling settings of the model this one comes from; None writes MiniMind's.
    Besides `params` about one shard is held in memory.

    Raises:
        UserError: the tokenizer has more tokens than the model, the folder holds something other than a model, a
            tensor does not fit float16, or the disk is full.
    """
    folder = as_path(folder)
    check_dtype(dtype)
    config = _with_token_ids(config, tokenizer)
    with _replacing(folder) as partial:
        _write_json(partial / "config.json", to_hf_config(config, dtype))
        _write_json(partial / "generation_config.json", to_generation_config(config, generation_config))
        if tokenizer is not None:
            tokenizer.save(partial)
            _make_readable_by_transformers_4(partial / "tokenizer_config.json")
        write_safetensors(partial, hf_tensors(config, params), dtype, max_shard_bytes)
    return folder


def load_hf(folder: str | Path) -> tuple[ModelConfig, Params]:
    """A Qwen3, Qwen3-MoE or MiniMind-3 folder as configuration and float32 parameters.

    The parameters are NumPy arrays on the host: put them where they are needed (`jax.device_put`) once.

    Raises:
        UserError: a file is missing or damaged, the model has a feature that is not supported, or its tensors are not
            those of its configuration.
    """
    config, stored = _open_hf(local_folder(as_path(folder)))
    return config, params_from_hf(config, stored, str(folder))


def from_hf(
    source: str | Path,
    output: str | Path,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    max_shard_bytes: float = MAX_SHARD_BYTES,
) -> ModelConfig:
    """Checks a Hugging Face folder and writes it anew in the form that every reader takes.

    dtype: None keeps the source's, so that every tensor stays the same bit for bit. tokenizer: a folder; None takes the
    source's. The source's generation settings are kept.
    """
    source, output = as_path(source), as_path(output)
    if absolute(source) == absolute(output):
        raise UserError(f"{output}: source and output are the same folder; choose another output")
    source = local_folder(source)
    config, stored = _open_hf(source)
    dtypes = {tensor.dtype for tensor in stored.values()}
    if dtype is None:
        dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    generation_file = source / "generation_config.json"
    save_hf(
        output,
        config,
        params_from_hf(config, stored, str(source)),
        Tokenizer.load(tokenizer or source),
        dtype,
        max_shard_bytes,
        generation_config=_read_json(generation_file) if generation_file.is_file() else None,
    )
    return config


def to_hf(
    run_or_folder: str | Path,
    output: str | Path,
    dtype: str = "bfloat16",
    max_shard_bytes: float = MAX_SHARD_BYTES,
) -> ModelConfig:
    """Writes a model, or the `model/` of a run's folder, again with another dtype or size of shards."""
    source = as_path(run_or_folder)
    if not (source / "config.json").is_file() and (source / "model" / "config.json").is_file():
        source = source / "model"
    return from_hf(source, output, dtype, max_shard_bytes=max_shard_bytes)


def _with_token_ids(config: ModelConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    if tokenizer is None:
        return config
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.folder} has {tokenizer.vocab_size} tokens, the model's vocab_size is "
            f"{config.vocab_size}; they do not belong together"
        )
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    return dataclasses.replace(config, **{name: token for name, token in ids.items() if token is not None})


def _make_readable_by_transformers_4(tokenizer_config: Path):
    """Undoes what transformers 5 writes when it saves a tokenizer anew and 4 cannot load: a class that 4 does not have,
    and a list where 4 wants a dict."""
    values = _read_json(tokenizer_config)
    if values.get("tokenizer_class") != "TokenizersBackend":
        return
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    _write_json(tokenizer_config, values)


def _open_hf(folder: Path) -> tuple[ModelConfig, dict[str, StoredTensor]]:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder / 'config.json'}: no such file; expected a Hugging Face model folder")
    config = from_hf_config(_read_json(folder / "config.json"), str(folder / "config.json"))
    if any((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        return config, read_safetensors(folder)
    if (folder / "pytorch_model.bin").exists():  # how MiniMind writes its own architecture
        return config, read_torch(folder / "pytorch_model.bin")
    raise UserError(f"{folder}: neither model.safetensors, model.safetensors.index.json nor pytorch_model.bin is there")


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place at the end, or vanishes if the body fails."""
    if is_remote(folder):
        with _uploading(folder) as partial:
            yield partial
        return
    folder = folder.resolve()  # through a link, and with a name of its own if it was given as "."
    if folder.exists() and not (folder.is_dir() and ((folder / "config.json").exists() or not any(folder.iterdir()))):
        raise UserError(f"{folder} exists and is not a model folder (no config.json); choose another output")
    partial, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not folder.exists():  # a kill between the two renames below
            old.rename(folder)
        partial.mkdir(parents=True)
        yield partial
        for file in partial.iterdir():
            _flush_to_disk(file)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        kept = "; the older model there is unchanged" if folder.exists() else ""
        raise UserError(f"{folder}: the model could not be written: {reason}{kept}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _uploading(folder: Path) -> Iterator[Path]:
    """An empty folder on this machine whose files replace those of `folder`, in an object store, at the end."""
    if folder.is_dir() and not (folder / "config.json").exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not a model folder (no config.json); choose another output")
    try:
        with tempfile.TemporaryDirectory(prefix="minimind-") as partial:
            yield Path(partial)
            upload_folder(Path(partial), folder, last="config.json")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: the model could not be written: {error}") from error


def _flush_to_disk(file: Path):
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def _write_json(path: Path, values: Mapping[str, Any]):
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

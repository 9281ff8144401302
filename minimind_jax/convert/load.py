"""A model from its folder, whatever kind it is: a Hugging Face folder, or a low-rank adapter over one."""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np

from minimind_jax.convert import hf
from minimind_jax.convert.hf_weights import StoredTensor, read_params
from minimind_jax.convert.minimind_v import is_minimind_v, open_minimind_v
from minimind_jax.convert.peft import load_peft, low_rank_pairs, read_adapter_config
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.folders import ADAPTER_CONFIG, holds_model, is_adapter, moved_with_run, resolve_model_folder
from minimind_jax.hub import is_hub_name
from minimind_jax.model.config import ModelConfig, union_of_ids
from minimind_jax.model.transformer import Params
from minimind_jax.paths import absolute, as_path, local_folder
from minimind_jax.texts import is_there, read_object


def read_config(folder: str | Path, base: str = "") -> ModelConfig:
    """The configuration of the model in a folder, or of the base model of the adapter in it (see `base_folder`)."""
    return hf.read_hf_config(folders_of(as_path(folder), base)[-1])


def load_merged(folder: str | Path, base: str = "") -> tuple[ModelConfig, Params]:
    """The model in a folder as configuration and float32 parameters (NumPy), with the adapter, if it is one, merged."""
    config, tensors = open_merged(folder, base)
    return config, read_params(config, tensors)


def open_merged(folder: str | Path, base: str = "") -> tuple[ModelConfig, dict[str, StoredTensor]]:
    """`load_merged` for what takes one tensor after another (see `open_hf`): each is merged when it is read."""
    folder = as_path(folder)
    if not is_adapter(folder):
        return hf.open_hf(folder)
    config, stored = hf.open_hf(base_folder(folder, base))
    adapter = load_peft(folder, config)
    for module, a, b, scale in low_rank_pairs(adapter.tree, adapter.table):
        kernel = stored[f"{module}.weight"]
        read = functools.partial(_read_merged, kernel, a, b, scale)
        stored[f"{module}.weight"] = StoredTensor(kernel.shape, "float32", read)
    return config, stored


def _read_merged(kernel: StoredTensor, a: np.ndarray, b: np.ndarray, scale: float, index: Any) -> np.ndarray:
    return (np.asarray(kernel.read(...), np.float32) + scale * (b @ a))[index]


def base_folder(adapter: Path, base: str = "") -> Path:
    """The folder of the model that an adapter belongs to: `base` (a folder or a run) if given, else what its
    configuration names. Raises UserError when it is not there, and for a folder that holds no adapter."""
    if not is_adapter(adapter):
        raise UserError(f"{adapter} holds no adapter (no {ADAPTER_CONFIG}, or a whole model beside it)")
    config = read_adapter_config(adapter)
    named = config["base_model_name_or_path"]
    for place in () if base else (as_path(named).expanduser(), adapter / named):
        if holds_model(place) and not is_adapter(place):
            return local_folder(place)
    moved = None if base else moved_with_run(named, adapter)
    if moved and holds_model(moved) and not is_adapter(moved):
        _tell_moved(named, adapter, moved)
        return moved
    try:
        revision = config.get("revision")
        asked = f"{named}@{revision}" if revision and is_hub_name(named) else named
        folder = resolve_model_folder(base or asked, "base")
    except UserError as error:
        if base:
            raise
        raise UserError(
            f"{adapter / ADAPTER_CONFIG}: the base model {named} is not there; put it there, change "
            f"base_model_name_or_path, or make a whole model with another copy of it: minimind convert merge-lora "
            f"{adapter} OUTPUT --base FOLDER ({error})"
        ) from error
    if is_adapter(folder):
        raise UserError(f"{folder} is an adapter itself; a base model must be whole")
    return folder


@functools.cache
def _tell_moved(named: str, adapter: Path, moved: Path) -> None:
    told = f"the base model {named} is not there; {moved} is taken, which was moved together with {adapter}"
    print(f"minimind: {told}", file=sys.stderr)


def load_tokenizer(folder: Path, other: str | Path | None = None, base: str = "") -> Tokenizer:
    """The tokenizer of a model: the one in its folder, for an adapter the one saved beside it or else its base's; or
    `other`, a folder. Raises UserError when there is none, or its words are not those of the whole model."""
    folder = local_folder(folder)
    if is_adapter(folder):
        beside = folder if (folder / "tokenizer.json").is_file() else None
        folder, other = base_folder(folder, base), other or beside
    if not (folder / "tokenizer.json").is_file():
        if other:
            return Tokenizer.load(other)  # nothing tells what the model's ids meant
        raise UserError(
            f"{folder} has no tokenizer (no tokenizer.json); give the one that the model was trained with: --tokenizer "
            "FOLDER, or copy its files there"
        )
    own = Tokenizer.load(folder)
    if not other:
        return own
    given = Tokenizer.load(other)
    given.check_same_words(own, f"the model {folder}")
    return given


def folders_of(folder: Path, base: str = "") -> list[Path]:
    """The folder of a model, and behind an adapter's that of its base."""
    return [folder, base_folder(folder, base)] if is_adapter(folder) else [folder]


def load_generation_settings(folder: Path, base: str = "") -> dict | None:
    """`generation_config.json` of a model: of its folder, or of its base for an adapter without one; None without."""
    files = (place / "generation_config.json" for place in folders_of(folder, base))
    return next((read_object(file) for file in files if is_there(file)), None)


def from_hf(
    source: str | Path,
    output: str | Path,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    max_shard_bytes: float = hf.MAX_SHARD_BYTES,
    vision: str | Path = "",
) -> ModelConfig:
    """Checks a Hugging Face folder and writes it anew in the form that every reader takes.

    dtype: None keeps the source's, so that every tensor stays the same bit for bit. tokenizer: a folder; None takes the
    source's. The source's generation settings are kept. vision: the folder of the tower of a MiniMind-V.
    """
    source, output = as_path(source), as_path(output)
    if absolute(source) == absolute(output):
        raise UserError(f"{output}: source and output are the same folder; choose another output")
    source = local_folder(source)
    if is_adapter(source):
        raise UserError(f"{source} is an adapter; minimind convert merge-lora makes a whole model of it")
    if vision and not is_minimind_v(source):
        raise UserError(f"--vision {vision} is for MiniMind-V's folders, and {source} is none; leave it out")
    config, tensors = open_minimind_v(source, vision) if is_minimind_v(source) else hf.open_hf(source)
    words = load_tokenizer(source, tokenizer)
    config = dataclasses.replace(config, eos_token_id=union_of_ids(config.eos_token_id, words.eos_id))
    hf.save_hf(
        output, config, read_params(config, tensors), words, dtype or hf.common_dtype(tensors), max_shard_bytes,
        generation_config=load_generation_settings(source), labels=hf.load_labels(source),
    )  # fmt: skip
    return config


def merge_lora(
    adapter: str | Path,
    output: str | Path,
    base: str = "",
    dtype: str | None = None,
    max_shard_bytes: float = hf.MAX_SHARD_BYTES,
) -> ModelConfig:
    """Writes an adapter and its base model as one Hugging Face folder.

    dtype: of the tensors; None keeps the base's. The sum is rounded once, so float32 keeps the merged model within
    rounding of the two.
    Raises UserError when the folder holds no adapter.
    """
    folder = as_path(adapter)
    whole = base_folder(folder, base)
    if absolute(as_path(output)) in (absolute(folder), absolute(whole)):
        raise UserError(f"{output} is the adapter's or the base model's own folder; choose another output")
    config, params = load_merged(folder, base)
    tokenizer = load_tokenizer(folder, base=base)
    config = dataclasses.replace(config, eos_token_id=union_of_ids(tokenizer.end_ids, config.eos_token_id))
    hf.save_hf(
        output, config, params, tokenizer, dtype or hf.stored_dtype(whole), max_shard_bytes,
        generation_config=load_generation_settings(folder, base),
    )  # fmt: skip
    return config

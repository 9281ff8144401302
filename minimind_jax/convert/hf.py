"""Hugging Face folders: the form in which every model here is stored, and that transformers loads as it is.

A folder holds `config.json`, `generation_config.json`, `model.safetensors` (or shards) and the tokenizer's files.
It appears, or takes an older one's place, when it is complete (see `convert.replace`).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from minimind_jax.convert import hf_vision, hf_weights
from minimind_jax.convert.hf_config import from_hf_config, head_config, read_labels, to_generation_config, to_hf_config
from minimind_jax.convert.hf_image_classifier import picture_config, picture_tensors
from minimind_jax.convert.replace import replacing
from minimind_jax.convert.torch_file import read_weights
from minimind_jax.convert.vision_weights import names_in_files, names_of_files
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.model.config import ModelConfig, TowerConfig, union_of_ids
from minimind_jax.model.transformer import Params
from minimind_jax.paths import as_path, local_folder
from minimind_jax.texts import is_there, read_object, write_json

MAX_SHARD_BYTES = 5e9


class Labels(NamedTuple):
    """Of a model with a head of scores: their names, and whether a text may have several of them.

    max_tokens: where longer texts were cut in training; tokenizer_config.json says so (model_max_length). None: unsaid.
    """

    names: tuple[str, ...]
    several: bool = False
    max_tokens: int | None = None


def save_hf(
    folder: str | Path,
    config: ModelConfig | TowerConfig,
    params: Params,
    tokenizer: Tokenizer | None = None,
    dtype: str = "bfloat16",
    max_shard_bytes: float = MAX_SHARD_BYTES,
    generation_config: Mapping[str, Any] | None = None,
    labels: Labels | None = None,
) -> Path:
    """Writes a model as a Hugging Face folder; an older model there is replaced only when the new one is complete, and
    files that are no model's stay.

    dtype: float32, bfloat16 or float16, of all tensors. tokenizer: its files are copied, and its ids of the begin, end
    and padding tokens go into the configuration. max_shard_bytes: larger weights are cut into several files.
    generation_config: sampling settings of the model this one comes from; None writes MiniMind's.
    labels: of the head of scores that `params` has; None for a language model. Of a tower it classifies pictures.
    Besides `params` about one shard is held in memory.

    Raises UserError: the tokenizer has more tokens than the model, `check_replaceable` refuses the folder, a tensor
    does not fit float16, or the disk is full.
    """
    folder = as_path(folder)
    if isinstance(config, TowerConfig):
        return _save_picture_classifier(folder, config, params, dtype, max_shard_bytes, labels)
    config = with_token_ids(config, tokenizer)
    if labels and config.vision is not None:
        raise UserError(f"{folder}: a classifier or reward model that sees cannot be written; train one of texts alone")
    with replacing(folder) as partial:
        described = to_hf_config(config, dtype) if config.vision is None else hf_vision.to_seeing_config(config, dtype)
        headed = head_config(described["model_type"], labels.names, labels.several) if labels else {}
        write_json(partial / "config.json", {**described, **headed})
        if not labels:
            write_json(partial / "generation_config.json", to_generation_config(config, generation_config))
        if tokenizer is not None:
            marker = None if config.vision is None else config.vision.marker_id
            tokenizer.save(partial, marker)
            _fit_tokenizer_config(partial / "tokenizer_config.json", config.max_position_embeddings, labels)
        tensors = hf_weights.hf_tensors(config, params)
        if config.vision is not None:
            hf_vision.write_processors(partial, config.vision, tokenizer)
            tensors = names_in_files(tensors)
        hf_weights.write_safetensors(partial, tensors, dtype, max_shard_bytes)
    return folder


def _save_picture_classifier(
    folder: Path, tower: TowerConfig, params: Params, dtype: str, max_shard_bytes: float, labels: Labels
) -> Path:
    with replacing(folder) as partial:
        write_json(partial / "config.json", picture_config(tower, labels.names, labels.several, dtype))
        hf_vision.write_image_processor(partial, tower)
        host = jax.tree.map(np.asarray, params)
        hf_weights.write_safetensors(partial, picture_tensors(host), dtype, max_shard_bytes)
    return folder


def load_hf(folder: str | Path) -> tuple[ModelConfig, Params]:
    """A Qwen3, Qwen3-MoE or MiniMind-3 folder, or one of a model that sees over such a one (see `hf_vision`), as
    configuration and float32 parameters.

    The parameters are NumPy arrays on the host: put them where they are needed (`jax.device_put`) once.

    Raises UserError: a file is missing or damaged, the model has a feature that is not supported, or its tensors are
    not those of its configuration.
    """
    config, tensors = open_hf(folder)
    return config, hf_weights.read_params(config, tensors)


def open_hf(folder: str | Path) -> tuple[ModelConfig, dict[str, hf_weights.StoredTensor]]:
    """`load_hf` for what takes one tensor after another: under the names of `hf_tensors`, read when it is needed."""
    place = local_folder(as_path(folder))
    config, stored = read_hf_config(place), read_weights(place)
    if config.vision is not None:
        stored = names_of_files(stored)
    return config, hf_weights.matching_tensors(config, stored, str(folder))


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raises UserError for a tokenizer with more tokens than a model."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.folder} has {tokenizer.vocab_size} tokens, more than the model's vocabulary of "
            f"{config.vocab_size}; they do not belong together, unless tokens were added: then train the model with "
            f"--model.vocab_size {tokenizer.vocab_size}, which adds rows drawn around the mean of the others"
        )


def with_token_ids(config: ModelConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    """The configuration with the tokenizer's begin, end and padding tokens; UserError where it has too many tokens."""
    if tokenizer is None:
        return config
    check_vocabulary(tokenizer, config)
    ends = config.eos_token_id if tokenizer.eos_id in config.end_ids else union_of_ids(tokenizer.end_ids)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends, "pad_token_id": tokenizer.pad_id}
    return dataclasses.replace(config, **{name: token for name, token in ids.items() if token is not None})


def _fit_tokenizer_config(file: Path, context: int, labels: Labels | None):
    """Undoes what transformers 5 writes when it saves a tokenizer anew and 4 cannot load (a class that 4 does not have,
    and a list where 4 wants a dict), and says where texts are cut: at their end, as transformers' pipeline does with
    truncation; conversations at their beginning. A language model reads its whole context, though its tokenizer may
    come from a classifier of short texts, and is padded on the left: what it writes follows the last token of a row."""
    given = read_object(file)
    values = {**given, "padding_side": "right" if labels else "left"}
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(values.get("extra_special_tokens"), list):
            values["additional_special_tokens"] = values.pop("extra_special_tokens")
    said = values.get("model_max_length")
    limit = labels.max_tokens if labels else context if isinstance(said, int) and said < context else None
    if limit:
        side = "left" if labels and len(labels.names) == 1 else "right"
        values |= {"model_max_length": limit, "truncation_side": side}
    if values != given:
        write_json(file, values)


def read_hf_config(folder: str | Path) -> ModelConfig:
    """The configuration of a Hugging Face folder. Raises UserError when it has none, or one that is not supported."""
    file = local_folder(as_path(folder)) / "config.json"
    if not is_there(file):
        raise UserError(f"{file}: no such file; expected a Hugging Face model folder")
    values = read_object(file)
    sees = hf_vision.sees(values)
    return hf_vision.read_seeing_config(values, file.parent) if sees else from_hf_config(values, str(file))


def stored_dtype(folder: str | Path) -> str:
    """The dtype of a model's tensors in its folder; float32 where they have several."""
    return common_dtype(open_hf(folder)[1])


def common_dtype(tensors: Mapping[str, hf_weights.StoredTensor]) -> str:
    """The dtype of all tensors; float32 where they have several."""
    dtypes = {tensor.dtype for tensor in tensors.values()}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def load_labels(folder: str | Path) -> Labels | None:
    """Of the model with a head of scores in a folder; None for a language model."""
    folder = local_folder(as_path(folder))
    found = read_labels(read_object(folder / "config.json"))
    if found is None:
        return None
    file = folder / "tokenizer_config.json"
    limit = read_object(file).get("model_max_length") if is_there(file) else None
    return Labels(*found, max_tokens=limit if isinstance(limit, int) and limit > 0 else None)

"""MiniMind's `.pth` files: state dicts in float16 whose names are Qwen3's already, without a configuration.

Shapes tell most of the architecture. What they do not tell (how many experts a token takes, rotary theta, the norms'
epsilon) is MiniMind's default unless it is given.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minimind_jax.convert.hf import MAX_SHARD_BYTES, save_hf
from minimind_jax.convert.hf_weights import StoredTensor, hf_tensors, matching_tensors, read_params
from minimind_jax.convert.load import load_merged
from minimind_jax.convert.minimind_v import MARKER, MARKER_ID, has_projector, with_tower
from minimind_jax.convert.torch_file import read_torch, write_torch
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError, explained
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.heads import SCORE


def from_torch(
    pth: str | Path,
    output: str | Path,
    tokenizer: str | Path | None,
    dtype: str = "float16",
    max_shard_bytes: float = MAX_SHARD_BYTES,
    overrides: Mapping[str, Any] | None = None,
    vision: str | Path = "",
) -> None:
    """Writes the Hugging Face folder of a MiniMind `.pth` (weights or a file for resuming), loaded safely.

    tokenizer: a folder with tokenizer.json, such as MiniMind's `model/`. dtype: of the written tensors; float16 keeps
    MiniMind's bit for bit. overrides: fields of `ModelConfig` that the shapes do not tell. vision: the folder of the
    tower of a MiniMind-V.

    Raises UserError: the file is no state dict of such a model, or torch is missing.
    """
    stored = read_torch(pth)
    config = infer_config(stored, str(pth), overrides or {})
    words = None if tokenizer is None else Tokenizer.load(tokenizer)
    if has_projector(stored):
        marker_id = MARKER_ID if words is None else words.vocabulary().get(MARKER, MARKER_ID)
        config, tensors = with_tower(config, stored, vision, marker_id, str(pth))
    else:
        if vision:
            raise UserError(f"--vision {vision} is for MiniMind-V's files, and {pth} has no projector; leave it out")
        tensors = matching_tensors(config, stored, str(pth))
    save_hf(output, config, read_params(config, tensors), words, dtype, max_shard_bytes)


def to_torch(folder: str | Path, pth: str | Path) -> None:
    """Writes the float16 state dict that MiniMind's own code loads strictly, `lm_head.weight` of a tied model included.

    An adapter is merged. The file has no configuration: MiniMind's scripts must be told what is not their default.
    """
    config, params = load_merged(folder)
    if SCORE in params:
        raise UserError(f"{folder} is a classifier or reward model, which MiniMind's scripts cannot load")
    if config.vision is not None:
        raise UserError(f"{folder} is a model that sees, which is written as a Hugging Face folder only")
    aliases = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
    write_torch(pth, hf_tensors(config, params), aliases)


def infer_config(stored: Mapping[str, StoredTensor], where: str, overrides: Mapping[str, Any]) -> ModelConfig:
    """The architecture that a MiniMind state dict has; `overrides` wins over what is inferred. Raises UserError: a
    tensor that tells a size is missing, as in MiniMind2, which has no query and key norms, or `overrides` has what such
    a model cannot have."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in stored:
            hint = "; MiniMind before version 3 has no q_norm and cannot be converted" if "q_norm" in name else ""
            raise UserError(f"{where}: no tensor {name}, so this is not a MiniMind-3 model{hint}")
        return stored[name].shape

    layer = "model.layers.0"
    vocab_size, hidden_size = shape("model.embed_tokens.weight")
    (head_dim,) = shape(f"{layer}.self_attn.q_norm.weight")
    layers = [int(match[1]) for name in stored if (match := re.match(r"model\.layers\.(\d+)\.", name))]
    head = stored.get("lm_head.weight")
    fields = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": 1 + max(layers),
        "num_attention_heads": shape(f"{layer}.self_attn.q_proj.weight")[0] // head_dim,
        "num_key_value_heads": shape(f"{layer}.self_attn.k_proj.weight")[0] // head_dim,
        "head_dim": head_dim,
        "tie_word_embeddings": head is None or head.equals(stored["model.embed_tokens.weight"]),
    }
    if f"{layer}.mlp.gate.weight" in stored:
        fields["num_experts"] = shape(f"{layer}.mlp.gate.weight")[0]
        fields["moe_intermediate_size"] = shape(f"{layer}.mlp.experts.0.gate_proj.weight")[0]
    else:
        fields["intermediate_size"] = shape(f"{layer}.mlp.gate_proj.weight")[0]
    if "num_experts_per_tok" in overrides and "num_experts" not in fields:
        raise UserError(f"{where}: num_experts_per_tok is given, but the model has no experts; leave it out")
    with explained(where, TypeError, ValueError):
        return ModelConfig(**{**fields, **overrides})

"""GGUF files, which llama.cpp and all that is built on it (ollama, LM Studio, ...) load: models and low-rank adapters.

Names, layout and metadata are those of llama.cpp's own converter, which refuses every tokenizer that it has not been
told of. A model that sees is two files, of which `gguf_vision` writes the second.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from minimind_jax.convert import load
from minimind_jax.convert.gguf_file import FILE_TYPES, Tensor, plan_tensor, write_gguf_file
from minimind_jax.convert.gguf_tokenizer import gguf_words
from minimind_jax.convert.gguf_vision import check_seen_alike, write_mmproj
from minimind_jax.convert.hf import load_labels, stored_dtype, with_token_ids
from minimind_jax.convert.hf_config import to_generation_config
from minimind_jax.convert.hf_weights import StoredTensor, hf_tensors
from minimind_jax.convert.ollama import is_as_written, modelfile
from minimind_jax.convert.peft import load_peft, low_rank_pairs
from minimind_jax.convert.vision_weights import PROJECTOR, TOWER
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.data.written import replacing_files
from minimind_jax.errors import UserError
from minimind_jax.model.config import ModelConfig, RopeScaling, union_of_ids, yarn_attention_factor
from minimind_jax.model.heads import SCORE
from minimind_jax.model.transformer import Params
from minimind_jax.paths import as_path, local_folder


class Written(NamedTuple):
    """files: what was written, the GGUF file first. notes: what the user has to know of them."""

    files: list[Path]
    notes: list[str]


def to_gguf(
    folder: str | Path, output: str | Path, dtype: str | None = None, base: str = "", text_only: bool = False
) -> Written:
    """Writes the model in a Hugging Face folder, an adapter merged into its base model (see `write_gguf`).

    dtype: a key of DTYPES; None keeps that of the folder's tensors. base: of an adapter, see `load.base_folder`.
    """
    folder = as_path(folder)
    whole = load.folders_of(folder, base)[-1]
    if load_labels(whole) is not None:
        raise UserError(_without_head(str(folder)))
    config, tensors = load.open_merged(folder, base)
    return write_gguf(
        output, _name_of(folder), config, tensors, load.load_tokenizer(folder, base=base), dtype or stored_dtype(whole),
        load.load_generation_settings(folder, base), text_only,
    )  # fmt: skip


def params_to_gguf(
    output: str | Path,
    name: str,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    dtype: str,
    generation: Mapping[str, Any] | None,
    text_only: bool = False,
) -> Written:
    """`write_gguf` of parameters in memory. Raises UserError for a model with a head of scores."""
    if SCORE in params:
        raise UserError(_without_head(name))
    arrays = hf_tensors(config, params)
    tensors = {key: StoredTensor(array.shape, "float32", array.__getitem__) for key, array in arrays.items()}
    return write_gguf(output, name, config, tensors, tokenizer, dtype, generation, text_only)


def write_gguf(
    output: str | Path,
    name: str,
    config: ModelConfig,
    tensors: Mapping[str, StoredTensor],
    tokenizer: Tokenizer,
    dtype: str,
    generation: Mapping[str, Any] | None = None,
    text_only: bool = False,
) -> Written:
    """Writes a model as a GGUF file, the tower and projector of one that sees as another (mmproj-NAME.gguf), and a
    Modelfile for ollama beside them; older ones are replaced when all are whole.

    output: the file (NAME.gguf), or a folder for model.gguf. tensors: under the names of `hf_tensors`. dtype: a key of
    DTYPES; norms and a mixture's router are float32, and tower and projector float16 unless all is float32.
    generation: what generation_config.json has; None is MiniMind's. text_only: leave tower and projector out.
    Raises:
        UserError: llama.cpp would compute another model or split texts differently, a file of another kind is in the
            way, a tensor does not fit the dtype, or the disk is full.
    """
    file = _target(output, "model.gguf")
    mmproj = file.with_name(f"mmproj-{file.name}")
    beside = [] if text_only or config.vision is None else [_checked(mmproj)]
    recipe = file.with_name("Modelfile")
    if not is_as_written(_start_of(recipe, 2**20).decode(errors="replace")):
        raise UserError(f"{recipe} is there already, not as this program wrote it; move it, or choose another folder")
    config = with_token_ids(config, tokenizer)
    config = dataclasses.replace(config, eos_token_id=union_of_ids(tokenizer.end_ids, config.eos_token_id))
    notes = _check_computable(config, name)
    if text_only and config.vision is None:
        notes.append(f"{name} is a model of texts, with nothing for text_only to leave out")
    if beside:
        notes += check_seen_alike(config.vision, name)
    elif mmproj.exists():
        notes.append(f"{mmproj} is of another model; remove it, for some programs take it without being told to")
    words = gguf_words(tokenizer, config.vocab_size)
    planned = list(_model_tensors(config, tensors, dtype))
    notes += [*words.notes, *_notes_of_dtype(planned, dtype)]
    text, more = modelfile(
        [place.name for place in (file, *beside)], config, tokenizer, to_generation_config(config, generation)
    )
    notes += more
    if tokenizer.own_template:
        notes.append(
            "llama.cpp has a model think unless it is told not to (llama-server --reasoning off, or in a request "
            'chat_template_kwargs {"enable_thinking": false}); minimind chat does not'
        )

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(FILE_TYPES[dtype])
        _add_architecture(writer, config)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(words.pre)
        writer.add_token_list(words.tokens)
        writer.add_token_types(words.types)
        writer.add_token_merges(words.merges)
        notes.extend(_add_token_ids(writer, config, tokenizer, words.unknown_id))
        writer.add_chat_template(tokenizer.chat_template)

    with replacing_files(file, *beside, recipe) as (partial, *partial_beside, partial_recipe):
        write_gguf_file(partial, _architecture(config), describe, planned)
        for place in partial_beside:
            write_mmproj(place, name, config, tensors, "float32" if dtype == "float32" else "float16")
        partial_recipe.write_text(text, encoding="utf-8", newline="")
    return Written([file, *beside, recipe], notes)


def adapter_to_gguf(folder: str | Path, output: str | Path, dtype: str | None = None, base: str = "") -> Written:
    """Writes the adapter in a folder alone, for llama.cpp's --lora over its base model's GGUF file.

    output: the file (NAME.gguf), or a folder for adapter.gguf. dtype: None is float32. Layers may have scales of their
    own and llama.cpp knows one alpha, so what is left of each is in its B.
    """
    folder = as_path(folder)
    whole = load.base_folder(folder, base)
    if load_labels(whole) is not None:
        raise UserError(_without_head(str(whole)))
    file = _target(output, "adapter.gguf")
    config, dtype = load.read_config(folder, base), dtype or "float32"
    notes = _check_computable(config, str(whole)) + _notes_of_template(folder, whole)
    adapter = load_peft(folder, config)
    pairs = list(low_rank_pairs(adapter.tree, adapter.table))
    alpha = next((scale * len(a) for _, a, _, scale in pairs if scale), 1.0)
    names = _names(config)
    planned = [
        plan_tensor(f"{names(module)}.weight.lora_{part}", array.shape, dtype, array.__getitem__)
        for module, a, b, scale in pairs
        for part, array in (("a", a), ("b", b * np.float32(scale * len(a) / alpha)))
    ]

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_type("adapter")
        writer.add_name(_name_of(folder))
        writer.add_file_type(FILE_TYPES[dtype])
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)

    with replacing_files(file) as (partial,):
        write_gguf_file(partial, _architecture(config), describe, planned)
    notes += _notes_of_dtype(planned, dtype)
    return Written([file], notes)


# Where to, and whether ------------------------------------------------------------------------------------------------


def _target(output: str | Path, name: str) -> Path:
    """The file to write. Raises UserError where another kind of file would be written over."""
    if "://" in str(output):
        raise UserError(f"{output}: a GGUF file is written on a disk; choose a folder there and copy the file")
    output = Path(output)
    return _checked(output if output.suffix == ".gguf" and not output.is_dir() else output / name)


def _checked(file: Path) -> Path:
    """The file, which may be written. Raises UserError."""
    if _start_of(file, 4) not in (b"", b"GGUF"):
        raise UserError(f"{file} is there already and is no GGUF file; choose another name")
    return file


def _start_of(file: Path, size: int) -> bytes:
    """The first bytes of a file that may be written over; none where there is none. Raises UserError."""
    if not file.exists():
        return b""
    if file.is_dir():
        raise UserError(f"{file} is a folder; move it, or choose another output")
    if not file.stat().st_mode & 0o222:
        raise UserError(f"{file} may not be written over (read-only); make it writable (chmod u+w), or choose another")
    with open(file, "rb") as stream:
        return stream.read(size)


def _without_head(where: str) -> str:
    return (
        f"{where} is a reward model or classifier, and llama.cpp has none: it takes such a Qwen3 for a reranker of yes "
        "and no, of which the scores are others. Use the Hugging Face folder (minimind score, classify predict; "
        "transformers, vLLM)"
    )


def _check_computable(config: ModelConfig, where: str) -> list[str]:
    """What llama.cpp does otherwise within limits. Raises UserError for a model that it would compute otherwise."""
    if config.is_moe and not config.norm_topk_prob and config.num_experts_per_tok < config.num_experts:
        raise UserError(
            f"{where}: norm_topk_prob is false, and llama.cpp always divides the chosen experts' weights by their sum; "
            "use the Hugging Face folder"
        )
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "dynamic":
        context = config.rope_scaling.original_max_position_embeddings
        return [
            f"llama.cpp has no dynamic rope scaling; the context written is the {context} tokens up to which the model "
            "is the same without"
        ]
    return []


def _notes_of_template(adapter: Path, base: Path) -> list[str]:
    """An adapter's GGUF file has no template: its base's is taken."""
    places = [local_folder(place) for place in (adapter, base)]
    if not all((place / "tokenizer.json").is_file() for place in places):
        return []
    trained, taken = (Tokenizer.load(place).chat_template for place in places)
    if trained == taken:
        return []
    return [
        f"the adapter was trained with another chat template than {base} has; give llama.cpp "
        f"--jinja --chat-template-file {adapter / 'chat_template.jinja'}"
    ]


def _name_of(folder: Path) -> str:
    """Of a run the run's."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" and folder.parent.name else folder.name


# Tensors --------------------------------------------------------------------------------------------------------------


def _model_tensors(config: ModelConfig, tensors: Mapping[str, StoredTensor], dtype: str) -> Iterator[Tensor]:
    """Every tensor under llama.cpp's name, the experts of a layer stacked."""
    name_of = _names(config)
    for name, tensor in tensors.items():
        if name.startswith((TOWER, PROJECTOR)):
            continue
        module = name.removesuffix(".weight")
        expert = re.fullmatch(r"(.+\.experts)\.(\d+)\.(\w+)", module)
        if expert is None:
            yield plan_tensor(f"{name_of(module)}.weight", tensor.shape, dtype, tensor.read)
        elif expert[2] == "0":
            parts = [tensors[f"{expert[1]}.{e}.{expert[3]}.weight"] for e in range(config.num_experts)]
            shape = (len(parts), *tensor.shape)
            name = f"{name_of(f'{expert[1]}.{expert[3]}')}.weight"
            yield plan_tensor(name, shape, dtype, lambda index, parts=parts: np.stack([p.read(index) for p in parts]))


def _names(config: ModelConfig) -> Callable[[str], str]:
    """Hugging Face's name of a module as llama.cpp's."""
    return gguf.get_tensor_name_map(_architecture(config), config.num_hidden_layers).get_name


def _notes_of_dtype(planned: list[Tensor], dtype: str) -> list[str]:
    other = [tensor.name for tensor in planned if dtype == "q8_0" and tensor.dtype == "float16"]
    if not other:
        return []
    return [f"{len(other)} tensors, such as {other[0]}, are float16: q8_0 needs rows of a multiple of 32 numbers"]


# The file -------------------------------------------------------------------------------------------------------------


def _architecture(config: ModelConfig) -> gguf.MODEL_ARCH:
    return gguf.MODEL_ARCH.QWEN3MOE if config.is_moe else gguf.MODEL_ARCH.QWEN3


def _add_architecture(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    scaling = config.rope_scaling
    is_dynamic = scaling is not None and scaling.rope_type == "dynamic"
    writer.add_context_length(
        scaling.original_max_position_embeddings if is_dynamic else config.max_position_embeddings
    )
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if config.is_moe:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if scaling is not None and not is_dynamic:
        _add_scaling(writer, scaling)


def _add_scaling(writer: gguf.GGUFWriter, scaling: RopeScaling) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.rope_type))
    writer.add_rope_scaling_factor(scaling.factor)
    writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
    if scaling.rope_type == "yarn":  # llama.cpp multiplies by the paper's factor itself
        writer.add_rope_scaling_attn_factors(scaling.attention_factor / yarn_attention_factor(scaling.factor))
        writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)


def _add_token_ids(writer: gguf.GGUFWriter, config: ModelConfig, tokenizer: Tokenizer, unknown_id: int) -> list[str]:
    """The tokens with a role; says which ends of an answer llama.cpp is not told of: it has three names for them."""
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_unk_token_id(unknown_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    others = [i for i in config.end_ids if i != tokenizer.eos_id]
    for add, token in zip((writer.add_eot_token_id, writer.add_eom_token_id), others, strict=False):
        add(token)
    if len(others) > 2:
        return [f"llama.cpp has no name for {len(others) - 2} of the tokens that end an answer: ids {others[2:]}"]
    return []

"""What the training stages share: where a run starts from, what it writes at its end."""

import dataclasses
from pathlib import Path

import jax

from minimind_jax.config.sections import ModelSettings
from minimind_jax.config.stages import RunConfig
from minimind_jax.convert.load import (
    load_generation_settings,
    load_merged,
    read_config,
)
from minimind_jax.convert.load import load_tokenizer as load_model_tokenizer
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.folders import resolve_model_folder
from minimind_jax.model.config import ModelConfig, union_of_ids
from minimind_jax.model.heads import SCORE
from minimind_jax.model.lora import make_adapter
from minimind_jax.model.transformer import LanguageModel, Params
from minimind_jax.model.vocabulary import grow_vocabulary
from minimind_jax.runs.adapters import frozen_dtype, load_with_adapters, plan_adapters
from minimind_jax.seeds import named_key
from minimind_jax.sharding import (
    announce,
    init_params,
    make_mesh,
    param_shardings,
)
from minimind_jax.training.state import Parameters

# Fields of a model that decide the shapes of its tensors; a run cannot change them in a model it starts from.
SHAPE_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "tie_word_embeddings", "num_experts", "moe_intermediate_size"),
)


def load_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer of the run: `config.tokenizer`, or that of the model it starts from.

    Raises UserError when there is none, or its words are not those of the model.
    """
    if not config.tokenizer and not config.init_from:
        raise UserError(
            "a run from scratch needs a tokenizer: give --tokenizer FOLDER, or --init_from a model that has one"
        )
    if not config.init_from:
        return Tokenizer.load(config.tokenizer)
    return load_model_tokenizer(resolve_model_folder(config.init_from, "init_from"), config.tokenizer)


def start_generation(config: RunConfig) -> dict | None:
    """The generation settings of the model that the run starts from; None from scratch, or where it has none."""
    return load_generation_settings(resolve_model_folder(config.init_from)) if config.init_from else None


def build_model(config: RunConfig, tokenizer: Tokenizer) -> LanguageModel:
    """The network: that of `config.init_from`, or the preset from scratch, with the tokenizer's special ids.

    From scratch it has as many words as the tokenizer, unless model.vocab_size says another number.

    Raises UserError when the tokenizer has more tokens than the model, `config.model` sets another shape than init_from
    has, or adapters are asked for over more words than it has.
    """
    ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    if config.init_from:
        folder = resolve_model_folder(config.init_from, "init_from")
        architecture = read_config(folder)
        ends = union_of_ids(tokenizer.end_ids, architecture.eos_token_id)
        architecture = dataclasses.replace(architecture, **ids, eos_token_id=ends)
        architecture = with_settings(architecture, config.model, folder)
    else:
        size = {} if config.model.vocab_size else {"vocab_size": tokenizer.vocab_size}
        architecture = config.model.resolve(**ids, **size, eos_token_id=union_of_ids(tokenizer.end_ids))
    if tokenizer.vocab_size > architecture.vocab_size:
        rows = ", which adds rows drawn around the mean of the others" if config.init_from else ""
        raise UserError(
            f"the tokenizer {tokenizer.folder} has {tokenizer.vocab_size} tokens, more than the model's vocabulary of "
            f"{architecture.vocab_size}; set --model.vocab_size {tokenizer.vocab_size}{rows}, or take a tokenizer with "
            "fewer tokens"
        )
    if config.lora.rank and config.init_from and architecture.vocab_size > read_config(folder).vocab_size:
        raise UserError(
            f"model.vocab_size {architecture.vocab_size} is above the {read_config(folder).vocab_size} of the model "
            f"{folder}, and adapters train no embedding: train all weights with it first (sft or pretrain without "
            "lora.rank), then adapters over the model that comes out"
        )
    plan = plan_adapters(config, architecture)
    adapter = plan and make_adapter(plan.table, plan.dropout)
    return LanguageModel(architecture, config.compute, adapter)


def check_context(config: RunConfig, model: LanguageModel | ModelConfig) -> None:
    """Raises UserError for rows longer than the context that the exported model says it has."""
    architecture = model.config if isinstance(model, LanguageModel) else model
    context, seq_len = architecture.max_position_embeddings, config.data.seq_len
    if seq_len > context:
        raise UserError(
            f"data.seq_len {seq_len} is above the model's context of {context} tokens (model.max_position_embeddings); "
            f"set data.seq_len {context} or less, or model.max_position_embeddings {seq_len} to train a longer context"
        )


def say_if_endless(tokenizer: Tokenizer) -> None:
    """Says so where the chat template writes nothing behind an answer that could end it."""
    if tokenizer.turn_end_id is None:
        announce(
            f"warning: the chat template of {tokenizer.folder} writes no token behind an answer that only ends answers "
            "(or it is none of this tokenizer, as <|im_end|> may be): the model will not learn to stop; --stop TEXT of "
            "chat and generate ends answers, or add the token to the tokenizer and set --model.vocab_size"
        )


def with_settings(architecture: ModelConfig, settings: ModelSettings, folder: Path) -> ModelConfig:
    """`architecture` with the fields that `settings` sets; those that would change a tensor's shape must agree, and so
    must a preset's. Only more words are possible (see `model.vocabulary`)."""
    given = settings.changes(architecture.max_position_embeddings)
    described = settings.resolve() if settings.preset else None
    for name in SHAPE_FIELDS:
        asked, found = given.get(name, getattr(described, name, None)), getattr(architecture, name)
        if name == "vocab_size" and given.get(name, 0) > found:
            continue
        if asked is not None and asked != found:
            key = f"model.{name}" if name in given else f"model.preset {settings.preset}: its {name}"
            raise UserError(
                f"{key} is {asked}, but the model {folder} that init_from means has {found}; leave it out, or train "
                "from scratch"
            )
    return dataclasses.replace(architecture, **given)


def run_parameters(config: RunConfig, model: LanguageModel, has_head: bool = False) -> Parameters:
    """What the run trains: the parameters of `config.init_from`, or drawn from the seed, or adapters over them.

    has_head: init_from may be a model with a head of scores, which is left out.
    """
    mesh = make_mesh(config.mesh)
    if not config.init_from:
        return Parameters.of(model, lambda: init_params(model, named_key(config.seed, "init"), mesh))
    plan, dtype = plan_adapters(config, model.config), frozen_dtype(config, model)

    def load() -> Params:
        if plan is None:
            _, params = load_merged(resolve_model_folder(config.init_from, "init_from"))
            params = grow_vocabulary(params, model.config.vocab_size, named_key(config.seed, "new words"))
        else:
            params = load_with_adapters(config, plan, dtype)
        if SCORE in params and not has_head:
            raise UserError(f"init_from {config.init_from} is a classifier or reward model, and cannot write text")
        params = {name: tree for name, tree in params.items() if name in parameters.abstract}
        return jax.device_put(params, param_shardings(mesh, parameters.axes, parameters.abstract))

    parameters = Parameters.of(model, load, dtype)
    return parameters

"""What a run is made of, found once and passed down: its folders, tokenizer, network and mesh."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh

from minimind_jax.config.sections import ModelSettings
from minimind_jax.config.stages import RunConfig
from minimind_jax.convert.hf import Labels, load_hf, load_labels
from minimind_jax.convert.load import base_folder, load_merged, read_config
from minimind_jax.convert.load import load_tokenizer as load_model_tokenizer
from minimind_jax.data.batches import Batches, open_data
from minimind_jax.data.epoch import Annotate
from minimind_jax.data.labels import Classes
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.folders import is_adapter
from minimind_jax.model.config import ModelConfig, union_of_ids
from minimind_jax.model.heads import SCORE, head_axes, init_head
from minimind_jax.model.lora import init_adapters, join, make_adapter
from minimind_jax.model.transformer import LanguageModel, Params, cast_matrices
from minimind_jax.model.vocabulary import grow_vocabulary
from minimind_jax.runs.adapters import AdapterPlan, frozen_dtype, plan_adapters
from minimind_jax.runs.kind import StageKind
from minimind_jax.runs.labels import differing
from minimind_jax.seeds import named_key
from minimind_jax.sharding import announce, data_process, init_params, param_shardings
from minimind_jax.training.run import RunFolder
from minimind_jax.training.state import Parameters

# Fields of a model that decide the shapes of its tensors; a run cannot change them in a model it starts from.
SHAPE_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "tie_word_embeddings", "num_experts", "moe_intermediate_size"),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a stage.

    config: its settings, once the run has begun with a value for everything that they left open. models: the folders of
    the models that they name, by setting. model: the network, below a head of scores if the stage has one. adapters:
    None where all weights are trained. labels: of that head, and classes: how records name them, where the data has
    them.
    """

    kind: StageKind
    config: RunConfig
    folder: RunFolder
    mesh: Mesh
    models: Mapping[str, Path]
    tokenizer: Tokenizer
    model: LanguageModel
    adapters: AdapterPlan | None
    labels: Labels | None = None
    classes: Classes | None = None

    @property
    def start(self) -> Path | None:
        """The folder of the model, or of the adapter, that it starts from; None from scratch."""
        return self.models.get("init_from")

    def with_labels(self, labels: Labels, classes: Classes | None = None) -> "Run":
        return dataclasses.replace(self, labels=labels._replace(max_tokens=self.config.data.seq_len), classes=classes)


def assemble(kind: StageKind, config: RunConfig, folder: RunFolder, mesh: Mesh, models: Mapping[str, Path]) -> Run:
    """The parts of a run; no weights are read.

    Raises UserError for what does not fit together: a tokenizer without a model or of other words, rows longer than the
    model's context, adapters that it cannot have, ...
    """
    start = models.get("init_from")
    if kind.needs_start and start is None:
        raise UserError(f"{kind.name} needs a model to start from: give --init_from")
    tokenizer = load_tokenizer(config, start)
    model, adapters = build_model(config, tokenizer, start)
    if kind.has_head:
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, tie_word_embeddings=True))
    check_context(config, model.config)
    return Run(kind, config, folder, mesh, models, tokenizer, model, adapters)


def without_others(run: Run, params: Params) -> Params:
    """The parameters of the run's own model and its head: others that its loss reads stand beside them."""
    own = {*run.model.abstract_params(), *([SCORE] if run.kind.has_head else [])}
    return {name: tree for name, tree in params.items() if name in own}


def load_tokenizer(config: RunConfig, start: Path | None) -> Tokenizer:
    """The tokenizer of a run: `config.tokenizer`, or that of the model it starts from.

    Raises UserError when there is none, or its words are not those of the model.
    """
    if not config.tokenizer and start is None:
        raise UserError(
            "a run from scratch needs a tokenizer: give --tokenizer FOLDER, or --init_from a model that has one"
        )
    return Tokenizer.load(config.tokenizer) if start is None else load_model_tokenizer(start, config.tokenizer)


def build_model(
    config: RunConfig, tokenizer: Tokenizer, start: Path | None
) -> tuple[LanguageModel, AdapterPlan | None]:
    """The network, that of `start` or the preset from scratch, with the tokenizer's special ids; and its adapters.

    From scratch it has as many words as the tokenizer, unless model.vocab_size says another number.

    Raises UserError when the tokenizer has more tokens than the model, `config.model` sets another shape than `start`
    has, or adapters are asked for over more words than it has.
    """
    ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    found = None if start is None else read_config(start)
    if found is not None:
        ends = union_of_ids(tokenizer.end_ids, found.eos_token_id)
        architecture = dataclasses.replace(found, **ids, eos_token_id=ends)
        architecture = with_settings(architecture, config.model, start)
    else:
        size = {} if config.model.vocab_size else {"vocab_size": tokenizer.vocab_size}
        architecture = config.model.resolve(**ids, **size, eos_token_id=union_of_ids(tokenizer.end_ids))
    if tokenizer.vocab_size > architecture.vocab_size:
        rows = ", which adds rows drawn around the mean of the others" if found else ""
        raise UserError(
            f"the tokenizer {tokenizer.folder} has {tokenizer.vocab_size} tokens, more than the model's vocabulary of "
            f"{architecture.vocab_size}; set --model.vocab_size {tokenizer.vocab_size}{rows}, or take a tokenizer with "
            "fewer tokens"
        )
    if config.lora.rank and found and architecture.vocab_size > found.vocab_size:
        raise UserError(
            f"model.vocab_size {architecture.vocab_size} is above the {found.vocab_size} of the model {start}, and "
            "adapters train no embedding: train all weights with it first (sft or pretrain without lora.rank), then "
            "adapters over the model that comes out"
        )
    plan = plan_adapters(config, architecture, start)
    return LanguageModel(architecture, config.compute, plan and make_adapter(plan.table, plan.dropout)), plan


def check_context(config: RunConfig, architecture: ModelConfig) -> None:
    """Raises UserError for rows longer than the context that the exported model says it has."""
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


def run_parameters(run: Run) -> Parameters:
    """What the run trains: the parameters of the model it starts from, or drawn from the seed, or adapters over them;
    and the head of scores of a stage that has one."""
    config, model, mesh = run.config, run.model, run.mesh
    if run.start is None:
        return Parameters.of(model, lambda: init_params(model, named_key(config.seed, "init"), mesh))
    dtype = frozen_dtype(config, model)

    def load() -> Params:
        if run.adapters is None:
            _, params = load_merged(run.start)
            params = grow_vocabulary(params, model.config.vocab_size, named_key(config.seed, "new words"))
        else:
            params = _load_with_adapters(run, dtype)
        if SCORE in params and not run.kind.has_head:
            raise UserError(f"init_from {config.init_from} is a classifier or reward model, and cannot write text")
        params = {name: tree for name, tree in params.items() if name in parameters.abstract}
        return jax.device_put(params, param_shardings(mesh, parameters.axes, parameters.abstract))

    parameters = Parameters.of(model, load, dtype)
    return _with_head(run, parameters) if run.kind.has_head else parameters


def _load_with_adapters(run: Run, dtype: str) -> Params:
    """The base model, its matrices in that dtype, with the adapters: new ones, or those of the run's start."""
    plan = run.adapters
    _, params = load_hf(plan.base)
    adapters = plan.stored
    if adapters is None:
        adapters = init_adapters(named_key(run.config.seed, "lora"), params, plan.table, plan.alpha, plan.rslora)
    return join(cast_matrices(params, dtype), adapters)


def _with_head(run: Run, parameters: Parameters) -> Parameters:
    """With a head of the run's labels: the one of the model it starts from if it has the same, or a new one, and then
    what is left out is told."""
    wanted, width = run.labels, run.model.config.hidden_size
    abstract = jax.eval_shape(lambda: init_head(jax.random.key(0), width, len(wanted.names)))[SCORE]
    axes = head_axes()[SCORE]

    def load(_: Params) -> Params:
        folder = base_folder(run.start) if is_adapter(run.start) else run.start
        found = load_labels(folder)
        if found is not None and (other := differing(found, wanted)):
            announce(f"the head of {folder} is left out, and a new one trained: {other}")
        elif found is not None:
            order = [found.names.index(name) for name in wanted.names] if len(wanted.names) > 1 else [0]
            head = {name: array[..., order] for name, array in load_hf(folder)[1][SCORE].items()}
            return jax.device_put(head, param_shardings(run.mesh, axes, abstract))
        head = init_head(named_key(run.config.seed, "head"), width, len(wanted.names))[SCORE]
        return jax.device_put(head, param_shardings(run.mesh, axes, abstract))

    return parameters.adding(SCORE, abstract, axes, load, is_trained=True)


def open_rows(run: Run, annotate: Annotate | None = None) -> tuple[Batches, Batches | None]:
    """Those to train on, and the held-out ones, if there are any. annotate: what else the loss reads of them."""
    places = data_process(run.mesh)
    return open_data(run.kind.records, run.config, run.tokenizer, *places, classes=run.classes, annotate=annotate)

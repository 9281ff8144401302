"""What a run is made of, found once and passed down: its folders, tokenizer, network and mesh."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh

from minimind_jax.config.sections import ModelSettings
from minimind_jax.config.stages import RunConfig
from minimind_jax.convert.hf import Labels, check_vocabulary, load_hf, load_labels
from minimind_jax.convert.hf_config import SIZES, checked_ids
from minimind_jax.convert.hf_image_classifier import load_picture_head
from minimind_jax.convert.hf_vision import open_tower
from minimind_jax.convert.load import folders_of, load_generation_settings, load_merged, open_merged, read_config
from minimind_jax.convert.load import load_tokenizer as load_model_tokenizer
from minimind_jax.data.batches import Batches, open_data
from minimind_jax.data.epoch import Annotate
from minimind_jax.data.labelled_images import Wordless
from minimind_jax.data.labels import Classes
from minimind_jax.data.pictures import Marker, marker_of
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.model.config import ModelConfig, union_of_ids
from minimind_jax.model.heads import SCORE, head_axes, init_head
from minimind_jax.model.image_model import ImageModel
from minimind_jax.model.lora import init_adapters, join, make_adapter
from minimind_jax.model.transformer import LanguageModel, Params, cast_matrices
from minimind_jax.model.vision import VISION
from minimind_jax.model.vocabulary import grow_vocabulary
from minimind_jax.runs.adapters import AdapterPlan, frozen_dtype, plan_adapters
from minimind_jax.runs.kind import StageKind
from minimind_jax.runs.labels import differing
from minimind_jax.runs.vision import TOWER, new_vision, with_trained_parts, with_vision
from minimind_jax.seeds import named_key
from minimind_jax.sharding import announce, data_process, init_params, param_shardings
from minimind_jax.training.run import RunFolder
from minimind_jax.training.state import Parameters

# Fields of a model that decide the shapes of its tensors; a run cannot change them in a model it starts from.
SHAPE_FIELDS = (*SIZES, "head_dim", "tie_word_embeddings", "num_experts", "moe_intermediate_size")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a stage."""

    kind: StageKind
    config: RunConfig  # its settings, once the run has begun with a value for everything that they left open
    folder: RunFolder
    mesh: Mesh
    models: Mapping[str, Path]  # the folders of the models that they name, by setting
    tokenizer: Tokenizer | Wordless
    model: LanguageModel | ImageModel  # the network, below a head of scores if the stage has one
    adapters: AdapterPlan | None  # None where all weights are trained
    labels: Labels | None = None  # of that head
    classes: Classes | None = None  # how records name them, where they do

    @property
    def start(self) -> Path | None:
        """The folder of the model, or of the adapter, that it starts from; None from scratch, and of pictures."""
        return self.models.get("init_from")

    @property
    def marker(self) -> Marker | None:
        """How images stand among its tokens; None of a model of texts, or of pictures alone."""
        return None if self.config.of_pictures else marker_of(self.tokenizer, self.model.config.vision)

    def with_labels(self, labels: Labels, classes: Classes | None = None) -> "Run":
        return dataclasses.replace(self, labels=labels._replace(max_tokens=self.config.data.seq_len), classes=classes)


def assemble(kind: StageKind, config: RunConfig, folder: RunFolder, mesh: Mesh, models: Mapping[str, Path]) -> Run:
    """The parts of a run; no weights are read.

    Raises UserError for what does not fit together: a tokenizer without a model or of other words, rows longer than the
    model's context, adapters that it cannot have, ...
    """
    kind, start = kind.of(config), models.get("init_from")
    if config.of_pictures:
        model = ImageModel(open_tower(models[TOWER]).config, config.compute)
        return Run(kind, config, folder, mesh, models, Wordless(), model, None)
    if kind.needs_start and start is None:
        raise UserError(f"{kind.name} needs a model to start from: give --init_from")
    tokenizer = load_tokenizer(config, start)
    architecture = with_vision(config, _architecture(config, tokenizer, start), tokenizer, models)
    adapters = plan_adapters(config, architecture, start)
    if kind.has_head:
        if architecture.vision is not None:
            announce(f"the tower and the projector of {start} are left out: {kind.name} reads texts alone")
        architecture = dataclasses.replace(architecture, tie_word_embeddings=True, vision=None)
    check_context(config, architecture)
    model = LanguageModel(architecture, config.compute, adapters and make_adapter(adapters.table, adapters.dropout))
    return Run(kind, config, folder, mesh, models, tokenizer, model, adapters)


def check_weights(models: Mapping[str, Path]) -> None:
    """Reads all weights once, one tensor at a time, before the data are, which may take hours. Raises UserError for a
    file that is damaged, numbers that are not finite, and tensors that are not those of its configuration."""
    for key, folder in models.items():
        tensors = open_tower(folder).tensors if key == TOWER else open_merged(folder)[1]
        for tensor in tensors.values():
            tensor.read(...)


def without_others(run: Run, params: Params) -> Params:
    """The parameters of the run's own model and its head: others that its loss reads stand beside them."""
    own = {*run.model.abstract_params(), SCORE}
    return {name: tree for name, tree in params.items() if name in own}


def load_tokenizer(config: RunConfig, start: Path | None) -> Tokenizer:
    """`config.tokenizer`, or that of the model the run starts from. Raises UserError when there is none, or its words
    are not those of the model."""
    if not config.tokenizer and start is None:
        raise UserError(
            "a run from scratch needs a tokenizer: give --tokenizer FOLDER, or --init_from a model that has one"
        )
    return Tokenizer.load(config.tokenizer) if start is None else load_model_tokenizer(start, config.tokenizer)


def _architecture(config: RunConfig, tokenizer: Tokenizer, start: Path | None) -> ModelConfig:
    """That of `start`, or the preset, with as many words as the tokenizer unless model.vocab_size says another number;
    with the tokenizer's special ids.

    Raises UserError when the tokenizer has more tokens than the model, `config.model` sets another shape than `start`
    has, or adapters are asked for over more words than it has.
    """
    found = None if start is None else read_config(start)
    theirs = {} if start is None else load_generation_settings(start) or {}  # which may name more than config.json
    theirs = checked_ids(theirs.get("eos_token_id"), f"{start}: generation_config.json")
    ends = union_of_ids(tokenizer.end_ids, found and found.eos_token_id, theirs)
    ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id, "eos_token_id": ends}
    if found:
        architecture = with_settings(dataclasses.replace(found, **ids), config.model, start)
    else:
        size = {} if config.model.vocab_size else {"vocab_size": tokenizer.vocab_size}
        architecture = config.model.resolve(**ids, **size)
    check_vocabulary(tokenizer, architecture)
    if config.lora.rank and found and architecture.vocab_size > found.vocab_size:
        raise UserError(
            f"model.vocab_size {architecture.vocab_size} is above the {found.vocab_size} of the model {start}, and "
            "adapters train no embedding: train all weights with it first (sft or pretrain without lora.rank), then "
            "adapters over the model that comes out"
        )
    return architecture


def check_context(config: RunConfig, architecture: ModelConfig) -> None:
    """Raises UserError for rows longer than the context that the exported model says it has."""
    context = architecture.max_position_embeddings
    if (seq_len := config.data.seq_len) > context:
        raise UserError(
            f"data.seq_len {seq_len} is above the model's context of {context} tokens (model.max_position_embeddings); "
            f"set data.seq_len {context} or less, or model.max_position_embeddings {seq_len} to train a longer context"
        )


def tell_template(tokenizer: Tokenizer) -> None:
    """Says so where there is no chat template, and where it writes nothing behind an answer that could end it."""
    if not tokenizer.has_template:
        announce(
            f"{tokenizer.folder} has no chat template; MiniMind's writes the conversations and goes with the model"
        )
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
    config, model, plan = run.config, run.model, run.adapters
    if run.start is None and not config.of_pictures:
        return Parameters.of(model, lambda: init_params(model, named_key(config.seed, "init"), run.mesh))
    dtype = frozen_dtype(config, model)

    def load() -> Params:
        if plan is None:
            params = start_params(run)
        else:
            _, base = load_hf(plan.base)
            lora_key = named_key(config.seed, "lora")
            adapters = plan.stored or init_adapters(lora_key, base, plan.table, plan.alpha, plan.rslora)
            params = join(cast_matrices(base, dtype), adapters)
        if SCORE in params and not run.kind.has_head:
            raise UserError(f"init_from {config.init_from} is a classifier or reward model, and cannot write text")
        return on_mesh(run.mesh, params, parameters.abstract, parameters.axes)

    parameters = with_trained_parts(config, model, Parameters.of(model, load, dtype))
    return _with_head(run, parameters) if run.kind.has_head else parameters


def start_params(run: Run) -> Params:
    """The parameters of the model, or of pictures the tower, that a run starts from, on the host: adapters merged, what
    is new drawn."""
    config, model = run.config, run.model
    if config.of_pictures:
        return {VISION: {"tower": open_tower(run.models[TOWER]).params()}}
    _, params = load_merged(run.start)
    params = grow_vocabulary(params, model.config.vocab_size, named_key(config.seed, "new words"))
    if model.config.vision is not None and VISION not in params:
        params = {**params, VISION: new_vision(model.config, run.models[TOWER], named_key(config.seed, "sight"))}
    return params


def on_mesh(mesh: Mesh, params: Params, abstract: Params, axes: Params) -> Params:
    """Those of the parameters that a model has, which `abstract` and `axes` describe, cut over the mesh."""
    return jax.device_put({name: params[name] for name in abstract}, param_shardings(mesh, axes, abstract))


def _with_head(run: Run, parameters: Parameters) -> Parameters:
    """With a head of the run's labels: the one of the model it starts from if it has the same, or a new one, and then
    what is left out is told."""
    wanted, width, bias = run.labels, run.model.config.hidden_size, run.config.of_pictures

    def draw(key: jax.Array) -> Params:
        return init_head(key, width, len(wanted.names), bias=bias)[SCORE]

    def load(_: Params) -> Params:
        folder = run.models[TOWER] if run.config.of_pictures else folders_of(run.start)[-1]
        found = load_labels(folder)
        other = differing(found, wanted) if found else ""
        if other:
            announce(f"the head of {folder} is left out, and a new one trained: {other}")
        if found and not other:
            order = [found.names.index(name) for name in wanted.names] if len(wanted.names) > 1 else [0]
            own = load_picture_head(folder) if run.config.of_pictures else load_hf(folder)[1][SCORE]
            head = {name: array[..., order] for name, array in own.items()}
        else:
            head = draw(named_key(run.config.seed, "head"))
        return on_mesh(run.mesh, head, abstract, axes)

    abstract, axes = jax.eval_shape(draw, jax.random.key(0)), head_axes(bias=bias)[SCORE]
    return parameters.adding(SCORE, abstract, axes, load, is_trained=True)


def open_rows(run: Run, annotate: Annotate | None = None) -> tuple[Batches, Batches | None]:
    """Those to train on, and the held-out ones, if there are any. annotate: what else the loss reads of them."""
    more = {"classes": run.classes, "marker": run.marker, "annotate": annotate}
    return open_data(run.kind.records, run.config, run.tokenizer, *data_process(run.mesh), **more)

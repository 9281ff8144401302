"""What is planned: a stage's settings and model from the command line, and the tokens it will train."""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from minimind_jax.config import settings
from minimind_jax.config.stages import RunConfig, SeeingConfig
from minimind_jax.convert.peft import rank_table
from minimind_jax.data.cache_folder import cache_root, stored_caches
from minimind_jax.data.jsonl import expand_paths
from minimind_jax.data.kinds import KINDS, KindName, Wanted
from minimind_jax.data.pictures import MARKER, Marker
from minimind_jax.data.tokenise import Encoder, read_chunks
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.folders import resolve_model_folder
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.lora import Adapter, make_adapter
from minimind_jax.pipeline.ahead import maker_of, planned_architecture
from minimind_jax.pipeline.read import Stage, load_pipeline
from minimind_jax.runs.vision import planned_vision
from minimind_jax.stages import STAGES
from minimind_jax.training.defaults import filled

PLANNED = {config: kind.name for kind in STAGES.values() for config in kind.planned}  # the stage of each config

# Bytes of a line for each token of MiniMind's tokenizer (6,400 tokens): 3.02 on the first 2.1 MB of a file of English
# and Chinese text for pretraining, 3.16 on conversations (2026-11-25).
BYTES_PER_TOKEN = 3.1
SAMPLE_CHUNKS = 4  # of data.tokenise.CHUNK_BYTES


class Planned(NamedTuple):
    """note: what had to be assumed about the model, or empty."""

    stage: str
    config: RunConfig
    architecture: ModelConfig
    note: str


class Tokens(NamedTuple):
    """count: tokens that are trained, over all epochs. source: where the number is from, in words. images: among these
    tokens, where that is known."""

    count: int
    source: str
    images: int | None = None


# Settings -------------------------------------------------------------------------------------------------------------


def load_planned(argv: Sequence[str], stage: str | None) -> Planned:
    """The settings of `--config` and the overrides in argv: of a stage's file, or of one stage of a pipeline's.

    stage: which; else the one a file is named after, a pipeline's first training stage, or pretrain.
    Raises UserError.
    """
    configs, _ = settings.read_arguments(argv)
    if len(configs) == 1 and _is_pipeline(settings.find_config(configs[0])):
        return _of_pipeline(argv, stage)
    stems = [Path(config).name.removesuffix(".yaml") for config in configs]
    if other := next((stem for stem in stems if stem.replace("_", "-") in STAGES and stem not in PLANNED), None):
        known = ", ".join(dict.fromkeys(PLANNED.values()))
        raise UserError(f"plan knows the stages {known}, and not {other}, whose step has more in it")
    name = stage or next((PLANNED[stem] for stem in stems if stem in PLANNED), "pretrain")
    config = filled(settings.load_settings(STAGES[name].config, argv, "minimind plan"))
    return Planned(name, config, *_architecture(config, []))


def _is_pipeline(file: Path) -> bool:
    node = settings.compose_yaml(file)
    return isinstance(node, yaml.MappingNode) and any(key.value == "stages" for key, _ in node.value)


def _of_pipeline(argv: Sequence[str], stage: str | None) -> Planned:
    """Overrides may leave out the stage's name: they are of the stage that is planned."""
    configs, _ = settings.read_arguments(argv)
    names = [made.name for made in load_pipeline(["--config", *configs])]
    chosen = stage or next((name for name in names if name in PLANNED), "")
    if chosen not in names:
        raise UserError(f"the pipeline has no stage {stage or 'to train'}; its stages are {', '.join(names)}")
    heads = {*names, "shared", "name", "config"}

    def whole(word: str) -> str:
        is_short = word.startswith("--") and re.split("[.=]", word[2:])[0] not in heads
        return f"--{chosen}.{word[2:]}" if is_short else word

    stages = load_pipeline(list(map(whole, argv)))
    position = names.index(chosen)
    config = filled(stages[position].config)
    return Planned(chosen, config, *_architecture(config, stages[:position]))


def _architecture(config: RunConfig, before: Sequence[Stage]) -> tuple[ModelConfig, str]:
    """The model that the stage will have, and what had to be assumed: the preset in `model`, where what it starts from
    is not there and no stage before makes it."""
    try:
        if config.init_from and not maker_of(config.init_from, before):
            resolve_model_folder(config.init_from, "init_from")
        elif config.tokenizer and not maker_of(config.tokenizer, before):
            Tokenizer.load(config.tokenizer)
    except UserError:
        missing = f"init_from {config.init_from}" if config.init_from else ""
        note = missing and f"{missing} is not there yet; taken as the preset in `model`"
        return _seeing(config, planned_vision(config, config.model.resolve())), note
    return _seeing(config, planned_architecture(config, before)), ""


def _seeing(config: RunConfig, architecture: ModelConfig) -> ModelConfig:
    if isinstance(config, SeeingConfig) and architecture.vision is None:
        raise UserError(
            f"init_from {config.init_from} is not there yet, or a model of texts: give --vision.tower a SigLIP folder, "
            "or a name such as google/siglip2-base-patch32-256"
        )
    return architecture


def planned_adapter(planned: Planned) -> Adapter | None:
    """The adapters that `lora` asks for. Raises UserError for targets that the model does not have."""
    lora = planned.config.lora
    if not lora.rank:
        return None
    return make_adapter(rank_table(planned.architecture, lora.rank, lora.targets, lora.own_ranks()), lora.dropout)


# Tokens ---------------------------------------------------------------------------------------------------------------


def planned_tokens(planned: Planned, data: Sequence[str], tokens: int | None) -> Tokens | None:
    """Tokens of the run: `tokens`, those of the files `data` times the epochs, or what the settings say.

    None where nothing says. Raises UserError for files that are not there or whose tokens cannot be estimated.
    """
    training, config = planned.config.training, planned.config
    if tokens is not None:
        return Tokens(tokens, "as given")
    if not data and training.steps is not None:
        return Tokens(training.steps * config.rows_per_step * config.data.seq_len, f"training.steps {training.steps:,}")
    if not data and training.tokens is not None:
        return Tokens(training.tokens, "training.tokens")
    try:
        files = expand_paths(data or config.data.train)
    except UserError:
        if data:
            raise
        files = []  # one is not there yet, or in an object store
    if not files:
        return None
    vision = planned.architecture.vision
    marker = MARKER if vision is None else Marker(tokens=vision.image_tokens)
    count, source, images = count_tokens(files, STAGES[planned.stage].records, config, marker)
    epochs = 1 if training.epochs is None else training.epochs
    images = None if images is None else round(images * epochs)
    return Tokens(round(count * epochs), f"{source}, {epochs:g} epoch{'s' * (epochs != 1)}", images)


def count_tokens(files: Sequence[Path], kind: KindName, config: RunConfig, marker: Marker = MARKER) -> Tokens:
    """Tokens of data files: from the cache that tokenising them left, from a sample, or from their size alone."""
    names = {str(file.resolve()) for file in files}
    for cache in stored_caches(cache_root(config.data)):
        if cache.stale or cache.kind != kind or set(cache.files) != names:
            continue
        info = json.loads((cache.folder / "info.json").read_text("utf-8"))
        if info.get("image_tokens", marker.tokens) == marker.tokens:
            source = f"{info['tokens']:,} tokens counted in the token cache"
            return Tokens(info["tokens"], source, info.get("images"))
    if packed := [file for file in files if file.suffix not in (".jsonl", ".json", ".ndjson")]:
        raise UserError(
            f"{packed[0]}: the tokens of files other than JSON cannot be told from their size; give --tokens N"
            + " and --images N" * KINDS[kind].has_pictures
        )
    size = sum(file.stat().st_size for file in files)
    folder = _tokenizer_folder(config)
    if folder is None and KINDS[kind].has_pictures:
        raise UserError("the tokens of images cannot be told without a tokenizer; give --tokenizer, or --tokens N")
    if folder is None:
        count = round(size / BYTES_PER_TOKEN)
        return Tokens(count, f"about {count:,} tokens, guessed from the size at {BYTES_PER_TOKEN} bytes a token")
    encoder = Encoder(kind, str(folder), None, skip=True, wanted=Wanted(config.data, marker=marker))
    found = images = read = 0
    for lines in itertools.islice(read_chunks(files, lambda _: None, config.data), SAMPLE_CHUNKS):
        chunk = encoder.encode(lines)
        found, images = found + len(chunk.arrays["tokens"]), images + len(chunk.sizes["content_offsets"])
        read += sum(len(line[3]) + 1 for line in lines)
    count = round(found / read * size)
    source = f"about {count:,} tokens, estimated from the first {min(1, read / size):.1%}"
    return Tokens(count, source, round(images / read * size) if KINDS[kind].has_pictures else None)


def _tokenizer_folder(config: RunConfig) -> Path | None:
    """The folder of the run's tokenizer if it is there already."""
    try:
        folder = config.tokenizer or resolve_model_folder(config.init_from or "-")
        return Tokenizer.load(folder).folder
    except UserError:
        return None

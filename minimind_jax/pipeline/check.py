"""What a pipeline's stages would stop at, found before the first of them trains: files, records, names, settings."""

import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from minimind_jax.config.stages import RunConfig
from minimind_jax.convert.load import read_config
from minimind_jax.convert.peft import rank_table
from minimind_jax.data.jsonl import Record, expand_paths, iter_records, reading_of
from minimind_jax.data.kinds import KINDS, Wanted
from minimind_jax.data.labels import Classes
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.folders import resolve_model_folder, resolve_run
from minimind_jax.model.config import ModelConfig
from minimind_jax.pipeline.read import Stage
from minimind_jax.runs.parts import assemble, check_context, with_settings
from minimind_jax.sharding import announce, make_mesh
from minimind_jax.stages.tokenizer import text_of
from minimind_jax.training.defaults import filled
from minimind_jax.training.optimizer import make_schedule
from minimind_jax.training.origin import find_models
from minimind_jax.training.places import MODELS
from minimind_jax.training.program import count_parts
from minimind_jax.training.run import RunFolder, flat, plain
from minimind_jax.training.watch import check_patience

SAMPLE = 50  # records of each file


def check_stages(stages: Sequence[Stage]) -> None:
    """Checks each stage that is not finished, with a sample of its records. Raises UserError, which names the stage."""
    for position, stage in enumerate(stages):
        if stage.is_finished:
            continue
        try:
            check_records(stage, SAMPLE)
            if stage.kind.is_run:
                _check_settings(stage, stages[:position])
        except UserError as error:
            raise UserError(f"stage {stage.name}: {error}") from error


def watch_records(stages: Sequence[Stage]) -> threading.Thread:
    """Reads all records of these stages while others run, and says at once what one of them will stop at."""

    def read() -> None:
        for stage in stages:
            try:
                check_records(stage)
            except UserError as error:
                announce(f"stage {stage.name} will not start: {error}\nMend it while the stages before it run.")

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def check_records(stage: Stage, sample: int | None = None) -> None:
    """Reads the stage's records, or the first `sample` of each file. Raises UserError for files that are not there, and
    for a broken record unless the stage skips those."""
    parse, paths, on_error = _reader(stage)
    reading = reading_of(stage.config.data if stage.kind.is_run else stage.config)
    for file in expand_paths(paths):
        try:
            for record in itertools.islice(iter_records([file], reading=reading), sample):
                parse(record)
        except UserError:
            if on_error == "stop":
                raise


def _reader(stage: Stage) -> tuple[Callable[[Record], object], tuple[str, ...], str]:
    """How a record of the stage is read, its files, and what it does with a broken one."""
    config = stage.config
    if not stage.kind.is_run:
        return functools.partial(text_of, reading=reading_of(config)), config.data, config.on_error
    if not config.data.train:
        raise UserError("data.train is empty; give it files, folders or globs")
    reading, paths = reading_of(config.data), (*config.data.train, *config.data.val)
    has_labels = stage.kind.has_head and not stage.kind.labels
    classes = Classes.any(config.text_field, config.classify.label_field) if has_labels else None
    parse = functools.partial(KINDS[stage.kind.records].parse, wanted=Wanted(reading, classes))
    return parse, paths, config.data.on_error


def _check_settings(stage: Stage, before: Sequence[Stage]) -> None:
    config: RunConfig = stage.config
    folder, mesh = RunFolder(stage.folder), make_mesh(config.mesh)
    folder.check_resume(config.resume)
    if config.training.batch_tokens is not None:
        count_parts(config, mesh)
    if config.training.steps is not None:
        make_schedule(filled(config).optimizer, config.training.steps)
    check_patience(config.training, bool(config.data.val) or config.data.val_fraction != 0)
    named = flat(plain(config))
    models = find_models(config, [key for key in MODELS if not _maker(named.get(key, ""), before)])
    if config.lora.rank and not config.init_from:
        raise UserError("lora.rank is set, but there is no model to adapt; give --init_from, or leave lora.rank out")
    if not _maker(config.init_from, before) and not _maker(config.tokenizer, before):
        assemble(stage.kind, config, folder, mesh, models)
        return
    architecture = _architecture(config, before)
    if config.lora.rank:
        rank_table(architecture, config.lora.rank, config.lora.targets, config.lora.own_ranks())
    check_context(config, architecture)
    tokens = _tokens(config, before)
    if tokens is not None and tokens > architecture.vocab_size:
        raise UserError(
            f"its tokenizer has {tokens} tokens, more than the model's vocabulary of {architecture.vocab_size}; set "
            f"model.vocab_size {tokens}"
        )


def _maker(name: str, before: Sequence[Stage]) -> Stage | None:
    """The stage that makes the run or the tokenizer `name`."""
    return next((made for made in before if name and made.folder in (Path(name), resolve_run(name))), None)


def _architecture(config: RunConfig, before: Sequence[Stage]) -> ModelConfig:
    """The model that a stage will have, from the settings of those that make it."""
    if not config.init_from:
        tokens = None if config.model.vocab_size else _tokens(config, before)
        return config.model.resolve(**({"vocab_size": tokens} if tokens else {}))
    maker = _maker(config.init_from, before)
    if maker is None:
        folder = resolve_model_folder(config.init_from, "init_from")
        return with_settings(read_config(folder), config.model, folder)
    return with_settings(_architecture(maker.config, before[: before.index(maker)]), config.model, maker.folder)


def _tokens(config: RunConfig, before: Sequence[Stage]) -> int | None:
    """How many tokens the stage's tokenizer has at most; None for that of the model it starts from."""
    if not config.tokenizer:
        return None
    maker = _maker(config.tokenizer, before)
    return maker.config.vocab_size if maker else Tokenizer.load(config.tokenizer).vocab_size

"""What a pipeline's stages would stop at, found before the first of them trains: files, records, names, settings."""

import functools
import itertools
import threading
from collections.abc import Callable, Sequence

from minimind_jax.config.stages import RunConfig
from minimind_jax.convert.peft import rank_table
from minimind_jax.data.jsonl import Record, expand_paths, iter_records
from minimind_jax.data.kinds import KINDS, Wanted
from minimind_jax.data.labels import Classes
from minimind_jax.errors import UserError, explained
from minimind_jax.folders import holds_model
from minimind_jax.pipeline.ahead import maker_of, planned_architecture, planned_words
from minimind_jax.pipeline.read import Stage
from minimind_jax.runs.parts import assemble, check_context
from minimind_jax.sharding import announce, make_mesh
from minimind_jax.stages.tokenizer import text_of
from minimind_jax.training.defaults import filled
from minimind_jax.training.optimizer import make_schedule
from minimind_jax.training.origin import find_models, named_models
from minimind_jax.training.run import RunFolder
from minimind_jax.training.step import count_parts
from minimind_jax.training.watch import check_patience

SAMPLE = 50  # records of each file


def check_stages(stages: Sequence[Stage]) -> None:
    """Checks each stage that is not finished, with a sample of its records. Raises UserError, which names the stage, or
    the pipeline's folder where that is a run or a model, whose name would mean the last stage from then on."""
    home = stages[-1].home
    if RunFolder(home).read_config() is not None or holds_model(home):
        raise UserError(f"{home} is a run or a model, not the folder of a pipeline; choose another --name")
    for position, stage in enumerate(stages):
        if stage.is_finished:
            continue
        with explained(f"stage {stage.name}", UserError):
            check_records(stage, SAMPLE)
            if stage.kind.is_run:
                _check_settings(stage, stages[:position])


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
    reading = stage.config.data if stage.kind.is_run else stage.config
    pictures = stage.kind.is_run and stage.config.of_pictures
    for file in expand_paths(paths, pictures):
        try:
            for record in itertools.islice(iter_records([file], reading=reading, pictures=pictures), sample):
                parse(record)
        except UserError:
            if on_error == "stop":
                raise


def _reader(stage: Stage) -> tuple[Callable[[Record], object], tuple[str, ...], str]:
    """How a record of the stage is read, its files, and what it does with a broken one."""
    config = stage.config
    if not stage.kind.is_run:
        return functools.partial(text_of, reading=config), config.data, config.on_error
    if not config.data.train:
        raise UserError("data.train is empty; give it files, folders or globs")
    paths = (*config.data.train, *config.data.val)
    has_labels = stage.kind.has_head and not stage.kind.labels
    classes = Classes.any(config.text_field, config.classify.label_field) if has_labels else None
    parse = functools.partial(KINDS[stage.kind.of(config).records].parse, wanted=Wanted(config.data, classes))
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
    models = find_models(config, [key for key, name in named_models(config).items() if not maker_of(name, before)])
    if config.lora.rank and not config.init_from:
        raise UserError("lora.rank is set, but there is no model to adapt; give --init_from, or leave lora.rank out")
    if not maker_of(config.init_from, before) and not maker_of(config.tokenizer, before):
        assemble(stage.kind, config, folder, mesh, models)
        return
    architecture = planned_architecture(config, before)
    if config.lora.rank:
        rank_table(architecture, config.lora.rank, config.lora.targets, config.lora.own_ranks())
    check_context(config, architecture)
    tokens = planned_words(config, before)
    if tokens is not None and tokens > architecture.vocab_size:
        raise UserError(
            f"its tokenizer has {tokens} tokens, more than the model's vocabulary of {architecture.vocab_size}; set "
            f"model.vocab_size {tokens}"
        )

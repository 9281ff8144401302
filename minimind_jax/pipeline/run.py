"""The stages of a pipeline, one after another: what is done is skipped, what was cut off is resumed."""

import os
from collections.abc import Sequence

import yaml

from minimind_jax.agreement import ending_together, first_says, on_first
from minimind_jax.config import settings
from minimind_jax.config.fields import names_of
from minimind_jax.folders import PIPELINE
from minimind_jax.huge_pages import kept
from minimind_jax.pipeline.check import check_stages, watch_records
from minimind_jax.pipeline.read import Stage
from minimind_jax.runs.settle import changed_data
from minimind_jax.sharding import announce, initialize_distributed
from minimind_jax.stages import start
from minimind_jax.training.places import changes
from minimind_jax.training.run import RunFolder, flat, plain, write_text


def run_pipeline(stages: Sequence[Stage]) -> None:
    """Checks all stages, then runs what is not done, in order. One that is asked to stop saves its state and ends the
    process. Raises UserError."""
    initialize_distributed()
    with ending_together():
        check_stages(stages)
        renewed = ""
        for number, stage in enumerate(stages, 1):
            title = f"[{number}/{len(stages)}] {stage.name}"
            if first_says(stage.is_finished):
                announce("\n".join([f"{title}: done, in {stage.folder}", *_what_changed(stage, renewed)]))
                continue
            announce(f"{title}: {stage.folder}")
            if not renewed:
                watch_records([later for later in stages[number:] if not later.is_finished])
            if stage.kind.is_run:
                with kept(stage.kind.is_steady):
                    start(stage.config)
            else:
                on_first(lambda stage=stage: _make_tokenizer(stage))
            renewed = renewed or stage.name
            on_first(lambda: _write_last(stages))


def _write_last(stages: Sequence[Stage]) -> None:
    """Notes in the pipeline's folder where its last stage is, for commands that are given that folder as a model."""
    home, last = stages[-1].home, stages[-1].folder
    if home.is_dir() and stages[-1].kind.is_run:
        write_text(home / PIPELINE, yaml.safe_dump({"last_stage": os.path.relpath(last, home)}))


def _make_tokenizer(stage: Stage) -> None:
    start(stage.config)
    write_text(stage.record, yaml.safe_dump(plain(stage.config), sort_keys=False, allow_unicode=True))


def _what_changed(stage: Stage, renewed: str) -> list[str]:
    """Says what is not as it was when a finished stage was made; `renewed` is a stage before it that ran just now."""
    changed = _changes(stage)
    lines = [f"  its settings have changed since: {'; '.join(changed)}"] if changed else []
    if stage.kind.is_run:
        lines += [f"  changed since: {text}" for text in changed_data(RunFolder(stage.folder), stage.config)]
    lines += [f"  it was made before this {renewed}"] if renewed else []
    return lines and [*lines, f"  it is kept as it is; to make it anew, remove {stage.folder} or set another run"]


def _changes(stage: Stage) -> list[str]:
    """`key old -> new` for every setting that is not the one the stage was made with."""
    if stage.kind.is_run:
        changed = RunFolder(stage.folder).changed_settings(stage.config)
    elif stage.record.is_file():
        before = settings.make_settings(type(stage.config), settings.read_yaml(stage.record))
        changed = changes(names_of(type(before)), flat(plain(before)), flat(plain(stage.config)))
    else:
        changed = {}
    return [f"{key} {change}" for key, change in changed.items()]

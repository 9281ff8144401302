"""Before a stage begins: the run's folder, and whether what is in it allows these settings."""

import contextlib
import functools
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import jax

from minimind_jax import hub
from minimind_jax.agreement import check_agreement, ending_together, exchange, on_first
from minimind_jax.config.sections import RUN_LENGTHS
from minimind_jax.config.stages import RunConfig
from minimind_jax.convert.replace import check_replaceable
from minimind_jax.errors import UserError
from minimind_jax.folders import holds_model, resolve_run
from minimind_jax.paths import is_remote
from minimind_jax.runs.effect import check_effect
from minimind_jax.runs.models import SHAPE_FIELDS
from minimind_jax.runs.settle import changed_data
from minimind_jax.sharding import announce, initialize_distributed, make_mesh
from minimind_jax.training.origin import agreed_settings, check_start_models
from minimind_jax.training.program import count_parts
from minimind_jax.training.run import RunFolder
from minimind_jax.training.tracking import is_exported


def start_run(config: RunConfig) -> RunFolder:
    """Joins the run's processes and makes the run's folder.

    Raises UserError when the devices do not fit `config`, when `config.resume` does not allow what the folder holds,
    when it is a Hugging Face model itself, or when a process of several does not see what the first writes there.
    """
    initialize_distributed()
    run = RunFolder(resolve_run(config.run))
    check_shared(run)
    check_agreement(agreed_settings(config))
    if holds_model(run.path) and (run.path / "tokenizer.json").is_file():
        raise UserError(
            f"{run.path} is a Hugging Face model, not the folder of a run; choose another run name (with --init_from "
            f"{run.path} to start from that model)"
        )
    run.check_resume(config.resume)
    hub.pin(run.read_environment().get("hub", {}))
    check_settings(run, config)
    if not is_exported(run) or run.changed_settings(config):  # all before any data is read
        if config.training.batch_tokens is not None:
            count_parts(config, make_mesh(config.mesh))
        check_effect(config)
        check_replaceable(run.model)
        check_start_models(run, config)
    run.create()
    if jax.process_index() == 0:
        run.lock()
    return run


def tidy(stage: Callable[[RunConfig], Path]) -> Callable[[RunConfig], Path]:
    """The stage, which leaves no folder behind when it could not start, and ends on all processes if it does on one."""

    @functools.wraps(stage)
    def run(config: RunConfig) -> Path:
        folder = resolve_run(config.run)
        is_new = not is_remote(folder) and not folder.exists()
        try:
            with ending_together():
                return stage(config)
        except BaseException:  # Ctrl-C as well
            if is_new and jax.process_index() == 0:
                remove_unused(folder)
            raise

    return run


def remove_unused(folder: Path) -> None:
    """Removes a folder that holds a lock, empty folders and nothing else, and the one around it if it is empty then."""
    if not folder.is_dir() or any(path.is_file() and path.name != ".lock" for path in folder.rglob("*")):
        return
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()


def check_shared(run: RunFolder, patience: float = 10.0) -> None:
    """Raises UserError, on all processes, when one does not see a file that the first writes into the run's folder:
    checkpoints are written by all, which would wait for each other for ever. patience: seconds a disk may be late."""
    if jax.process_count() == 1:
        return
    run.create()
    # A new name: what a network disk was asked for before it was there it may deny for a while.
    mark = run.path / f".processes-{exchange(secrets.token_hex(4))[0]}"
    on_first(lambda: _write_mark(run, mark))
    late = time.monotonic() + patience
    while not (seen := mark.exists()) and time.monotonic() < late:
        time.sleep(0.2)
    blind = [process for process, answer in enumerate(exchange("seen" if seen else "")) if not answer]
    on_first(mark.unlink)
    if blind:
        raise UserError(
            f"the run's folder {run.path} of process 0 is another one than that of "
            f"process{'es' * (len(blind) > 1)} {', '.join(map(str, blind))}; give --run a folder on a disk that all "
            "processes see, or gs://BUCKET/NAME"
        )


def _write_mark(run: RunFolder, mark: Path) -> None:
    try:
        mark.write_text("", "utf-8")
    except OSError as error:
        raise UserError(f"the run's folder {run.path} cannot be written into: {error}") from error


def check_settings(run: RunFolder, config: RunConfig) -> None:
    """Says which settings differ from those the run was started with.

    Raises UserError when the weights that are there would not be those the settings describe: another start or kind of
    model (of other shapes: the checkpoint itself tells), or, in a finished run that is not made longer, another
    optimizer setting, which could have no effect.
    """
    if not run.checkpoint_steps() and not is_exported(run):
        return
    changed = run.changed_settings(config)
    told_later = {"optimizer.name", *(f"model.{name}" for name in SHAPE_FIELDS)}
    prefixes = ["model.", "init_from", "tokenizer", "seed", "lora.", "teacher.model"]
    prefixes += ["preference.loss", "preference.precompute_reference", "teacher.top_k"]
    if is_exported(run) and not changed.keys() & set(RUN_LENGTHS):
        prefixes.append("optimizer.")
    refused = [key for key in changed if key.startswith(tuple(prefixes)) and key not in told_later]
    if refused:
        told = "; ".join(f"{key} {changed[key]}" for key in refused)
        raise UserError(
            f"{run.path} was {'finished' if is_exported(run) else 'started'} with other settings ({told}); go on with "
            "those, or choose another run name"
        )
    for key, change in changed.items():
        announce(f"changed since the run was started: {key} {change}")


def is_finished(run: RunFolder, config: RunConfig) -> bool:
    """Whether the run has written its model with these settings; says so.

    Raises UserError when there is a model to write over, but no checkpoint of it to go on from.
    """
    if config.resume != "never" and is_exported(run) and not run.changed_settings(config):
        announce(f"{run.path} is finished; its model is {run.model}. Choose another run name to train again.")
        for change in changed_data(run, config):
            announce(f"changed since it was trained: {change}")
        return True
    if holds_model(run.model) and not run.checkpoint_steps():
        raise UserError(
            f"{run.model} is there, but {run.checkpoints} holds no checkpoint to go on from, and training from the "
            f"start would write over it; choose another run name (with --init_from {run.path} to start from that "
            "model), or remove the folder"
        )
    return False

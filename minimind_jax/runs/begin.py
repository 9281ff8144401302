"""A run begins: its folder, whether what is in it allows these settings, and all that its stage needs."""

import contextlib
import dataclasses
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from minimind_jax import hub
from minimind_jax.agreement import check_agreement, ending_together, exchange, on_all, on_first
from minimind_jax.config.sections import RUN_LENGTHS
from minimind_jax.config.stages import RunConfig
from minimind_jax.convert.hf import Labels
from minimind_jax.convert.replace import check_replaceable
from minimind_jax.data.kinds import KINDS
from minimind_jax.errors import UserError
from minimind_jax.folders import holds_model, resolve_run
from minimind_jax.paths import is_remote
from minimind_jax.runs.effect import check_effect
from minimind_jax.runs.kind import StageKind
from minimind_jax.runs.labels import labels_of_data
from minimind_jax.runs.parts import SHAPE_FIELDS, Run, assemble, check_weights, tell_template
from minimind_jax.runs.settle import changed_data, settle
from minimind_jax.sharding import announce, initialize_distributed, make_mesh
from minimind_jax.training.origin import agreed_settings, check_start_models, check_words, find_models
from minimind_jax.training.run import RunFolder, write_text
from minimind_jax.training.step import count_parts
from minimind_jax.training.tracking import is_exported

PATIENCE = 10.0  # seconds until a process must see what another has written


class Found(NamedTuple):
    """What is in the folder of a run that is about to begin."""

    steps: Sequence[int]  # of its checkpoints
    changed: dict[str, str]  # settings that are not those it was last started with, `old -> new`
    is_exported: bool  # its model is written

    @classmethod
    def look(cls, folder: RunFolder, config: RunConfig) -> "Found":
        return cls(folder.checkpoint_steps(), folder.changed_settings(config), is_exported(folder))

    @property
    def has_begun(self) -> bool:
        return bool(self.steps) or self.is_exported


def begin(kind: StageKind, config: RunConfig) -> Run | None:
    """Joins the run's processes, makes its folder and finds all that its stage needs; None, told, if it is finished.

    Raises UserError when the devices do not fit `config`, when `config.resume` does not allow what the folder holds,
    when it is a Hugging Face model itself, when a process of several does not see what the first writes there, and for
    what is wrong with the model that the run starts from, its tokenizer or its data.
    """
    initialize_distributed()
    folder = RunFolder(resolve_run(config.run))
    check_shared(folder)
    check_agreement(agreed_settings(config))
    # Whatever can be told before any data is read is.
    if holds_model(folder.path) and (folder.path / "tokenizer.json").is_file():
        raise UserError(
            f"{folder.path} is a Hugging Face model, not the folder of a run; choose another run name (with "
            f"--init_from {folder.path} to start from that model)"
        )
    folder.check_resume(config.resume)
    noted = folder.read_environment()
    hub.pin(noted.get("hub", {}))
    found = Found.look(folder, config)
    if found.has_begun and (stage := noted.get("run", {}).get("stage", kind.name)) != kind.name:
        raise UserError(f"{folder.path} is a run of {stage}; choose another run name for {kind.name}")
    check_settings(folder, found, kind.fixed)
    if found.is_exported and not found.changed and config.resume != "never":
        _open(folder)
        announce(f"{folder.path} is finished; its model is {folder.model}. Choose another run name to train again.")
        for change in changed_data(folder, config):
            announce(f"changed since it was trained: {change}")
        return None
    mesh = make_mesh(config.mesh)
    if config.training.batch_tokens is not None:
        count_parts(config, mesh)
    check_effect(config)
    check_replaceable(folder.model)
    models = on_all(lambda: find_models(config))
    check_start_models(folder, config, models)
    run = assemble(kind, config, folder, mesh, models)
    check_words(folder, run.tokenizer)
    if not found.steps:
        on_first(lambda: check_weights(models))
    _open(folder)
    if holds_model(folder.model) and not found.steps:
        raise UserError(
            f"{folder.model} is there, but {folder.checkpoints} holds no checkpoint to go on from, and training from "
            f"the start would write over it; choose another run name (with --init_from {folder.path} to start from "
            "that model), or remove the folder"
        )
    return _with_data(run, found)


def _with_data(run: Run, found: Found) -> Run:
    """The run with what follows from its data: labels, and a value for everything that its settings leave open."""
    if KINDS[run.kind.records].rendered and not run.kind.has_head:
        tell_template(run.tokenizer)
    if run.kind.labels:
        run = run.with_labels(Labels(run.kind.labels))
    elif run.kind.has_head:
        run = run.with_labels(*labels_of_data(run.config, run.folder, found.has_begun))
    return dataclasses.replace(run, config=on_all(lambda: settle(run)))


def _open(folder: RunFolder) -> None:
    folder.create()
    if jax.process_index() == 0:
        folder.lock()


@contextlib.contextmanager
def leaving_nothing(folder: Path) -> Iterator[None]:
    """A run that could not start leaves no folder behind, and ends on all processes if it does on one."""
    is_new = not is_remote(folder) and not folder.exists()
    try:
        with ending_together():
            yield
    except BaseException:  # Ctrl-C as well
        if is_new and jax.process_index() == 0:
            remove_unused(folder)
        raise


def remove_unused(folder: Path) -> None:
    """Removes a folder that holds a lock, empty folders and nothing else, and the one around it if it is empty then."""
    if not folder.is_dir() or any(path.is_file() and path.name != ".lock" for path in folder.rglob("*")):
        return
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()


def check_shared(run: RunFolder) -> None:
    """Raises UserError, on all processes, when one does not see a file that the first writes into the run's folder:
    checkpoints are written by all, which would wait for each other for ever."""
    if jax.process_count() == 1:
        return
    run.create()
    # A new name: what a network disk was asked for before it was there it may deny for a while.
    mark = run.path / f".processes-{exchange(secrets.token_hex(4))[0]}"
    on_first(lambda: write_text(mark, ""))
    late = time.monotonic() + PATIENCE
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


def check_settings(run: RunFolder, found: Found, fixed: Sequence[str] = ()) -> None:
    """Says which settings differ from those the run was started with. fixed: those of its stage that must not.

    Raises UserError when the weights that are there would not be those the settings describe: another start or kind of
    model (of other shapes: the checkpoint itself tells), or, in a finished run that is not made longer, another
    optimizer setting, which could have no effect.
    """
    if not found.has_begun:
        return
    told_later = {"optimizer.name", *(f"model.{name}" for name in SHAPE_FIELDS)}
    prefixes = ("model.", "init_from", "tokenizer", "seed", "lora.", *fixed)
    if found.is_exported and not found.changed.keys() & set(RUN_LENGTHS):
        prefixes += ("optimizer.",)
    refused = [key for key in found.changed if key.startswith(prefixes) and key not in told_later]
    if refused:
        told = "; ".join(f"{key} {found.changed[key]}" for key in refused)
        raise UserError(
            f"{run.path} was {'finished' if found.is_exported else 'started'} with other settings ({told}); go on with "
            "those, or choose another run name"
        )
    for key, change in found.changed.items():
        announce(f"changed since the run was started: {key} {change}")

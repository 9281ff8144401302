"""Checkpoints for resuming: the whole train state in float32, and a record of the data and settings it belongs to.

One checkpoint is a folder checkpoints/STEP written by Orbax: first under a temporary name in the background, then
renamed, so a kill at any moment leaves either the old set of checkpoints or the new one. The state is stored flat,
one array a name (`params.embed.embedding`, `opt_state.0.mu...`), so that it can be compared by name with the state of
the model at hand and be restored onto any mesh. In Google Cloud Storage, where nothing can be renamed, Orbax writes a
last object into a checkpoint that is whole.
"""

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from minimind_jax.errors import UserError
from minimind_jax.paths import absolute, as_path, is_remote

TEMPORARY = "*.orbax-checkpoint-tmp*"


@dataclasses.dataclass
class NewestAndBest:
    """An Orbax preservation policy: the newest `newest`, and of those with a validation loss the one with the lowest.

    val_losses: step -> validation loss. It may grow after a save, because a run saves before it evaluates.
    """

    newest: int
    best: bool
    val_losses: dict[int, float]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        preserved = set(sorted(steps)[-self.newest :])
        known = [step for step in steps if step in self.val_losses]
        if self.best and known:
            preserved.add(min(known, key=lambda step: (self.val_losses[step], step)))
        return [step in preserved for step in steps]


class Checkpoints:
    """The checkpoints of one run. All processes of a run call the same methods in the same order.

    Args:
        folder: where they are; created if needed. What a killed save left behind is removed.
        keep: newest checkpoints kept.
        val_losses: step -> validation loss, updated by the caller; the best checkpoint is kept too. None: not kept.

    Use as a context manager: leaving it waits for the save in progress.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, val_losses: dict[int, float] | None = None):
        self.folder = absolute(as_path(folder))
        _quieten()
        policy = NewestAndBest(keep, val_losses is not None, {} if val_losses is None else val_losses)
        self._checkpointer = ocp.training.Checkpointer(
            self.folder, preservation_policy=policy, cleanup_tmp_directories=True
        )
        self._pending = None
        self._failed = False

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.wait()
        except UserError:
            if error is None:
                raise
        finally:
            # After a failed save Orbax raises that failure again here; the user has been told.
            with contextlib.suppress(Exception) if self._failed else contextlib.nullcontext():
                self._checkpointer.close()

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints, ascending, the one being saved included."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def save(self, step: int, state: Any, record: dict) -> None:
        """Starts saving `state` (a pytree of arrays) and `record` (JSON) as checkpoint `step`; returns once `state`
        has been copied, so it may be donated. A checkpoint of that step that is already there is kept as it is.

        Raises:
            UserError: this save, or the one before it, failed; older checkpoints are intact.
        """
        self.wait()
        if step in self.steps:
            return
        try:
            self._pending = self._checkpointer.save_async(step, flatten(state), force=True, custom_metadata=record)
        except Exception as error:
            raise self._failure(error) from error

    def poll(self) -> None:
        """Raises the UserError of a save that has failed in the background; never waits for one in progress."""
        if self._pending is not None and not self._checkpointer.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the save in progress is finished on disk; raises as `save`."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception as error:
            raise self._failure(error) from error

    def record(self, step: int) -> dict:
        """What `save` was given as record, which must not have been empty. Raises UserError if it cannot be read."""
        with _reading(self.folder / str(step)):
            record = self._checkpointer.metadata(step).custom_metadata
            if not record:  # all that Orbax makes of an emptied file
                raise ValueError("its record is empty")
        return record

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Checkpoint `step` as a pytree like `abstract_state` (ShapeDtypeStructs with shardings).

        Raises:
            UserError: the checkpoint is of another model or optimizer (the first tensor that differs is named), or it
                cannot be read.
        """
        expected, checkpoint = flatten(abstract_state), self.folder / str(step)
        with _reading(checkpoint):
            _check_tensors(checkpoint, self._checkpointer.metadata(step).metadata, expected)
            restored = self._checkpointer.load(step, expected)
        leaves = [restored[name] for name in expected]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)

    def _failure(self, error: Exception) -> UserError:
        self._failed = True
        if is_remote(self.folder):
            return UserError(
                f"saving a checkpoint to {self.folder} failed: {_reason(error)}; older checkpoints are intact. Mend "
                "that, then run the same command again to resume"
            )
        if jax.process_index() == 0:
            for leftover in self.folder.glob(TEMPORARY):
                shutil.rmtree(leftover, ignore_errors=True)
        older = sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())
        kept = f"checkpoint {older[-1]} is intact" if older else "there is no earlier checkpoint"
        free = shutil.disk_usage(self.folder).free
        return UserError(
            f"saving a checkpoint to {self.folder} failed: {_reason(error)} ({free / 1e6:,.1f} MB are free there); "
            f"{kept}. Make room for one checkpoint more than is kept (checkpoint.keep, checkpoint.keep_best), then run "
            "the same command again to resume"
        )


def load_params(checkpoint: Path, abstract_params: Any) -> Any:
    """Only the parameters of the checkpoint in that folder, on the host, whatever mesh and optimizer they come from.

    Unlike `Checkpoints` this takes nothing away, so the run may be saving others meanwhile.
    Raises:
        UserError: the checkpoint is of another model, or cannot be read.
    """
    expected = {f"params.{name}": leaf for name, leaf in flatten(abstract_params).items()}
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    _quieten()
    with _reading(checkpoint), context:
        _check_tensors(checkpoint, ocp.metadata(absolute(checkpoint)).metadata, expected, prefix="params.")
        on_host = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in expected.items()}
        loaded = ocp.load(absolute(checkpoint), on_host)
    return jax.tree.unflatten(jax.tree.structure(abstract_params), [loaded[name] for name in expected])


def _quieten() -> None:
    """Orbax logs every phase of a save, and a failure once for each of its threads; failures are raised here."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@contextlib.contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    """Makes whatever Orbax raises for a damaged checkpoint a UserError that says what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        names = [path.name for path in checkpoint.parent.iterdir()]
        older = [int(name) for name in names if name.isdigit() and int(name) < int(checkpoint.name)]
        then = f"the one of step {max(older)} is used" if older else "there is none before it, so start another run"
        raise UserError(
            f"the checkpoint {checkpoint} cannot be read: {_reason(error)}; if it is damaged, remove that folder: "
            f"{then}"
        ) from error


def _check_tensors(checkpoint: Path, stored: dict | None, expected: dict, prefix: str = "") -> None:
    """Raises UserError for the first tensor that is on one side only or of another shape, of those with that prefix."""
    if stored is None:  # all that Orbax makes of an emptied file
        raise ValueError("its list of tensors is missing or damaged")
    stored = {name: tensor for name, tensor in stored.items() if name.startswith(prefix)}
    for name in list(expected) + [name for name in stored if name not in expected]:
        here, there = expected.get(name), stored.get(name)
        if here is not None and there is not None and tuple(here.shape) == tuple(there.shape):
            continue
        raise UserError(
            f"the checkpoint {checkpoint} is of another model or optimizer: {name} "
            f"{'is not in it' if there is None else f'has shape {tuple(there.shape)} there'} and "
            f"{'does not exist here' if here is None else f'should have {tuple(here.shape)}'}; use the settings "
            "of that run, or another run name"
        )


def flatten(tree: Any) -> dict[str, Any]:
    """{dotted path: leaf} of a pytree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _reason(error: BaseException) -> str:
    """What went wrong: the system's words for a full disk if they are in the chain, else the error's first line."""
    text = str(error)
    for phrase in ("No space left on device", "File too large", "Disk quota exceeded", "Permission denied"):
        if phrase in text:
            return phrase
    return f"{type(error).__name__}: {text.splitlines()[0][:300] if text else ''}"

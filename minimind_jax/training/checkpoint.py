"""Checkpoints for resuming: the whole train state in float32, and a record of the data and settings it belongs to.

One checkpoint is a folder checkpoints/STEP written by Orbax: first under a temporary name in the background, then
renamed, so a kill at any moment leaves either the old set of checkpoints or the new one. It is read back and its
checksums are written into it before an older one is removed; they are compared when it is restored. The state is
stored flat, one array a name (`params.embed.embedding`, `opt_state.0.mu...`), so that it can be compared by name with
the state of the model at hand and be restored onto any mesh. In Google Cloud Storage, where nothing can be renamed,
Orbax writes a last object into a checkpoint that is whole.
"""

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from minimind_jax.agreement import first_says
from minimind_jax.errors import UserError
from minimind_jax.paths import absolute, as_path, is_remote
from minimind_jax.sharding import announce
from minimind_jax.training.checkpoint_files import CHECKSUMS, damage, orbax_path, remove, write_checksums

TEMPORARY = "*.orbax-checkpoint-tmp*"


class DamagedCheckpoint(UserError):
    """A checkpoint that is not what was saved, or cannot be read; `problem` says why."""

    def __init__(self, checkpoint: Path, problem: str):
        self.problem = f"the checkpoint {checkpoint} cannot be read: {problem}"
        steps = [int(path.name) for path in checkpoint.parent.iterdir() if path.name.isdigit() and path != checkpoint]
        others = [step for step in steps if step < int(checkpoint.name)] or steps
        other = f"the one of step {max(others)} is used" if others else "there is no other, so start another run"
        super().__init__(f"{self.problem}; if it is damaged, remove that folder: {other}")


Best = Callable[[Sequence[int]], int | None]  # which of these steps is the best; None where that is not known


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of one run. All processes of a run call the same methods in the same order.

    folder: created if needed; what a killed save left behind there is removed. keep: newest checkpoints kept. best: of
    some steps the one whose checkpoint is kept, too. None: only the newest are.
    Use as a context manager: leaving it waits for the save in progress.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, best: Best | None = None):
        self.folder = absolute(as_path(folder))
        _quieten()
        self._checkpointer = ocp.training.Checkpointer(orbax_path(self.folder), cleanup_tmp_directories=True)
        self._keep, self._best = keep, best
        self._steps = [checkpoint.step for checkpoint in self._checkpointer.checkpoints]
        self._sound: set[int] = set()  # steps whose checksums were compared
        self._damaged: set[int] = set()
        self._background = ThreadPoolExecutor(1)
        self._pending: Future | None = None
        self._failed = False

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.wait()
        except UserError:
            if error is None:
                raise
        finally:
            self._background.shutdown()
            # After a failed save Orbax raises that failure again here; the user has been told.
            with contextlib.suppress(Exception) if self._failed else contextlib.nullcontext():
                self._checkpointer.close()

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints, ascending, the one being saved included, those found damaged not."""
        return list(self._steps)

    def newest(self) -> int:
        """The step of the newest checkpoint whose bytes are those that were saved, 0 where there is no checkpoint.

        Damaged ones after it are told, and saved anew when the run comes to their step.
        Raises UserError when all are damaged.
        """
        for step in reversed(self.steps):
            try:
                self._check(step)
            except DamagedCheckpoint as error:
                if len(self._steps) == 1:
                    raise UserError(f"{error.problem}, and there is none before it; start another run") from error
                announce(f"warning: {error.problem}; the one before it is used")
                self._steps.remove(step)
                self._damaged.add(step)
            else:
                return step
        return 0

    def save(self, step: int, state: Any, record: dict) -> None:
        """Starts saving `state` (a pytree of arrays) and `record` (JSON) as checkpoint `step`; returns once `state`
        has been copied, so it may be donated. A checkpoint of that step that is already there is kept as it is.

        Older checkpoints that this one supersedes are removed in the background, once it is whole and was read back.
        Raises UserError when this save, or the one before it, has failed; older checkpoints are intact.
        """
        self.wait()
        if step in self._steps:
            return
        arrays = flatten(state)
        try:
            response = self._checkpointer.save_async(
                step, arrays, force=True, overwrite=step in self._damaged, custom_metadata=record
            )
        except Exception as error:
            raise self._failure(error) from error
        self._steps = sorted({*self._steps, step})
        old = self._superseded()
        shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}
        self._pending = self._background.submit(self._finish, response, step, shapes, old)

    def _superseded(self) -> list[int]:
        """The steps that are kept no longer; they leave `steps`."""
        steps = self._steps
        self._steps = sorted({*steps[-self._keep :], self._best and self._best(steps)} & {*steps})
        return [step for step in steps if step not in self._steps]

    def _finish(self, response: Any, step: int, shapes: dict, old: list[int]) -> None:
        """Waits for Orbax; then the first process reads the new checkpoint back, and removes the old ones."""
        response.result()
        if jax.process_index():
            return
        checkpoint = self.folder / str(step)
        try:
            _check_tensors(checkpoint, shapes)
        except Exception as error:
            raise OSError(f"what was written cannot be read back: {_reason(error)}") from error
        write_checksums(checkpoint)
        for step in old:
            remove(self.folder / str(step))

    def poll(self) -> None:
        """Raises the UserError of a save that has failed in the background; never waits for one in progress."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the save in progress is finished on disk; raises as `save`."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except Exception as error:
            raise self._failure(error) from error

    def tidy(self) -> None:
        """Waits for the save in progress; then makes good what a kill has left undone behind the newest checkpoint, its
        checksums and the removal of older ones, and removes one that was the best before the last evaluation."""
        self.wait()
        old = self._superseded()
        if jax.process_index() or not self._steps:
            return
        newest = self.folder / str(self._steps[-1])
        try:
            if newest.exists() and not (newest / CHECKSUMS).exists():
                write_checksums(newest)
            for step in old:
                remove(self.folder / str(step))
        except Exception as error:  # of a disk, or of a store's own kind; the run itself is whole
            announce(f"warning: {self.folder} may hold checkpoints that are kept no longer: {_reason(error)}")

    def record(self, step: int) -> dict:
        """What `save` was given as record, which must not have been empty. Raises UserError if it cannot be read."""
        with _reading(self.folder / str(step)):
            record = self._checkpointer.metadata(step).custom_metadata
            if not record:  # all that Orbax makes of an emptied file
                raise ValueError("its record is empty")
        return record

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Checkpoint `step` as a pytree like `abstract_state` (ShapeDtypeStructs with shardings). Raises UserError when
        it is of another model or optimizer (the first tensor that differs is named), or cannot be read."""
        expected, checkpoint = flatten(abstract_state), self.folder / str(step)
        self._check(step)
        with _reading(checkpoint):
            _check_tensors(checkpoint, expected)
            restored = self._checkpointer.load(step, expected)
        leaves = [restored[name] for name in expected]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)

    def _check(self, step: int) -> None:
        """Raises DamagedCheckpoint, on all processes, when the first one finds the checkpoint damaged."""
        if step in self._sound:
            return
        checkpoint, error = self.folder / str(step), None
        if jax.process_index() == 0:
            try:
                check_sound(checkpoint)
            except DamagedCheckpoint as found:
                error = found
        if not first_says(error is None):
            raise error or DamagedCheckpoint(checkpoint, "process 0 says why")
        self._sound.add(step)

    def _failure(self, error: Exception) -> UserError:
        self._failed = True
        failed = f"saving a checkpoint to {self.folder} failed: {_reason(error)}"
        if is_remote(self.folder):
            return UserError(
                f"{failed}; older checkpoints are intact. Mend that, then run the same command again to resume"
            )
        if jax.process_index() == 0:
            for leftover in self.folder.glob(TEMPORARY):
                shutil.rmtree(leftover, ignore_errors=True)
        older = [int(path.name) for path in self.folder.iterdir() if path.name.isdigit()]
        kept = f"checkpoint {max(older)} is intact" if older else "there is no earlier checkpoint"
        return UserError(
            f"{failed} ({shutil.disk_usage(self.folder).free / 1e6:,.1f} MB are free there); {kept}. Make room for one "
            "checkpoint more than is kept (checkpoint.keep, checkpoint.keep_best), then run the same command again to "
            "resume"
        )


def load_params(checkpoint: Path, abstract_params: Any, beside: Sequence[str] = ()) -> Any:
    """Only the parameters of the checkpoint in that folder, on the host, whatever mesh and optimizer they come from.
    beside: branches of others that may be in it, and are left out.

    Unlike `Checkpoints` this takes nothing away, so the run may be saving others meanwhile.
    Raises DamagedCheckpoint, or UserError when the checkpoint is of another model.
    """
    check_sound(checkpoint)
    expected = {f"params.{name}": leaf for name, leaf in flatten(abstract_params).items()}
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with _reading(checkpoint), context:
        _check_tensors(checkpoint, expected, "params.", tuple(f"params.{name}." for name in beside))
        on_host = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in expected.items()}
        loaded = ocp.load(orbax_path(checkpoint), on_host)
    return jax.tree.unflatten(jax.tree.structure(abstract_params), [loaded[name] for name in expected])


def check_sound(checkpoint: Path) -> None:
    """Raises DamagedCheckpoint unless a checkpoint's bytes are those that were saved. One without checksums (of an
    older version, or killed before they were written) must have its list of tensors, and a word says so."""
    problem = damage(checkpoint)
    if problem is None:
        try:
            _listed_tensors(checkpoint)
        except Exception as error:
            problem = _reason(error)
        else:
            announce(f"{checkpoint} has no {CHECKSUMS}, so its bytes are not checked")
    if problem:
        raise DamagedCheckpoint(checkpoint, problem)


def _quieten() -> None:
    """Orbax logs every phase of a save, and a failure once for each of its threads; failures are raised here."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@contextlib.contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    """Makes whatever Orbax raises for a damaged checkpoint a DamagedCheckpoint, which says what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise DamagedCheckpoint(checkpoint, _reason(error)) from error


def _listed_tensors(checkpoint: Path) -> dict[str, Any]:
    _quieten()
    if not (listed := ocp.metadata(orbax_path(checkpoint)).metadata):  # all that Orbax makes of an emptied file
        raise ValueError("its list of tensors is missing or damaged")
    return listed


def _check_tensors(checkpoint: Path, expected: dict, prefix: str = "", but: tuple[str, ...] = ()) -> None:
    """Raises UserError for the first tensor that is on one side only or of another shape, of those with that prefix,
    but for those with one of the others."""
    listed = _listed_tensors(checkpoint).items()
    stored = {name: tensor for name, tensor in listed if name.startswith(prefix) and not name.startswith(but)}
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

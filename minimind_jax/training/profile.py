"""A trace of some steps, for Perfetto (perfetto_trace.json.gz) and XProf or TensorBoard (the folder)."""

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from minimind_jax.config.sections import TrainingConfig
from minimind_jax.paths import is_remote
from minimind_jax.training.run import RunFolder


class Profiler(contextlib.AbstractContextManager):
    """Traces `training.profile_steps` steps, the first being `training.profile_start` steps after `start_step`.

    The trace goes to run.path/profile, or a temporary folder when the run is in an object store.
    active: false on all processes but the first. say: told where the trace is.
    Use as a context manager: leaving it ends a trace that is under way.
    """

    def __init__(
        self, run: RunFolder, training: TrainingConfig, start_step: int, say: Callable[[str], None], *, active: bool
    ):
        self._first = start_step + training.profile_start + 1
        self._last = self._first + training.profile_steps - 1 if active else 0
        self._run, self._say = run, say
        self._folder: Path | None = None
        self._was_reached = self._last < self._first

    def __exit__(self, *_) -> None:
        if self._folder is not None:
            jax.profiler.stop_trace()
            self._say(f"the trace is {self._folder}: open its perfetto_trace.json.gz in https://ui.perfetto.dev")
            self._folder = None
        elif not self._was_reached:
            self._say(f"no trace was written: the run ended before step {self._first}, the first of the trace")

    def step(self, number: int, train_step: Callable, *arguments) -> Any:
        """`train_step(*arguments)`, as step `number` of the trace if it is to be traced."""
        if not self._first <= number <= self._last:
            return train_step(*arguments)
        if number == self._first:
            self._was_reached = True
            jax.block_until_ready(arguments)  # what was dispatched before is not of this trace
            is_object = is_remote(self._run.path)
            self._folder = Path(tempfile.mkdtemp(prefix="profile-")) if is_object else self._run.path / "profile"
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            result = train_step(*arguments)
        if number == self._last:
            jax.block_until_ready(result)
            self.__exit__()
        return result

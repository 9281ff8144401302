"""What is told of the steps of a run, and counted: metrics, updates that were not made, tokens and time."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from minimind_jax import STARTED
from minimind_jax.config.stages import RunConfig
from minimind_jax.errors import UserError
from minimind_jax.training.checkpoint import Checkpoints
from minimind_jax.training.progress import TrainingProgress
from minimind_jax.training.speed import Speed
from minimind_jax.training.step import MADE, NOT_FINITE, NOTHING, Skip
from minimind_jax.training.tracking import MetricsWriter
from minimind_jax.training.watch import Timetable

MOST_SKIPPED = 10  # updates that were not finite from which on a run stops where they are the most


class Step(NamedTuple):
    """A step that the device is doing: its metrics there, what the source told of it, and the size of its batch (see
    `Speed.size_of`)."""

    number: int
    metrics: Mapping[str, jax.Array]
    told: Mapping[str, float]
    size: np.ndarray


class Journal:
    """Writes metrics.jsonl and the progress of one run, a step behind the device, which so never waits for the host.

    record: of the checkpoint that the run goes on from (see `Journal.record`), {} at its start. skip: that of the step.
    """

    def __init__(
        self,
        config: RunConfig,
        timetable: Timetable,
        writer: MetricsWriter,
        progress: TrainingProgress,
        speed: Speed,
        record: Mapping[str, Any],
        checkpoints: Checkpoints,
        skip: Skip | None,
    ):
        self.config, self.timetable, self.speed, self.checkpoints = config, timetable, speed, checkpoints
        self.writer, self.progress = writer, progress
        self.tokens: int = record.get("tokens", 0)
        # Updates that were not made, by the names of their metrics: `skipped`, `skipped/METRIC`.
        self.skipped: dict[str, int] = {name: record[name] for name in record if name.startswith("skipped")}
        self._limits = [] if skip is None else list(skip.above.items())
        self._watched = config.training.watch.split()[-1]
        self._unread: Step | None = None

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of this: tokens trained on, updates not made, seconds."""
        return {"tokens": self.tokens, "skipped": 0, **self.skipped, "seconds": self.speed.seconds()}

    def follow(self, step: Step | None) -> None:
        """A step is under way: the one before it is done, or soon, and is read; so raises UserError when its metrics
        are not finite and the run is to stop then."""
        before, self._unread = self._unread, step
        if before is not None:
            self._read(before)

    @contextlib.contextmanager
    def caught_up(self) -> Iterator[None]:
        """For what is done between two steps: the one under way is waited for and read, and the time is no training."""
        self.follow(None)
        with self.speed.pause():
            yield

    def _read(self, step: Step) -> None:
        metrics = {name: value.item() for name, value in jax.device_get(step.metrics).items()}
        if not self.speed.has_begun:
            seconds = time.perf_counter() - STARTED
            self.progress.say(f"step {step.number}, the first here, was done {seconds:.1f} s after the program started")
        if (why := metrics.pop("skipped")) != MADE:
            self._skip(step.number, why, metrics)
        self.tokens += round(metrics.pop("tokens"))
        self.speed.add(step.size)
        skipped = {name: count for name, count in self.skipped.items() if count}
        row = {**metrics, "tokens": self.tokens, **step.told, **skipped}
        is_logged = self.timetable.logs(step.number)
        if is_logged:
            row |= self.speed.read()
        written = row if is_logged else {"loss": row["loss"], **step.told}
        self.writer.write(step.number, is_logged or bool(step.told), **written)
        left = self.timetable.total_steps - step.number
        beside = {name: value for name, value in step.told.items() if name == self._watched}
        self.progress.update(step.number, row | self.speed.forecast(left), beside, log=is_logged)

    def _skip(self, step: int, why: int, metrics: Mapping[str, float]) -> None:
        """Counts an update that was not made, and says so the first time and then ever more rarely."""
        if why == NOT_FINITE:
            name, reason = "skipped", "the loss or the gradient was not finite"
            if self.config.training.stop_on_nan:
                steps = self.checkpoints.steps
                kept = f"checkpoint {steps[-1]} is kept" if steps else "there is no checkpoint yet"
                raise UserError(
                    f"step {step}: the loss ({metrics['loss']}) or the gradient norm ({metrics['grad_norm']}) is not "
                    f"finite; the run has stopped; {kept}. {self._way_out()}; training.stop_on_nan false skips such "
                    "steps instead"
                )
        elif why == NOTHING:
            name, reason = "skipped/nothing", "no token of the batch is trained"
        else:
            metric, limit = self._limits[why - NOTHING - 1]
            name, reason = f"skipped/{metric}", f"{metric} was above {limit:g}, then or before in the stride"
        count = self.skipped[name] = self.skipped.get(name, 0) + 1
        told = f"{count:,} of {step:,} updates were skipped so far: {reason}"
        is_most = 2 * count > step and (count >= MOST_SKIPPED or step == self.timetable.total_steps)
        if why == NOT_FINITE and is_most:
            raise UserError(
                f"{told}. Most of them were, so the run has stopped and keeps its older checkpoints. {self._way_out()}"
            )
        if count & (count - 1) == 0:
            self.progress.say(f"[bold red]warning:[/] {told}")

    def _way_out(self) -> str:
        return (
            f"Try a lower optimizer.learning_rate (now {self.config.optimizer.learning_rate:g}), more "
            "optimizer.warmup_fraction, training.max_grad_norm 1, or compute.dtype float32, then run the same command "
            "again to go on from the checkpoint"
        )

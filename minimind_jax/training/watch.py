"""What happens after which steps of a run, which evaluation is the best, and whether the run gets no better."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from minimind_jax.config.sections import LoopConfig
from minimind_jax.config.stages import RunConfig
from minimind_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Timetable:
    """The steps are counted from 1; 0 is the start. stride: see `source.Source`."""

    config: RunConfig
    total_steps: int
    stride: int = 1

    def logs(self, step: int) -> bool:
        """Whether all metrics of a step are told, and not its loss alone."""
        return step in (1, self.total_steps) or step % self.config.training.log_every == 0

    def saves(self, step: int) -> bool:
        every, training = self.config.checkpoint.every, self.config.training
        return self._is_due(step, every) or (training.patience > 0 and self.evaluates(step))

    def evaluates(self, step: int) -> bool:
        return self._is_due(step, self.config.training.eval_every)

    def samples(self, step: int) -> bool:
        return self._is_due(step, self.config.training.sample_every)

    def _is_due(self, step: int, every: int) -> bool:
        """After every `every` steps and the last; what falls into a stride waits for its end."""
        is_due = every > 0 and step % self.stride == 0 and step // every > (step - self.stride) // every
        return is_due or step == self.total_steps


class Watch:
    """The number of every evaluation that `training.watch` names, such as `min loss` or `max accuracy`.

    values: step -> number, of the evaluations so far; one that is not finite is the worst.
    """

    def __init__(self, watch: str):
        self.direction, self.name = watch.split()
        self.values: dict[int, float] = {}

    @classmethod
    def of_run(cls, settings: Mapping[str, Any] | None, rows: Iterable[Mapping[str, Any]]) -> "Watch":
        """That of a run with these settings, as its config.yaml has them, and the evaluations in its metrics.jsonl."""
        training = (settings or {}).get("training")
        watch = cls(training["watch"] if isinstance(training, dict) and "watch" in training else LoopConfig.watch)
        watch.add_rows(rows)
        return watch

    @property
    def key(self) -> str:
        """Of the number in metrics.jsonl."""
        return f"val_{self.name}"

    def told(self) -> str:
        """What the best evaluation has, in words."""
        return f"validation {self.name} is the {'highest' if self.direction == 'max' else 'lowest'}"

    def add_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """The evaluations among the rows of a metrics.jsonl."""
        known = {row["step"]: row[self.key] for row in rows if self.key in row}
        self.values |= {step: math.nan if value is None else value for step, value in known.items()}

    def add(self, step: int, found: Mapping[str, float]) -> None:
        """The numbers of an evaluation. Raises UserError when the one that is watched is not among them."""
        if self.name not in found:
            raise UserError(
                f"training.watch is {self.direction} {self.name}, and an evaluation of this run gives "
                f"{', '.join(found)}; name one of these"
            )
        self.values[step] = found[self.name]

    def best(self, steps: Iterable[int]) -> int | None:
        """The step of the best evaluation at one of these steps, the first of several; None where there was none."""
        return min((step for step in steps if step in self.values), key=self._rank, default=None)

    def since_best(self) -> int:
        """Evaluations after the best one; that of the start, which is no result, does not count."""
        steps = sorted(step for step in self.values if step)
        return len(steps) - 1 - steps.index(self.best(steps)) if steps else 0

    def _rank(self, step: int) -> tuple[bool, float, int]:
        value = self.values[step]
        return not math.isfinite(value), -value if self.direction == "max" else value, step


def check_patience(training: LoopConfig, has_validation: bool) -> None:
    """Raises UserError for a run that is to wait for validation that it does not have."""
    if training.patience and (not has_validation or training.eval_every == 0):
        raise UserError(
            "training.patience needs validation: set data.val or data.val_fraction, and training.eval_every"
        )


def unwatched(training: LoopConfig, has_validation: bool) -> str | None:
    """A warning for a run whose `training.watch` means validation that it does not have."""
    if has_validation or training.watch == LoopConfig.watch:
        return None
    return f"training.watch {training.watch} is without effect: there is no validation (data.val, data.val_fraction)"

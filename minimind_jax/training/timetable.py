"""After which steps of a run something happens."""

import dataclasses

from minimind_jax.config.stages import RunConfig


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

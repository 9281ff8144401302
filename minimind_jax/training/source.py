"""What the loop is given: what is trained, where the batches come from, and how the model is judged."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from minimind_jax.config.sections import TrainingConfig
from minimind_jax.data.rows import Batch
from minimind_jax.losses import LossFn
from minimind_jax.model.transformer import Params
from minimind_jax.training.state import Parameters


class Source(Protocol):
    """Makes the batch of every optimizer step, from files or from the model itself.

    `packed.PackedRows` reads rows of a token cache. A source that learns from reward lets the live parameters write at
    the first step of each stride, scores what they wrote, makes `stride` batches of it and hands them out one a step.

    stride: optimizer steps that belong together. A run is saved, evaluated and stopped only after a multiple of it, or
    at its end. So what a source holds between the steps of a stride is part of no checkpoint: a run that goes on calls
    `next` for the first step of a stride, whose batch must follow from the step, the parameters and the run's seed.

    Steps count from 0 here: `step` is how many were done before. All processes call the same methods in the same order.
    """

    stride: int

    def planned_steps(self, training: TrainingConfig) -> int:
        """Optimizer steps of the whole run; a multiple of `stride`."""

    def record(self) -> dict[str, Any]:
        """What decides the batches, as JSON; kept in checkpoints."""

    def check_record(self, earlier: dict[str, Any]) -> str | None:
        """Compares the record of a checkpoint with this one: None, or a warning to be shown. Raises UserError where the
        steps of the checkpoint came of other batches, so that the run cannot go on."""

    def facts(self, steps: int) -> dict[str, str]:
        """What is printed at the start of a run of so many steps: `training data` and `steps`, at least."""

    def begin(self, step: int, steps: int, is_stopping: Callable[[], bool]) -> None:
        """The calls of `next` are about to come, for the steps [step, steps). Here begins what reads ahead.

        is_stopping: says at any time whether the run is to stop.
        """

    def next(self, step: int, params: Params) -> tuple[Batch, Mapping[str, float]] | None:
        """The batch of a step, this process's rows of it; and numbers to be logged with the step's metrics. None for
        the first step of a stride, where it gave up since the run is to stop; on all processes then.

        params: all of the model's, on the mesh, as the steps before left them. They are given to the step afterwards,
            which overwrites them: a source that needs them later copies them.
        Batch: NumPy arrays (rows / processes, ...) of one shape for all steps, which is what the loss reads. Its
            segment_ids, 0 for padding, tell the speed in tokens.
        Returns before the device has done the step before wherever it can: what it waits for, the device waits for.
        """

    def close(self) -> None:
        """Ends what was begun here or when the source was made. There may be no more calls than this."""


class Evaluation(Protocol):
    """Judges the parameters by numbers with names, `loss` among them where there is one; logged as val_NAME.

    It must give the same numbers for the same parameters, on all processes, whenever it is asked.
    """

    def describe(self) -> str:
        """On which data, in a few words."""

    def __call__(self, params: Params, is_stopping: Callable[[], bool]) -> dict[str, float] | None:
        """The numbers; None when it gave up since the run is to stop, which `is_stopping` says at any time."""


class Recipe(NamedTuple):
    """What a stage trains, and on what."""

    source: Source  # of the batches
    loss_fn: LossFn  # of a batch and the parameters (see `losses`)
    parameters: Parameters  # those that are trained, and what the loss reads beside them
    evaluation: Evaluation | None = None  # at `training.eval_every`; None without validation data
    # writes what else belongs to the run, about the model that it has written; on the first process
    judge: Callable[[], None] | None = None
    # limits of metrics above which an update is not made (see `step.Skip`)
    skip_above: Mapping[str, float] | None = None
    flops_beside: float | None = 0.0  # of a token, in other models that the loss asks; None for no MFU (see `speed`)

"""How every stage runs: it begins, trains what its recipe says, and writes its model and report."""

from collections.abc import Callable
from pathlib import Path

from minimind_jax.config.stages import RunConfig
from minimind_jax.data.batches import Batches
from minimind_jax.folders import resolve_run
from minimind_jax.losses import LossFn
from minimind_jax.runs.begin import begin, leaving_nothing
from minimind_jax.runs.finish import finish
from minimind_jax.runs.kind import StageKind
from minimind_jax.runs.parts import Run
from minimind_jax.runs.samples import sampler
from minimind_jax.training.loop import SampleFn, TrainResult, train
from minimind_jax.training.packed import HeldOutRows, PackedRows
from minimind_jax.training.source import Recipe
from minimind_jax.training.state import Parameters


def run_stage(kind: StageKind, config: RunConfig, recipe: Callable[[Run], Recipe]) -> Path:
    """Trains by the recipe and returns the run's folder (see `training.run`), whose model/ holds what was trained.

    A run that was cut off goes on; a finished one returns at once.
    Raises:
        UserError: anything in the settings, the data or the machine that the user can mend.
        Interrupted: the run was asked to stop and has saved its state.
    """
    folder = resolve_run(config.run)
    with leaving_nothing(folder):
        if run := begin(kind, config):
            sample_fn = sampler(run)
            made = recipe(run)
            finish(run, train_run(run, made, sample_fn), made.judge)
    return folder


def train_run(run: Run, recipe: Recipe, sample_fn: SampleFn | None = None) -> TrainResult:
    """Trains a run that has begun; writes neither its model nor its report."""
    return train(
        run.config, recipe, stage=run.kind.name, model=run.model, has_words=not run.kind.has_head, run=run.folder,
        mesh=run.mesh, sample_fn=sample_fn,
    )  # fmt: skip


def on_rows(run: Run, loss_fn: LossFn, parameters: Parameters, rows: tuple[Batches, Batches | None]) -> Recipe:
    """Training on packed rows, evaluated by the loss of the held-out ones."""
    trained, held_out = rows
    evaluation = None if held_out is None else HeldOutRows(run.config, run.mesh, loss_fn, held_out)
    return Recipe(PackedRows(trained), loss_fn, parameters, evaluation)

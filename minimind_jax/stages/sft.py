"""Stage: supervised fine-tuning on conversations; the model learns what the assistant says."""

from pathlib import Path

from minimind_jax.config.stages import SFTConfig
from minimind_jax.losses.language_model import make_language_model_loss
from minimind_jax.runs.parts import Run, open_rows, run_parameters
from minimind_jax.runs.stage import Recipe, on_rows, run_stage
from minimind_jax.stages import STAGES


def sft(config: SFTConfig) -> Path:
    """Fine-tunes a model on the conversations of `config.data` and returns the run's folder (see `run_stage`).

    Data: records with `conversations`, rendered by the chat template, whole conversations packed into rows.
    Loss: cross entropy of the assistant's tokens, its end of turn included; all else is context. Trained: all
    parameters, or adapters.
    """
    return run_stage(STAGES["sft"], config, _recipe)


def _recipe(run: Run) -> Recipe:
    loss_fn = make_language_model_loss(run.model, run.config.training.z_loss)
    return on_rows(run, loss_fn, run_parameters(run), open_rows(run))

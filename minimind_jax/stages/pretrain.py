"""Stage: pretraining, next-token prediction on plain text, from scratch or from a model."""

from pathlib import Path

from minimind_jax.config.stages import PretrainConfig
from minimind_jax.losses.language_model import make_language_model_loss
from minimind_jax.runs.parts import Run, open_rows, run_parameters
from minimind_jax.runs.stage import on_rows, run_stage
from minimind_jax.stages import STAGES
from minimind_jax.training.source import Recipe


def pretrain(config: PretrainConfig) -> Path:
    """Trains a language model on the texts of `config.data` and returns the run's folder (see `run_stage`).

    Data: records with a `text`, between the tokenizer's begin and end tokens, packed into rows of `data.seq_len`.
    Loss: cross entropy of every next token of the same document. Trained: all parameters, or adapters.
    """
    return run_stage(STAGES["pretrain"], config, next_token_recipe)


def next_token_recipe(run: Run) -> Recipe:
    """The cross entropy of the tokens that are trained, by which fine-tuning learns, too."""
    loss_fn = make_language_model_loss(run.model, run.config.training.z_loss)
    return on_rows(run, loss_fn, run_parameters(run), open_rows(run))

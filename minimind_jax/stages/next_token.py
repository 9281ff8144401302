"""Stages of next tokens: pretraining on plain text, from scratch or from a model, and fine-tuning on conversations."""

from minimind_jax.losses.language_model import make_language_model_loss
from minimind_jax.runs.parts import Run, open_rows, run_parameters
from minimind_jax.runs.stage import on_rows
from minimind_jax.training.source import Recipe


def recipe(run: Run) -> Recipe:
    """Data: texts between the tokenizer's begin and end tokens, or conversations, rendered by the chat template; packed
    into rows of `data.seq_len`. Loss: cross entropy of every next token of the same document, of conversations only of
    the assistant's and its end of turn. Trained: all parameters, or adapters."""
    loss_fn = make_language_model_loss(run.model, run.config.training.z_loss)
    return on_rows(run, loss_fn, run_parameters(run), open_rows(run))

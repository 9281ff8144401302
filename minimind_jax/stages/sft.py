"""Stage: supervised fine-tuning on conversations; the model learns what the assistant says."""

from pathlib import Path

from minimind_jax.config.stages import SFTConfig
from minimind_jax.runs.stage import run_stage
from minimind_jax.stages import STAGES
from minimind_jax.stages.pretrain import next_token_recipe


def sft(config: SFTConfig) -> Path:
    """Fine-tunes a model on the conversations of `config.data` and returns the run's folder (see `run_stage`).

    Data: records with `conversations`, rendered by the chat template, whole conversations packed into rows.
    Loss: cross entropy of the assistant's tokens, its end of turn included; all else is context. Trained: all
    parameters, or adapters.
    """
    return run_stage(STAGES["sft"], config, next_token_recipe)

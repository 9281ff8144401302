"""Stage: a model that scores conversations, trained on pairs of answers (Bradley-Terry)."""

from pathlib import Path

from minimind_jax.config.stages import RewardConfig
from minimind_jax.losses.reward import make_reward_loss
from minimind_jax.losses.sequences import pair_room
from minimind_jax.runs.labels import values_of_pieces
from minimind_jax.runs.parts import Run, open_rows, run_parameters
from minimind_jax.runs.stage import on_rows, run_stage
from minimind_jax.stages import STAGES
from minimind_jax.training.source import Recipe


def reward(config: RewardConfig) -> Path:
    """Trains a reward model on the pairs of `config.data` and returns the run's folder (see `run_stage`).

    Data: records with `chosen` and `rejected` conversations and optionally a `margin`. Loss: Bradley-Terry on the
    scores of the conversations' last tokens (see `losses.reward`). Trained: all parameters, or adapters, and the head
    of one score. Written: as model/ a Qwen3ForSequenceClassification with one label; adapters are merged.
    """
    return run_stage(STAGES["reward"], config, _recipe)


def _recipe(run: Run) -> Recipe:
    room = pair_room(run.config.data.seq_len)
    rows = open_rows(run, lambda cache, pieces: {"margins": values_of_pieces(cache, pieces, room)[..., 0]})
    return on_rows(run, make_reward_loss(run.model, run.config.centring), run_parameters(run), rows)

"""Stage: a model that scores conversations, trained on pairs of answers (Bradley-Terry)."""

from minimind_jax.losses.reward import make_reward_loss
from minimind_jax.losses.sequences import pair_room
from minimind_jax.runs.labels import values_of_pieces
from minimind_jax.runs.parts import Run, open_rows, run_parameters
from minimind_jax.runs.stage import on_rows
from minimind_jax.training.source import Recipe


def recipe(run: Run) -> Recipe:
    """Data: records with `chosen` and `rejected` conversations and optionally a `margin`. Loss: Bradley-Terry on the
    scores of the conversations' last tokens (see `losses.reward`). Trained: all parameters, or adapters, and the head
    of one score. Written: as model/ a Qwen3ForSequenceClassification with one label; adapters are merged."""
    room = pair_room(run.config.data.seq_len)
    rows = open_rows(run, lambda cache, pieces: {"margins": values_of_pieces(cache, pieces, room)[..., 0]})
    return on_rows(run, make_reward_loss(run.model, run.config.centring), run_parameters(run), rows)

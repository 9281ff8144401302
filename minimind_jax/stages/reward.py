"""Stage: a model that scores conversations, trained on pairs of answers (Bradley-Terry)."""

from pathlib import Path

from minimind_jax.config.stages import RewardConfig
from minimind_jax.convert.hf import Labels
from minimind_jax.data.open import open_data
from minimind_jax.data.rows import Batch, Pieces
from minimind_jax.data.token_cache import TokenCache
from minimind_jax.losses.reward import make_reward_loss
from minimind_jax.losses.sequences import pair_room
from minimind_jax.runs.begin import is_finished, start_run, tidy
from minimind_jax.runs.finish import finish_run
from minimind_jax.runs.heads import load_body, values_of_pieces, with_head
from minimind_jax.runs.models import check_context, load_tokenizer
from minimind_jax.runs.settle import settle
from minimind_jax.sharding import data_process, make_mesh
from minimind_jax.shell import command
from minimind_jax.training.packed import train_on_rows

LABELS = Labels(("reward",))


@tidy
def reward(config: RewardConfig) -> Path:
    """Trains a reward model on the pairs of `config.data` and returns the run's folder.

    Data: records with `chosen` and `rejected` conversations and optionally a `margin`. Loss: Bradley-Terry on the
    scores of the conversations' last tokens (see `losses.reward`). Trained: all parameters, or adapters, and the head
    of one score. Written: the run's folder, whose model/ is a Qwen3ForSequenceClassification with one label; adapters
    are merged. A run that was cut off goes on; a finished one returns at once.

    Raises:
        UserError: anything in the settings, the data or the machine that the user can mend.
        Interrupted: the run was asked to stop and has saved its state.
    """
    run = start_run(config)
    if is_finished(run, config):
        return run.path

    tokenizer = load_tokenizer(config)
    model = load_body(config, tokenizer, "reward")
    check_context(config, model)
    config = settle(config, "preference", tokenizer, model, run)
    values = values_of_pieces("margins", pair_room(config.data.seq_len))

    def margins(cache: TokenCache, pieces: Pieces) -> Batch:
        return {name: array[..., 0] for name, array in values(cache, pieces).items()}

    train_batches, val_batches = open_data(
        "preference", config, tokenizer, *data_process(make_mesh(config.mesh)), annotate=margins
    )
    result = train_on_rows(
        config,
        stage="reward",
        model=model,
        parameters=with_head(config, model, LABELS),
        loss_fn=make_reward_loss(model, config.centring),
        train_batches=train_batches,
        val_batches=val_batches,
        run=run,
    )
    hint = f"  {command('score', '--model', run.model, '--input', 'YOUR_CONVERSATIONS.jsonl')}"
    labels = LABELS._replace(max_tokens=config.data.seq_len)
    return finish_run(run, config, model, tokenizer, result, hint, labels)

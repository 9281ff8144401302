"""Stage: pretraining, next-token prediction on plain text, from scratch or from a model."""

from pathlib import Path

from minimind_jax.config.stages import PretrainConfig
from minimind_jax.data.documents import begun
from minimind_jax.data.open import open_data
from minimind_jax.losses.language_model import make_language_model_loss
from minimind_jax.runs.begin import is_finished, start_run, tidy
from minimind_jax.runs.finish import finish_run
from minimind_jax.runs.models import build_model, check_context, load_tokenizer, run_parameters
from minimind_jax.runs.samples import sampler, with_prompts
from minimind_jax.runs.settle import settle
from minimind_jax.sharding import data_process, make_mesh
from minimind_jax.shell import command
from minimind_jax.training.packed import train_on_rows


@tidy
def pretrain(config: PretrainConfig) -> Path:
    """Trains a language model on the texts of `config.data` and returns the run's folder, whose model/ holds it.

    Data: records with a `text`, between the tokenizer's begin and end tokens, packed into rows of `data.seq_len`.
    Loss: cross entropy of every next token of the same document. Trained: all parameters.
    Written: the run's folder (see `training.run`). A run that was cut off goes on; a finished one returns at once.

    Raises:
        UserError: anything in the settings, the data or the machine that the user can mend.
        Interrupted: the run was asked to stop and has saved its state.
    """
    run = start_run(config)
    if is_finished(run, config):
        return run.path

    tokenizer = load_tokenizer(config)
    model = build_model(config, tokenizer)
    check_context(config, model)
    config = settle(config, "text", tokenizer, model, run)

    def encode(prompt: str) -> list[int]:
        return begun(tokenizer, tokenizer.encode(prompt))

    sample_fn = sampler(model, tokenizer, with_prompts(config, "text"), config.seed, encode)
    train_batches, val_batches = open_data("text", config, tokenizer, *data_process(make_mesh(config.mesh)))
    result = train_on_rows(
        config,
        stage="pretrain",
        model=model,
        parameters=run_parameters(config, model),
        loss_fn=make_language_model_loss(model, config.training.z_loss),
        train_batches=train_batches,
        val_batches=val_batches,
        run=run,
        sample_fn=sample_fn,
    )
    hint = (
        f"  {command('chat', '--model', run.model)}\n"
        f"  {command('sft', '--init_from', run.path, '--data.train', 'YOUR_CONVERSATIONS.jsonl', '--run', 'NAME')}"
    )
    return finish_run(run, config, model, tokenizer, result, hint)

"""Stage: distillation; a student learns from conversations and from a larger model's probabilities at once."""

from pathlib import Path

import jax

from minimind_jax.config.stages import DistillConfig
from minimind_jax.convert.hf import load_labels
from minimind_jax.convert.load import load_merged, read_config
from minimind_jax.convert.load import load_tokenizer as load_model_tokenizer
from minimind_jax.data.documents import encode_prompt
from minimind_jax.data.open import open_data
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.folders import is_adapter, resolve_model_folder
from minimind_jax.losses.distillation import TEACHER, make_distillation_loss
from minimind_jax.model.precision import cast_matrices
from minimind_jax.model.transformer import LanguageModel, Params
from minimind_jax.runs.begin import is_finished, start_run, tidy
from minimind_jax.runs.finish import finish_run
from minimind_jax.runs.frozen import StoredTeacher
from minimind_jax.runs.models import build_model, check_context, load_tokenizer, run_parameters, say_if_endless
from minimind_jax.runs.samples import sampler, with_prompts
from minimind_jax.runs.settle import settle
from minimind_jax.sharding import data_process, make_mesh, param_shardings
from minimind_jax.shell import command
from minimind_jax.training.packed import train_on_rows
from minimind_jax.training.state import Parameters


@tidy
def distill(config: DistillConfig) -> Path:
    """Trains a student on the conversations of `config.data` and `config.teacher`, and returns the run's folder.

    Data: as in fine-tuning. Loss: cross entropy of the assistant's tokens and the divergence from the teacher's
    probabilities of them (see `losses.distillation`); it is asked at every step, or once before the first one (top_k).
    Trained: all parameters, or adapters; the teacher is cut over the mesh as the student is. Written: the run's folder
    (see `training.run`). A run that was cut off goes on; a finished one returns at once.

    Raises:
        UserError: anything in the settings, the data or the machine that the user can mend, such as a teacher with
            another vocabulary.
        Interrupted: the run was asked to stop and has saved its state.
    """
    run = start_run(config)
    if is_finished(run, config):
        return run.path

    tokenizer = load_tokenizer(config)
    model = build_model(config, tokenizer)
    check_context(config, model)
    say_if_endless(tokenizer)
    config = settle(config, "conversation", tokenizer, model, run)
    teacher, folder = load_teacher(config, tokenizer)

    def encode(prompt: str) -> list[int]:
        return encode_prompt(tokenizer, [{"role": "user", "content": prompt}])

    sample_fn = sampler(model, tokenizer, with_prompts(config, "conversation"), config.seed, encode)
    wanted, annotate, ask = config.teacher, None, None
    parameters = run_parameters(config, model)
    words = min(model.config.vocab_size, teacher.config.vocab_size)
    if wanted.top_k:
        known = load_teacher_params(config, teacher, folder)
        annotate = StoredTeacher(config, teacher, known, words, tokenizer, run).annotate
        del known
    else:
        parameters = with_teacher(config, parameters, teacher, folder)

        def ask(params: Params) -> tuple[LanguageModel, Params]:
            return teacher, params[TEACHER]

    train_batches, val_batches = open_data(
        "conversation", config, tokenizer, *data_process(make_mesh(config.mesh)), annotate=annotate
    )
    result = train_on_rows(
        config,
        stage="distill",
        model=model,
        parameters=parameters,
        loss_fn=make_distillation_loss(
            model,
            ask,
            alpha=wanted.alpha,
            temperature=wanted.temperature,
            divergence=wanted.divergence,
            jsd_beta=wanted.jsd_beta,
            words=words,
        ),
        train_batches=train_batches,
        val_batches=val_batches,
        run=run,
        sample_fn=sample_fn and (lambda params: sample_fn(without_teacher(params))),
    )
    result = result._replace(params=without_teacher(result.params))
    hint = f"  {command('chat', '--model', run.model)}"
    return finish_run(run, config, model, tokenizer, result, hint)


def load_teacher(config: DistillConfig, tokenizer: Tokenizer) -> tuple[LanguageModel, Path]:
    """The teacher's network, and its folder. Raises UserError when its tokens are not the student's."""
    if not config.teacher.model:
        raise UserError("distill needs a teacher: give --teacher.model, a Hugging Face folder or a run")
    folder = resolve_model_folder(config.teacher.model, "teacher.model")
    if not is_adapter(folder) and load_labels(folder) is not None:
        raise UserError(f"teacher.model {folder} is a classifier or reward model; a teacher must be a language model")
    theirs = load_model_tokenizer(folder)
    if theirs.vocabulary() != tokenizer.vocabulary():
        raise UserError(
            f"teacher.model {folder} has another vocabulary ({theirs.vocab_size:,} tokens) than the student's "
            f"tokenizer {tokenizer.folder} ({tokenizer.vocab_size:,}): their probabilities cannot be compared. Let it "
            "answer instead (minimind generate --model TEACHER --input PROMPTS.jsonl --as_conversations true), and "
            "fine-tune on the answers"
        )
    model = LanguageModel(read_config(folder), config.compute)
    if model.config.vocab_size < tokenizer.vocab_size:
        raise UserError(f"teacher.model {folder}: its vocab_size {model.config.vocab_size} is below its tokenizer's")
    if config.data.seq_len > model.config.max_position_embeddings:
        raise UserError(
            f"data.seq_len {config.data.seq_len} is above the teacher's context of "
            f"{model.config.max_position_embeddings} tokens"
        )
    return model, folder


def load_teacher_params(config: DistillConfig, teacher: LanguageModel, folder: Path) -> Params:
    """The teacher's parameters in the compute dtype, on the mesh."""
    abstract = _abstract_teacher(config, teacher)
    _, known = load_merged(folder)
    known = {name: tree for name, tree in known.items() if name in abstract}
    lies = param_shardings(make_mesh(config.mesh), teacher.logical_axes(), abstract)
    return jax.device_put(cast_matrices(known, teacher.dtype), lies)


def _abstract_teacher(config: DistillConfig, teacher: LanguageModel) -> Params:
    return jax.eval_shape(lambda params: cast_matrices(params, teacher.dtype), teacher.abstract_params())


def with_teacher(config: DistillConfig, parameters: Parameters, teacher: LanguageModel, folder: Path) -> Parameters:
    """The parameters with the teacher's, which are never trained."""
    return Parameters(
        {**parameters.abstract, TEACHER: _abstract_teacher(config, teacher)},
        {**parameters.axes, TEACHER: teacher.logical_axes()},
        lambda: {**parameters.load(), TEACHER: load_teacher_params(config, teacher, folder)},
        lambda path: path[0] != TEACHER and parameters.is_trained(path),
    )


def without_teacher(params: Params) -> Params:
    """The student's own parameters."""
    return {name: tree for name, tree in params.items() if name != TEACHER}

"""Stage: distillation; a student learns from conversations and from a larger model's probabilities at once."""

import jax
import numpy as np

from minimind_jax.convert.hf import load_labels
from minimind_jax.convert.load import load_merged, load_tokenizer, read_config
from minimind_jax.errors import UserError
from minimind_jax.folders import is_adapter
from minimind_jax.losses.distillation import make_distillation_loss, teacher_likeliest
from minimind_jax.model.transformer import LanguageModel, Params, cast_matrices
from minimind_jax.paths import is_remote
from minimind_jax.runs.frozen import TOKENS, Answers, Asked
from minimind_jax.runs.parts import Run, on_mesh, open_rows, run_parameters
from minimind_jax.runs.stage import on_rows
from minimind_jax.training.source import Recipe
from minimind_jax.training.speed import forward_flops

TEACHER = "teacher"  # the key of its parameters


def recipe(run: Run) -> Recipe:
    """Data: as in fine-tuning. Loss: cross entropy of the assistant's tokens and the divergence from the teacher's
    probabilities of them (see `losses.distillation`); it is asked at every step, or once before the first one (top_k).
    Trained: all parameters, or adapters; the teacher is cut over the mesh as the student is."""
    wanted, parameters, teacher = run.config.teacher, run_parameters(run), _teacher(run)
    words = min(run.model.config.vocab_size, teacher.config.vocab_size)
    abstract = jax.eval_shape(lambda params: cast_matrices(params, teacher.dtype), teacher.abstract_params())
    axes = teacher.logical_axes()

    def load(_: Params) -> Params:
        _, known = load_merged(run.models["teacher.model"])
        return on_mesh(run.mesh, cast_matrices(known, teacher.dtype), abstract, axes)

    def ask(params: Params) -> tuple[LanguageModel, Params]:
        return teacher, params[TEACHER]

    annotate = None
    if wanted.top_k:
        annotate = Answers(run, _likeliest(run, teacher, words), load({})).annotate
    else:
        parameters = parameters.adding(TEACHER, abstract, axes, load)
    loss_fn = make_distillation_loss(
        run.model, None if wanted.top_k else ask, alpha=wanted.alpha, temperature=wanted.temperature,
        divergence=wanted.divergence, jsd_beta=wanted.jsd_beta, words=words,
    )  # fmt: skip
    asked = 0.0 if wanted.top_k else forward_flops(teacher.config, run.config.data.seq_len)
    return on_rows(run, loss_fn, parameters, open_rows(run, annotate))._replace(flops_beside=asked)


def _teacher(run: Run) -> LanguageModel:
    """The teacher's network. Raises UserError when its tokens are not the student's."""
    if "teacher.model" not in run.models:
        raise UserError("distill needs a teacher: give --teacher.model, a Hugging Face folder or a run")
    folder, tokenizer = run.models["teacher.model"], run.tokenizer
    if not is_adapter(folder) and load_labels(folder) is not None:
        raise UserError(f"teacher.model {folder} is a classifier or reward model; a teacher must be a language model")
    theirs = load_tokenizer(folder)
    if theirs.vocabulary() != tokenizer.vocabulary():
        raise UserError(
            f"teacher.model {folder} has another vocabulary ({theirs.vocab_size:,} tokens) than the student's "
            f"tokenizer {tokenizer.folder} ({tokenizer.vocab_size:,}): their probabilities cannot be compared. Let it "
            "answer instead (minimind generate --model TEACHER --input PROMPTS.jsonl --as_conversations true), and "
            "fine-tune on the answers"
        )
    model = LanguageModel(read_config(folder), run.config.compute)
    if model.config.vocab_size < tokenizer.vocab_size:
        raise UserError(f"teacher.model {folder}: its vocab_size {model.config.vocab_size} is below its tokenizer's")
    if (seq_len := run.config.data.seq_len) > (context := model.config.max_position_embeddings):
        raise UserError(f"data.seq_len {seq_len} is above the teacher's context of {context} tokens")
    return model


def _likeliest(run: Run, teacher: LanguageModel, words: int) -> Asked:
    """The teacher's likeliest words of every token. Raises UserError for settings under which they cannot be stored."""
    wanted, data, place = run.config.teacher, run.config.data, run.folder.path
    if wanted.top_k > words:
        raise UserError(f"teacher.top_k {wanted.top_k} is above the vocabulary of {words} words")
    if is_remote(place):
        raise UserError(f"teacher.top_k needs a run on a disk, not {place}; set it to 0, or choose another run")
    if data.packing == "concat":
        raise UserError(
            "data.packing concat cuts documents at other places in every epoch, so a stored teacher would not fit; "
            "choose best_fit or pad, or teacher.top_k 0"
        )
    if data.redraw_each_epoch:
        raise UserError(
            "data.redraw_each_epoch changes the conversations in every epoch, so a stored teacher would not fit; drop "
            "it, or choose teacher.top_k 0"
        )

    def ask(params, batch):
        return teacher_likeliest(teacher, params, batch, wanted.top_k, words, wanted.temperature)

    ids = np.uint16 if words <= 2**16 else np.uint32
    asked = {"top_k": wanted.top_k, "temperature": wanted.temperature, "words": words}
    return Asked(
        name="teacher",
        setting=f"teacher.model {wanted.model}",
        unit=TOKENS,
        columns={"teacher_ids": ("ids", ids), "teacher_log_probs": ("log_probs", np.float32)},
        width=wanted.top_k,
        ask=ask,
        made_of={**asked, "seq_len": data.seq_len, "packing": data.packing},
        what=f"the {wanted.top_k} likeliest words of every token",
        way_out=", or lower teacher.top_k",
    )

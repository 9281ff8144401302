"""Stages of models that see: a projector is trained on pictures and what they show, then conversations about them."""

from minimind_jax.data.pixels import Pixels
from minimind_jax.losses.language_model import make_language_model_loss
from minimind_jax.runs.parts import Run, open_rows, run_parameters
from minimind_jax.runs.stage import on_rows
from minimind_jax.training.source import Recipe


def recipe(run: Run) -> Recipe:
    """Data: conversations with images, packed into rows of `data.seq_len` tokens and `data.images_per_row` images,
    which are read when a batch is made. Loss: cross entropy of the assistant's words and its end of turn. Trained: what
    `vision.train` says, or adapters. Written: as model/ a LlavaForConditionalGeneration."""
    vision = run.model.config.vision
    pixels = Pixels(vision.tower, run.config.data.image_room(vision.image_tokens))
    loss_fn = make_language_model_loss(run.model, 0.0)
    return on_rows(run, loss_fn, run_parameters(run), open_rows(run, pixels.annotate))

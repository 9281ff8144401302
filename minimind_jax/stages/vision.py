"""Stages of models that see: a projector is trained on pictures and what they show, then conversations about them."""

from minimind_jax.data.batches import Batches
from minimind_jax.errors import UserError
from minimind_jax.losses.language_model import make_language_model_loss
from minimind_jax.runs.image_rows import open_pictures
from minimind_jax.runs.parts import Run, run_parameters
from minimind_jax.runs.stage import on_rows
from minimind_jax.runs.vision_report import judge_seeing
from minimind_jax.sharding import announce
from minimind_jax.training.source import Recipe


def recipe(run: Run) -> Recipe:
    """Data: conversations with images, packed into rows of `data.seq_len` tokens and `data.images_per_row` images,
    which are read when a batch is made, or looked at once before the first step. Loss: cross entropy of the assistant's
    words and its end of turn. Trained: what `vision.train` says, or adapters. Written: as model/ a
    LlavaForConditionalGeneration; results.md shows what it says of held-out pictures."""
    data, image_tokens = run.config.data, run.model.config.vision.image_tokens
    trained, held_out = open_pictures(run, data.image_room(image_tokens), data.cache_features)
    _check_shown(run, trained)
    made = on_rows(run, make_language_model_loss(run.model, 0.0), run_parameters(run), (trained, held_out))
    return made if held_out is None else made._replace(judge=lambda: judge_seeing(run, held_out))


def _check_shown(run: Run, trained: Batches) -> None:
    """Tells that no row has a picture. Raises UserError where the projector alone would learn, and learns nothing."""
    if trained.cache.pictures.counts(run.config.data.seq_len)[trained.epoch(0).documents].any():
        return
    told = "no conversation that is trained on shows a picture (`image`, `images`, `image_bytes` or parts of a message)"
    if run.config.vision.train == "projector" and not run.config.lora.rank:
        raise UserError(
            f"{told}, and vision.train projector learns from pictures alone; add some, or train texts by sft"
        )
    announce(f"warning: {told}; this run trains on texts alone")

"""The packed rows of a run's records."""

from minimind_jax.data.batches import Batches
from minimind_jax.data.epoch import Annotate
from minimind_jax.data.open import open_data
from minimind_jax.runs.parts import Run
from minimind_jax.sharding import data_process


def open_rows(run: Run, annotate: Annotate | None = None) -> tuple[Batches, Batches | None]:
    """Those to train on, and the held-out ones, if there are any. annotate: what else the loss reads of them."""
    places = data_process(run.mesh)
    return open_data(run.kind.records, run.config, run.tokenizer, *places, classes=run.classes, annotate=annotate)

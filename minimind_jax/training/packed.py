"""Training on packed rows of a token cache: the source and the evaluation of every stage that reads its data."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from minimind_jax.config.sections import TrainingConfig
from minimind_jax.config.stages import RunConfig
from minimind_jax.data.batches import Batches
from minimind_jax.data.epoch import describe_cuts
from minimind_jax.data.kinds import KINDS
from minimind_jax.data.rows import Batch
from minimind_jax.errors import UserError
from minimind_jax.losses import LossFn, together
from minimind_jax.model.transformer import Params
from minimind_jax.sharding import shard_batch
from minimind_jax.training.defaults import filled, planned_steps
from minimind_jax.training.step import count_parts, make_eval_step


class PackedRows:
    """The rows of `Batches` as a `source.Source`: step after step of its epochs, read ahead by its threads."""

    stride = 1

    def __init__(self, batches: Batches):
        self.batches = batches
        self._open = contextlib.ExitStack()

    def planned_steps(self, training: TrainingConfig) -> int:
        return planned_steps(training, self.batches.steps_per_epoch, self.batches.trained_tokens_per_epoch)

    def record(self) -> dict[str, Any]:
        return data_record(self.batches)

    def check_record(self, earlier: dict[str, Any]) -> str | None:
        return check_same_data(earlier, self.record())

    def facts(self, steps: int) -> dict[str, str]:
        epochs = steps / self.batches.steps_per_epoch
        return {
            "training data": describe_data(self.batches),
            "steps": f"{steps:,} ({epochs:.3g} epochs of {self.batches.steps_per_epoch:,})",
        }

    def begin(self, step: int, steps: int, is_stopping: Callable[[], bool]) -> None:
        self._reader = self._open.enter_context(contextlib.closing(self.batches.iterate(step, steps - step)))

    def next(self, step: int, params: Params) -> tuple[Batch, Mapping[str, float]]:
        return next(self._reader), {}

    def close(self) -> None:
        self._open.close()


class HeldOutRows:
    """The loss of held-out rows, and the other means that the loss function knows, as a `source.Evaluation`."""

    def __init__(self, config: RunConfig, mesh: Mesh, loss_fn: LossFn, batches: Batches):
        self._mesh, self.batches = mesh, batches
        self._parts = count_parts(filled(config), mesh)  # no more rows at once than in training
        self._most_rows = config.training.eval_rows
        self._step = make_eval_step(loss_fn, mesh, config.compute)

    def describe(self) -> str:
        return describe_data(self.batches)

    def __call__(self, params: Params, is_stopping: Callable[[], bool]) -> dict[str, float] | None:
        """loss: of language models in nats per target, without what else is in the loss."""
        found = []
        for batch in self.batches.eval_batches(self._most_rows):
            if is_stopping():
                return None
            for part in range(self._parts):
                rows = {name: array[part :: self._parts] for name, array in batch.items()}
                found.append(self._step(params, shard_batch(rows, self._mesh)))
        total = together(jax.tree.map(lambda *values: np.stack(values), *jax.device_get(found)))
        if not total["loss"].count:  # would be a loss of 0, the best there is
            raise UserError("nothing in the validation data counts; give other data.val, or more of it")
        values = {  # sums divided in 64 bits: 3 of 5 are 0.6
            name: float(metric.total) / (1.0 if metric.count is None else max(float(metric.count), 1.0))
            for name, metric in total.items()
            if metric.held_out
        }
        loss = values.pop("loss")
        return {"loss": values.pop("nll", loss), **values}


def data_record(batches: Batches) -> dict[str, str | int | float | bool]:
    """What decides the rows of every step; kept in checkpoints."""
    data, info = batches.data, batches.cache.info
    return {
        "cache": batches.cache.made_of,
        "content": batches.cache.content,
        **({"pictures": batches.pictures} if batches.pictures else {}),
        "documents": info["documents"],
        "tokens": info["tokens"],
        "trained tokens": info["trained_tokens"],
        "tokens of an epoch": batches.plan.tokens,  # fewer or more with another data.val_fraction
        "rows of an epoch": batches.plan.rows,
        "rows of a step": batches.rows_per_step,
        "seq_len": data.seq_len,
        # Best fit without a shuffle once trained the longest rows first.
        "shuffle": data.shuffle or (batches.epoch(0).packing not in ("concat", "pad") and "in order"),
        "seed": batches.seed,
        # The first cache tells nothing of the draws of later epochs. Text has none.
        **({"redraw_each_epoch": data.redraw_each_epoch, **data.chances} if KINDS[info["kind"]].rendered else {}),
        **({"packing": data.packing} if info["kind"] in ("text", "conversation") else {}),
        **({"images_per_row": data.images_per_row} if "images" in KINDS[info["kind"]].packings else {}),
    }


def check_same_data(before: dict, now: dict) -> str | None:
    """`Source.check_record` of a checkpoint's record and that of the run at hand.

    Files that were only moved or touched are the same data; a tokenizer or a rendering that makes as many tokens of it
    is worth a warning. What the checkpoint of an earlier version does not say is not compared.
    """
    changed = {key: (before[key], now[key]) for key in now if key in before and before[key] != now[key]}
    if not changed:
        return None
    if set(changed) == {"cache"}:
        return (
            "the tokenizer or the way this version renders conversations is not that of the checkpoint (or an earlier "
            "version wrote it, which cannot tell). There are as many documents and tokens, so the run goes on; it is "
            "exact only if their content is the same"
        )
    changed.pop("cache", None)
    if changed.pop("content", None) and not changed:  # counts say more where they differ
        changed["content"] = ("that of the checkpoint", "another in the files")
    what = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changed.items())
    raise UserError(
        f"the data has changed since the checkpoint ({what}), so the run cannot be resumed; restore the data and its "
        "settings, or start another run (another run name, with init_from for the weights)"
    )


def describe_data(batches: Batches) -> str:
    """`1,234 documents, 56,789 tokens in 120 rows, packed 98.7 % full`, and what is cut or left out of them."""
    plan, epoch = batches.plan, batches.epoch(0)
    rows = describe_cuts(epoch) or f"packed {plan.efficiency:.1%} full"
    pictures, images = batches.cache.pictures, ""
    if KINDS[batches.cache.kind].in_files:
        return f"{len(epoch.documents):,} pictures in {plan.rows:,} rows, {rows}"
    if pictures is not None:
        images = f"{pictures.counts(plan.seq_len)[epoch.documents].sum():,} images, "
    return f"{len(epoch.documents):,} documents, {images}{plan.tokens:,} tokens in {plan.rows:,} rows, {rows}"

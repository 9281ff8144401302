"""Stage: learning from pairs of answers, chosen and rejected (DPO and its relatives)."""

import jax.numpy as jnp
import numpy as np

from minimind_jax.losses.preference import answer_log_probs, make_preference_loss
from minimind_jax.losses.sequences import pair_room
from minimind_jax.model.transformer import full_precision
from minimind_jax.runs.frozen import Answers, Asked, Reference, pairs
from minimind_jax.runs.parts import Run, open_rows, run_parameters
from minimind_jax.runs.stage import on_rows
from minimind_jax.training.source import Recipe
from minimind_jax.training.speed import forward_flops


def recipe(run: Run) -> Recipe:
    """Data: records with `chosen` and `rejected` conversations, both answers of a pair in one row. Loss: that of
    `config.preference` (see `losses.preference`), relative to the model as it was at the start. Trained: all
    parameters, or adapters; these need no second model, for the reference is the model without them."""
    wanted, parameters = run.config.preference, run_parameters(run)
    annotate = reference = None
    if wanted.precompute_reference:
        annotate = Answers(run, _log_probs(run), parameters.load()).annotate
    elif wanted.has_reference:
        reference = Reference(run.model, has_own=run.adapters is None or run.adapters.stored is not None)
        parameters = reference.add_to(parameters)
    sft_weight = float(wanted.loss == "orpo") if wanted.sft_weight is None else wanted.sft_weight
    loss_fn = make_preference_loss(
        run.model, wanted.loss, beta=wanted.beta, label_smoothing=wanted.label_smoothing, gamma=wanted.gamma,
        sft_weight=sft_weight, reference=reference,
    )  # fmt: skip
    asked = forward_flops(run.model.config, run.config.data.seq_len) if reference else 0.0
    return on_rows(run, loss_fn, parameters, open_rows(run, annotate))._replace(flops_beside=asked)


def _log_probs(run: Run) -> Asked:
    """The reference's log-probabilities of both answers of every pair."""
    room = pair_room(run.config.data.seq_len)

    def ask(params, batch):
        with full_precision(run.model.compute):
            found, _ = answer_log_probs(run.model, params, batch)
        return (jnp.stack([found.chosen[:, : room // 2], found.rejected[:, : room // 2]], axis=-1),)

    return Asked(
        name="reference",
        setting=f"init_from {run.config.init_from}",
        unit=pairs(room),
        columns={"reference_log_probs": ("log_probs", np.float32)},
        width=2,
        ask=ask,
        made_of={"seq_len": run.config.data.seq_len, "dtype": str(run.model.dtype)},
        what="its log-probabilities of all pairs",
    )

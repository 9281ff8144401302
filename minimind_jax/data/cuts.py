"""What a row's length costs the data: documents that are cut, tokens lost, rows in which nothing is trained."""

import numpy as np

from minimind_jax.data.epoch import Epoch
from minimind_jax.data.kinds import KINDS
from minimind_jax.errors import UserError


def describe_cuts(epoch: Epoch) -> str:
    """What is cut or left out of an epoch's documents, in words; "" where nothing is."""
    plan, packing, kind = epoch.plan, epoch.packing, KINDS[epoch.cache.kind]
    noun = kind.noun
    lengths = epoch.cache.lengths[epoch.documents]
    told = []
    if plan.cut_documents and packing == "concat":
        if not kind.cut_freely:  # texts are joined and cut on purpose
            told.append(
                f"{plan.cut_documents:,} of {len(lengths):,} {noun} run over the end of a row and are cut there, "
                "wherever that is (data.packing best_fit cuts between turns)"
            )
    elif plan.cut_documents:
        told.append(
            f"{plan.cut_documents:,} of {len(lengths):,} {noun} are longer than data.seq_len {plan.seq_len}: "
            + _what_is_cut(epoch, packing)
        )
    if plan.left_out:
        told.append(f"{plan.left_out:,} {noun} left out whose answers have no room in a row")
    if plan.untrained:
        unit = {"best_fit": "pieces", "concat": "rows"}.get(packing, noun)
        told.append(f"{plan.untrained:,} {unit} left out in which nothing is trained")
    if plan.dropped_tokens:
        told.append(
            f"{plan.dropped_tokens:,} of {lengths.sum():,} tokens ({plan.dropped_tokens / lengths.sum():.1%}) lost"
        )
    if told and packing != "concat" and (advice := _advice(lengths, plan.seq_len)):
        told.append(advice)
    return "; ".join(told)


def check_rows(epoch: Epoch, role: str) -> None:
    """Raises UserError when an epoch has no row, with the way out. role: what the data is."""
    if epoch.plan.rows:
        return
    lengths = epoch.cache.lengths[epoch.documents]
    if not len(lengths):
        raise UserError("no document is left to train on; lower data.val_fraction or give more data")
    kind = KINDS[epoch.cache.kind]
    raise UserError(
        f"{role}: nothing is trained in any of {len(lengths):,} {kind.noun}: {kind.why_no_row} at data.seq_len "
        f"{epoch.plan.seq_len}; {_advice(lengths, epoch.plan.seq_len) or 'raise data.seq_len, or mend the data'}"
    )


def _what_is_cut(epoch: Epoch, packing: str) -> str:
    plan = epoch.plan
    if packing == "best_fit":
        further = int((plan.starts > 0).sum())
        inside = f", {plan.cut_turns:,} of the cuts inside a turn" * bool(plan.cut_turns)
        return (
            f"cut between turns{inside}; their {further:,} further pieces begin without the system prompt, the tools "
            "and all that was said before"
        )
    return "the beginning of their prompts is cut off" if packing == "pairs" else "their ends are cut off"


def _advice(lengths: np.ndarray, seq_len: int) -> str:
    """The row lengths that would hold 95 % of the documents, and all of them."""
    needed = {share: -int(-np.quantile(lengths, share) // 16) * 16 for share in (0.95, 1.0)}
    if needed[1.0] <= seq_len:
        return ""
    most = f"data.seq_len {needed[0.95]} holds 95 % of them whole, " * (seq_len < needed[0.95] < needed[1.0])
    return f"{most}{needed[1.0]} all" if most else f"data.seq_len {needed[1.0]} holds all of them whole"

"""Low-rank adapters of a run: which there are, where they start from, and the folder they are written to."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from minimind_jax.config.stages import RunConfig
from minimind_jax.convert.load import base_folder
from minimind_jax.convert.peft import load_peft, rank_table
from minimind_jax.errors import UserError
from minimind_jax.folders import is_adapter
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.lora import RankTable, scale_of
from minimind_jax.model.transformer import LanguageModel, Params


class AdapterPlan(NamedTuple):
    """base: folder of the model below. stored: parameters of the adapter that is trained further, None for new ones.
    The rest as in `LoRAConfig` and `convert.peft.rank_table`."""

    base: Path
    table: RankTable
    stored: Params | None
    alpha: float
    rslora: bool
    dropout: float


def plan_adapters(config: RunConfig, architecture: ModelConfig, start: Path | None) -> AdapterPlan | None:
    """The adapters that `config.lora` asks for; None without any. Those in the folder `start` are trained further.
    Raises UserError for targets that the model does not have, another rank than the adapter in init_from has, and a run
    from scratch."""
    lora = config.lora
    if not lora.rank:
        return None
    if start is None:
        raise UserError("lora.rank is set, but there is no model to adapt; give --init_from, or leave lora.rank out")
    alpha = 2 * lora.rank if lora.alpha is None else lora.alpha
    table = rank_table(architecture, lora.rank, lora.targets, lora.own_ranks())
    if not is_adapter(start):
        return AdapterPlan(start, table, None, alpha, lora.rslora, lora.dropout)
    stored = load_peft(start, architecture)
    if {name: ranks for name, ranks in table.items() if any(ranks)} != stored.table:
        raise UserError(
            f"the adapter {start}, which init_from means, has the ranks {_told(stored.table)}, and lora asks for "
            f"{_told(table)}; ask for the same to train it further, or train new adapters over the whole model: "
            f"minimind convert merge-lora {start} OUTPUT, then --init_from OUTPUT"
        )
    scales = {name: leaf["lora_scale"] for block in stored.tree["layers"].values() for name, leaf in block.items()}
    are_alike = all(
        np.allclose(scales[name], [scale_of(rank, alpha, lora.rslora) for rank in ranks])
        for name, ranks in stored.table.items()
    )
    if (lora.alpha is not None or lora.rslora) and not are_alike:
        raise UserError(
            f"the adapter {start}, which init_from means, has another alpha than lora.alpha {alpha:g} (lora.rslora "
            f"{str(lora.rslora).lower()}); leave both out to train it further as it is"
        )
    return AdapterPlan(base_folder(start), stored.table, stored.tree, alpha, stored.rslora, lora.dropout)


def _told(table: RankTable) -> str:
    ranks = {name: found[:1] if len(set(found)) == 1 else found for name, found in table.items() if any(found)}
    return ", ".join(f"{name} {','.join(map(str, found))}" for name, found in ranks.items())


def frozen_dtype(config: RunConfig, model: LanguageModel) -> str:
    """Of the matrices below the adapters."""
    return model.dtype.name if config.lora.base_dtype == "auto" else config.lora.base_dtype

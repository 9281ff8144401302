"""The stages, one file each, read top to bottom: data, loss, what is trained, what is written."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from minimind_jax.config.stages import (
    ClassifyConfig,
    DistillConfig,
    DPOConfig,
    PretrainConfig,
    RewardConfig,
    SFTConfig,
    TokenizerConfig,
)


class StageKind(NamedTuple):
    """A stage's settings class, and its function as `module:function`, imported when it is run."""

    config: type
    function: str

    def load(self) -> Callable[[Any], Any]:
        module, name = self.function.split(":")
        return getattr(importlib.import_module(module), name)


STAGES = {
    "tokenizer": StageKind(TokenizerConfig, "minimind_jax.stages.tokenizer:train_tokenizer"),
    "pretrain": StageKind(PretrainConfig, "minimind_jax.stages.pretrain:pretrain"),
    "sft": StageKind(SFTConfig, "minimind_jax.stages.sft:sft"),
    "dpo": StageKind(DPOConfig, "minimind_jax.stages.dpo:dpo"),
    "distill": StageKind(DistillConfig, "minimind_jax.stages.distill:distill"),
    "reward": StageKind(RewardConfig, "minimind_jax.stages.reward:reward"),
    "classify": StageKind(ClassifyConfig, "minimind_jax.stages.classify:classify"),
}

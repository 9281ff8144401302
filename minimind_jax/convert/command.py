"""`minimind convert`: models in other forms. Of a run's checkpoints see `runs.export`."""

from minimind_jax.config.tools import FromHFConfig, FromTorchConfig, MergeLoRAConfig, ToTorchConfig
from minimind_jax.convert.hf_config import MINIMIND_YARN
from minimind_jax.convert.load import from_hf, merge_lora
from minimind_jax.convert.torch_checkpoint import from_torch, to_torch
from minimind_jax.folders import resolve_model_folder

# What the shapes of a .pth do not tell.
UNSEEN = ("rope_theta", "max_position_embeddings", "rms_norm_eps", "num_experts_per_tok", "norm_topk_prob")


def run_from_hf(config: FromHFConfig) -> None:
    source = resolve_model_folder(config.source, "source")
    from_hf(source, config.output, config.dtype, config.tokenizer or None, config.max_shard_bytes, config.vision)
    print(f"wrote {config.output}")


def run_from_torch(config: FromTorchConfig) -> None:
    overrides = {name: getattr(config, name) for name in UNSEEN if getattr(config, name) is not None}
    if config.inference_rope_scaling:
        overrides["rope_scaling"] = MINIMIND_YARN
    from_torch(
        config.source, config.output, config.tokenizer, config.dtype, config.max_shard_bytes, overrides, config.vision
    )
    print(f"wrote {config.output}")


def run_to_torch(config: ToTorchConfig) -> None:
    to_torch(resolve_model_folder(config.source, "source"), config.output)
    print(f"wrote {config.output}")


def run_merge_lora(config: MergeLoRAConfig) -> None:
    source = resolve_model_folder(config.source, "source")
    merge_lora(source, config.output, config.base, config.dtype, config.max_shard_bytes)
    print(f"wrote {config.output}")

"""Hugging Face tensors (torch layout: out x in, one tensor a layer) to this project's stacked parameters, for tests."""

import numpy as np

from minimind_jax.model.config import ModelConfig


def params_from_hf(config: ModelConfig, tensors: dict) -> dict:
    """The parameter tree of Qwen3 / Qwen3-MoE tensors, as NumPy float32; also for gradients."""

    def get(name):
        return np.asarray(tensors[name], np.float32)

    def stack(suffix, transpose=False):
        arrays = [get(f"model.layers.{i}.{suffix}.weight") for i in range(config.num_hidden_layers)]
        return np.stack([a.T if transpose else a for a in arrays])

    def kernel(suffix):
        return {"kernel": stack(suffix, transpose=True)}

    if config.is_moe:
        experts = {
            name: {
                "kernel": np.stack(
                    [stack(f"mlp.experts.{e}.{name}", transpose=True) for e in range(config.num_experts)], axis=1
                )
            }
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        mlp = {"router": kernel("mlp.gate"), "experts": experts}
    else:
        mlp = {name: kernel(f"mlp.{name}") for name in ("gate_proj", "up_proj", "down_proj")}
    params = {
        "embed": {"embedding": get("model.embed_tokens.weight")},
        "layers": {
            "input_norm": {"scale": stack("input_layernorm")},
            "post_attention_norm": {"scale": stack("post_attention_layernorm")},
            "attention": {
                **{name: kernel(f"self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
                **{name: {"scale": stack(f"self_attn.{name}")} for name in ("q_norm", "k_norm")},
            },
            "mlp": mlp,
        },
        "norm": {"scale": get("model.norm.weight")},
    }
    if not config.tie_word_embeddings:
        params["lm_head"] = {"kernel": get("lm_head.weight").T}
    return params

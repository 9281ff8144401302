"""Model FLOPs of a token, and what devices can do at most: together they give MFU (arXiv 2204.02311, appendix B)."""

import jax

from minimind_jax.model.config import ComputeConfig, ModelConfig

# Dense bfloat16 FLOP/s of one device, from the makers' data sheets; the consumer cards' with float32 accumulation.
# The first entry that is part of the device kind (lower case) counts, so longer names come before shorter ones.
PEAK_FLOPS = {
    "b200": 2250e12,
    "gh200": 989e12,
    "h200": 989e12,
    "h100 pcie": 756e12,
    "h100 nvl": 835e12,
    "h100": 989e12,
    "h800": 989e12,
    "h20": 148e12,
    "a100": 312e12,
    "a800": 312e12,
    "a10g": 70e12,
    "a10": 125e12,
    "a40": 150e12,
    "a6000": 155e12,
    "rtx 6000 ada": 364e12,
    "l40s": 362e12,
    "l40": 181e12,
    "l4": 121e12,
    "rtx 5090": 209e12,
    "rtx 4090 d": 147e12,
    "rtx 4090": 165e12,
    "rtx 4080": 97e12,
    "rtx 3090": 71e12,
    "rtx 3080": 60e12,
    "tpu v6": 918e12,
    "tpu v5 lite": 197e12,
    "tpu v5e": 197e12,
    "tpu v5": 459e12,
    "tpu v4": 275e12,
    "tpu v3": 61e12,
    "tpu v2": 23e12,
}


def flops_per_token(config: ModelConfig, seq_len: int, adapters_only: bool = False, *, has_words: bool = True) -> float:
    """FLOPs of one trained token, forward and backward, nothing recomputed.

    6 (matrix parameters that a token meets, the head included and the embedding look-up not)
    + 6 L N H T for causal attention over T = seq_len positions, the upper bound when rows hold several documents.
    adapters_only: the matrices have no gradients, so 4 in place of the first 6; those of the adapters are not counted.
    has_words: false of a model with a head of scores, which meets one token of a text and no word of the vocabulary.
    """
    width, heads_width = config.hidden_size, config.num_attention_heads * config.head_dim
    attention = 2 * width * (heads_width + config.num_key_value_heads * config.head_dim)
    if config.is_moe:
        mlp = 3 * width * config.moe_intermediate_size * config.num_experts_per_tok + width * config.num_experts
    else:
        mlp = 3 * width * config.intermediate_size
    matrices = config.num_hidden_layers * (attention + mlp) + width * config.vocab_size * has_words
    return (4 if adapters_only else 6) * matrices + 6 * config.num_hidden_layers * heads_width * seq_len


def peak_flops(compute: ComputeConfig) -> float | None:
    """bfloat16 FLOP/s of all devices together; None where it is not known or the run computes in float32."""
    devices = jax.devices()
    kind = devices[0].device_kind.lower()
    if compute.dtype == "float32" or devices[0].platform == "cpu":
        return None
    for name, peak in PEAK_FLOPS.items():
        if name in kind:
            # A device of TPU v2 and v3 is one of a chip's two cores; from v4 on it is a chip.
            return peak * len(devices)
    return None

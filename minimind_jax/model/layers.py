"""The parts of the network: NNX modules of one layer, and of what stands around the layers.

Norms before attention and feed-forward, RMS-normalised query and key heads, rotary positions, SwiGLU, no biases.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from minimind_jax.model import moe, rope
from minimind_jax.model.config import ModelConfig, Platform
from minimind_jax.model.kv_cache import LayerCache
from minimind_jax.model.linear import multiply
from minimind_jax.model.lora import Adapter

MANY_TOKENS = 4096  # from which on a GPU multiplies with gate and up at once

# (queries BTNH, keys BTKH, values BTKH, cache of the layer) -> (what the queries read BTNH, the cache with these in it)
Attend = Callable[[Array, Array, Array, LayerCache | None], tuple[Array, LayerCache | None]]


class Context(NamedTuple):
    """What all layers share in one forward pass."""

    cos_BTh: Array
    sin_BTh: Array
    is_token_BT: Array | None  # what is not padding; None where all is
    attend: Attend  # which keys a query sees, and how that is computed
    experts: moe.Path  # the path of a mixture (see `moe`)
    platform: Platform
    adapter_B: Array | None = None  # each row's among several adapters; None for none


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def _split_key(key: Array | None, count: int) -> tuple[Array | None, ...]:
    return (None,) * count if key is None else tuple(jax.random.split(key, count))


def _normal(rngs: nnx.Rngs, std: float, shape: tuple[int, ...], axes: tuple) -> nnx.Param:
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


class Linear(nnx.Module):
    """x @ kernel in the dtype of x; the kernel is (in, out), or (E, in, out) for a stack of experts.

    is_output: the result is added to the residual stream.
    """

    def __init__(self, config: ModelConfig, shape: tuple[int, ...], axes: tuple, is_output=False, *, rngs: nnx.Rngs):
        std = 0.0 if is_output and config.zero_init_outputs else config.initializer_range
        self.kernel = _normal(rngs, std, shape, axes)

    def __call__(self, x: Array, platform: Platform, precision: jax.lax.Precision | None = None) -> Array:
        return multiply(x, self.kernel[...], platform, precision=precision)


class Projection(Linear):
    """A linear layer of the trunk, with a low-rank adapter where `adapter` has one for it (see `lora`)."""

    def __init__(self, config: ModelConfig, adapter: Adapter | None, name: str, shape, axes, is_output=False, *, rngs):
        super().__init__(config, shape, axes, is_output, rngs=rngs)
        self.rank = adapter.rank(name) if adapter else 0
        if self.rank:  # values come from `lora.init_adapters`, `lora.stack` or a file
            self.dropout, self.by_row = adapter.dropout, adapter.by_row
            self.lora_a = nnx.Param(jnp.zeros((shape[0], self.rank), jnp.float32), axes=(axes[0], None))
            self.lora_b = nnx.Param(jnp.zeros((self.rank, shape[1]), jnp.float32), axes=(None, axes[1]))
            columns = (self.rank,) if self.by_row else ()
            self.lora_scale = nnx.Param(jnp.ones(columns, jnp.float32), axes=(None,) * len(columns))
            if self.by_row:
                self.lora_owner = nnx.Param(jnp.zeros(columns, jnp.int32), axes=(None,))

    def __call__(self, x_BTI: Array, context: Context, dropout_key: Array | None = None) -> Array:
        platform = context.platform
        out_BTO = super().__call__(x_BTI, platform)
        if not self.rank or (self.by_row and context.adapter_B is None):
            return out_BTO
        low_BTR, scale = (
            multiply(dropout(x_BTI, self.dropout, dropout_key), self.lora_a[...], platform),
            self.lora_scale,
        )
        if not self.by_row:
            return out_BTO + multiply(low_BTR, self.lora_b[...], platform) * scale[...].astype(out_BTO.dtype)
        is_own_BR = context.adapter_B[:, None] == self.lora_owner[...]
        low_BTR = jnp.where(is_own_BR[:, None], low_BTR * scale[...].astype(low_BTR.dtype), 0)
        return out_BTO + multiply(low_BTR, self.lora_b[...], platform)


class Embedding(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.embedding = _normal(
            rngs, config.initializer_range, (config.vocab_size, config.hidden_size), ("vocab", "embed")
        )

    def __call__(self, tokens_BT: Array, dtype: jnp.dtype) -> Array:
        return jnp.take(self.embedding[...], tokens_BT, axis=0).astype(dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale, float32 inside (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32), axes=(None,))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * inverse_rms * self.scale[...]).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with normalised, rotated query and key heads."""

    def __init__(self, config: ModelConfig, adapter: Adapter | None, *, rngs: nnx.Rngs):
        self.config = config
        D, H = config.hidden_size, config.head_dim
        query_width, key_width = config.num_attention_heads * H, config.num_key_value_heads * H
        project = functools.partial(Projection, config, adapter, rngs=rngs)
        self.q_proj = project("q_proj", (D, query_width), ("embed", "heads"))
        self.k_proj = project("k_proj", (D, key_width), ("embed", "kv_heads"))
        self.v_proj = project("v_proj", (D, key_width), ("embed", "kv_heads"))
        self.o_proj = project("o_proj", (query_width, D), ("heads", "embed"), is_output=True)
        self.q_norm = RMSNorm(H, config.rms_norm_eps)
        self.k_norm = RMSNorm(H, config.rms_norm_eps)

    def __call__(
        self, x_BTD: Array, context: Context, cache: LayerCache | None, dropout_key: Array | None
    ) -> tuple[Array, LayerCache | None]:
        B, T, _ = x_BTD.shape
        H = self.config.head_dim
        keys = _split_key(dropout_key, 4)
        q_BTNH = self.q_norm(self.q_proj(x_BTD, context, keys[0]).reshape(B, T, -1, H))
        k_BTKH = self.k_norm(self.k_proj(x_BTD, context, keys[1]).reshape(B, T, -1, H))
        v_BTKH = self.v_proj(x_BTD, context, keys[2]).reshape(B, T, -1, H)
        q_BTNH = rope.apply_rope(q_BTNH, context.cos_BTh, context.sin_BTh)
        k_BTKH = rope.apply_rope(k_BTKH, context.cos_BTh, context.sin_BTh)
        out_BTNH, cache = context.attend(q_BTNH, k_BTKH, v_BTKH, cache)
        return self.o_proj(out_BTNH.reshape(B, T, -1), context, keys[3]), cache


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202); no router loss."""

    def __init__(self, config: ModelConfig, adapter: Adapter | None, *, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        project = functools.partial(Projection, config, adapter, rngs=rngs)
        self.gate_proj = project("gate_proj", (D, F), ("embed", "mlp"))
        self.up_proj = project("up_proj", (D, F), ("embed", "mlp"))
        self.down_proj = project("down_proj", (F, D), ("mlp", "embed"), is_output=True)

    def __call__(self, x_BTD: Array, context: Context, dropout_key: Array | None) -> tuple[Array, Array]:
        keys = _split_key(dropout_key, 3)
        gate_BTF, up_BTF = self._gate_and_up(x_BTD, context, keys)
        return self.down_proj(jax.nn.silu(gate_BTF) * up_BTF, context, keys[2]), jnp.zeros((), jnp.float32)

    def _gate_and_up(self, x_BTD: Array, context: Context, keys: tuple[Array | None, ...]) -> tuple[Array, Array]:
        """As one product where many tokens are trained on a GPU: it reads x once, and XLA then computes the gradients
        of both in one pass over what they are made of. Its kernel is a copy, which few tokens are not worth."""
        gate, up = self.gate_proj, self.up_proj
        if context.platform != "gpu" or x_BTD[..., 0].size < MANY_TOKENS or gate.rank or up.rank:
            return gate(x_BTD, context, keys[0]), up(x_BTD, context, keys[1])
        kernel_DgF = jnp.stack([gate.kernel[...], up.kernel[...]], axis=1).astype(x_BTD.dtype)
        both_BTgF = jnp.einsum("BTD,DgF->BTgF", x_BTD, kernel_DgF)
        return both_BTgF[:, :, 0], both_BTgF[:, :, 1]


class Experts(nnx.Module):
    """The kernels of E SwiGLU experts, stacked."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        E, D, F = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = Linear(config, (E, D, F), ("experts", "embed", "mlp"), rngs=rngs)
        self.up_proj = Linear(config, (E, D, F), ("experts", "embed", "mlp"), rngs=rngs)
        self.down_proj = Linear(config, (E, F, D), ("experts", "mlp", "embed"), is_output=True, rngs=rngs)


class MoE(nnx.Module):
    """A router and E experts in place of the MLP; returns the output and the load-balancing loss."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.router = Linear(config, (config.hidden_size, config.num_experts), ("embed", None), rngs=rngs)
        self.experts = Experts(config, rngs=rngs)

    def __call__(self, x_BTD: Array, context: Context, _: Array | None) -> tuple[Array, Array]:
        x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
        is_token_BT, platform = context.is_token_BT, context.platform
        is_token_M = None if is_token_BT is None else is_token_BT.reshape(-1).astype(jnp.float32)
        # The choice of experts is a step function of these logits: float32 keeps it the same in every compute dtype, if
        # it is not multiplied in pieces of bfloat16 (TPU) or TF32 (GPU), as devices do unless they are told.
        logits_ME = self.router(x_MD.astype(jnp.float32), platform, jax.lax.Precision.HIGHEST)
        experts = (self.experts.gate_proj, self.experts.up_proj, self.experts.down_proj)
        kernels = tuple(linear.kernel[...].astype(x_MD.dtype) for linear in experts)
        out_MD, loss = moe.mixture(self.config, x_MD, logits_ME, is_token_M, kernels, context.experts, platform)
        return out_MD.reshape(x_BTD.shape), loss


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, adapter: Adapter | None, *, rngs: nnx.Rngs):
        self.rate = config.dropout
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, adapter, rngs=rngs)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config, rngs=rngs) if config.is_moe else MLP(config, adapter, rngs=rngs)

    def __call__(self, x_BTD: Array, context: Context, cache: LayerCache | None, dropout_key: Array | None):
        adapter_key = None if dropout_key is None else jax.random.fold_in(dropout_key, 1)
        keys, adapter_keys = _split_key(dropout_key, 2), _split_key(adapter_key, 2)
        with jax.named_scope("attention"):
            update_BTD, cache = self.attention(self.input_norm(x_BTD), context, cache, adapter_keys[0])
            x_BTD = x_BTD + dropout(update_BTD, self.rate, keys[0])
        with jax.named_scope("mlp"):
            update_BTD, router_loss = self.mlp(self.post_attention_norm(x_BTD), context, adapter_keys[1])
            x_BTD = x_BTD + dropout(update_BTD, self.rate, keys[1])
        return x_BTD, cache, router_loss


class Surroundings(nnx.Module):
    """What stands around the layers: the embedding, the last norm and, when untied, the head."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.embed = Embedding(config, rngs=rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config, (config.hidden_size, config.vocab_size), ("embed", "vocab"), rngs=rngs)

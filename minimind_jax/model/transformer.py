"""The decoder-only transformer of Qwen3 and Qwen3-MoE: NNX modules, and `LanguageModel`, their functional face.

Norms before attention and feed-forward, RMS-normalised query and key heads, rotary positions, SwiGLU, no biases.
The layers' parameters are stacked on a leading L axis and scanned.
"""

import dataclasses
import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from minimind_jax.model import moe, rope
from minimind_jax.model.attention import SAVED_NAMES, attention, cached_attention
from minimind_jax.model.config import ComputeConfig, ModelConfig
from minimind_jax.model.kv_cache import KVCache, LayerCache
from minimind_jax.model.linear import TransposedKernel, multiply

Params = dict[str, Any]


class ModelOutput(NamedTuple):
    """hidden_BTD: after the last norm, in the compute dtype. router_loss: float32 scalar, 0 for a dense model.
    cache: the key/value cache with these tokens in it, None when none was given."""

    hidden_BTD: Array
    router_loss: Array
    cache: KVCache | None


class _Context(NamedTuple):
    """What all layers share in one forward pass."""

    cos_BTh: Array
    sin_BTh: Array
    positions_BT: Array
    segment_ids_BT: Array | None
    cache_positions_BS: Array | None
    write_index: Array | int | None


def compute_dtype(compute: ComputeConfig) -> jnp.dtype:
    """The dtype of activations and matrix products; `auto` is bfloat16 where the default device is no CPU."""
    if compute.dtype == "auto":
        return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return jnp.dtype(compute.dtype)


def scan_unroll(compute: ComputeConfig, layers: int) -> int:
    """Layers unrolled per step of the scan."""
    if compute.scan_unroll is None:
        return layers if jax.default_backend() == "cpu" and layers <= 16 else 1
    return compute.scan_unroll or layers


def count_parameters(params: Params) -> int:
    """Numbers in a tree of arrays or shapes; a tied head counts once."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _dropout(x: Array, rate: float, key: Array | None) -> Array:
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def _normal(rngs: nnx.Rngs, std: float, shape: tuple[int, ...], axes: tuple) -> nnx.Param:
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


class Linear(nnx.Module):
    """x @ kernel in the dtype of x; the kernel is (in, out), or (E, in, out) for a stack of experts.

    is_output: the result is added to the residual stream.
    """

    def __init__(self, config: ModelConfig, shape: tuple[int, ...], axes: tuple, is_output=False, *, rngs: nnx.Rngs):
        std = 0.0 if is_output and config.zero_init_outputs else config.initializer_range
        self.kernel = _normal(rngs, std, shape, axes)

    def __call__(self, x: Array) -> Array:
        return multiply(x, self.kernel[...])


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

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        self.config, self.compute = config, compute
        D, H = config.hidden_size, config.head_dim
        query_width, key_width = config.num_attention_heads * H, config.num_key_value_heads * H
        self.q_proj = Linear(config, (D, query_width), ("embed", "heads"), rngs=rngs)
        self.k_proj = Linear(config, (D, key_width), ("embed", "kv_heads"), rngs=rngs)
        self.v_proj = Linear(config, (D, key_width), ("embed", "kv_heads"), rngs=rngs)
        self.o_proj = Linear(config, (query_width, D), ("heads", "embed"), is_output=True, rngs=rngs)
        self.q_norm = RMSNorm(H, config.rms_norm_eps)
        self.k_norm = RMSNorm(H, config.rms_norm_eps)

    def __call__(self, x_BTD: Array, context: _Context, cache: LayerCache | None) -> tuple[Array, LayerCache | None]:
        B, T, _ = x_BTD.shape
        H = self.config.head_dim
        q_BTNH = self.q_norm(self.q_proj(x_BTD).reshape(B, T, -1, H))
        k_BTKH = self.k_norm(self.k_proj(x_BTD).reshape(B, T, -1, H))
        v_BTKH = self.v_proj(x_BTD).reshape(B, T, -1, H)
        q_BTNH = rope.apply_rope(q_BTNH, context.cos_BTh, context.sin_BTh)
        k_BTKH = rope.apply_rope(k_BTKH, context.cos_BTh, context.sin_BTh)
        if cache is None:
            path = self.compute.attention
            out_BTNH = attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT=context.segment_ids_BT, path=path)
        else:
            cache = cache.write(k_BTKH, v_BTKH, context.write_index)
            out_BTNH = cached_attention(q_BTNH, *cache, context.positions_BT, context.cache_positions_BS)
        return self.o_proj(out_BTNH.reshape(B, T, -1)), cache


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202); no router loss."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(config, (D, F), ("embed", "mlp"), rngs=rngs)
        self.up_proj = Linear(config, (D, F), ("embed", "mlp"), rngs=rngs)
        self.down_proj = Linear(config, (F, D), ("mlp", "embed"), is_output=True, rngs=rngs)

    def __call__(self, x_BTD: Array, segment_ids_BT: Array | None) -> tuple[Array, Array]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD)), jnp.zeros((), jnp.float32)


class Experts(nnx.Module):
    """The kernels of E SwiGLU experts, stacked."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        E, D, F = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = Linear(config, (E, D, F), ("experts", "embed", "mlp"), rngs=rngs)
        self.up_proj = Linear(config, (E, D, F), ("experts", "embed", "mlp"), rngs=rngs)
        self.down_proj = Linear(config, (E, F, D), ("experts", "mlp", "embed"), is_output=True, rngs=rngs)


class MoE(nnx.Module):
    """A router and E experts in place of the MLP; returns the output and the load-balancing loss."""

    def __init__(self, config: ModelConfig, path: moe.Path, *, rngs: nnx.Rngs):
        self.config, self.path = config, path
        self.router = Linear(config, (config.hidden_size, config.num_experts), ("embed", None), rngs=rngs)
        self.experts = Experts(config, rngs=rngs)

    def __call__(self, x_BTD: Array, segment_ids_BT: Array | None) -> tuple[Array, Array]:
        x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
        is_token_M = None if segment_ids_BT is None else (segment_ids_BT > 0).reshape(-1).astype(jnp.float32)
        # The choice of experts is a step function of these logits: float32 keeps it the same in every compute dtype.
        logits_ME = self.router(x_MD.astype(jnp.float32))
        experts = (self.experts.gate_proj, self.experts.up_proj, self.experts.down_proj)
        kernels = tuple(linear.kernel[...].astype(x_MD.dtype) for linear in experts)
        out_MD, loss = moe.mixture(self.config, x_MD, logits_ME, is_token_M, kernels, self.path)
        return out_MD.reshape(x_BTD.shape), loss


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        self.rate = config.dropout
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, compute, rngs=rngs)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config, compute.experts, rngs=rngs) if config.is_moe else MLP(config, rngs=rngs)

    def __call__(self, x_BTD: Array, context: _Context, cache: LayerCache | None, dropout_key: Array | None):
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        with jax.named_scope("attention"):
            update_BTD, cache = self.attention(self.input_norm(x_BTD), context, cache)
            x_BTD = x_BTD + _dropout(update_BTD, self.rate, keys[0])
        with jax.named_scope("mlp"):
            update_BTD, router_loss = self.mlp(self.post_attention_norm(x_BTD), context.segment_ids_BT)
            x_BTD = x_BTD + _dropout(update_BTD, self.rate, keys[1])
        return x_BTD, cache, router_loss


class Surroundings(nnx.Module):
    """What stands around the layers: the embedding, the last norm and, when untied, the head."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.embed = Embedding(config, rngs=rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config, (config.hidden_size, config.vocab_size), ("embed", "vocab"), rngs=rngs)


def _make(kind: str, config: ModelConfig, compute: ComputeConfig, key: Array) -> nnx.Module:
    rngs = nnx.Rngs(params=key)
    return Block(config, compute, rngs=rngs) if kind == "layers" else Surroundings(config, rngs=rngs)


@functools.lru_cache(maxsize=32)
def _split_abstract(kind: str, config: ModelConfig, compute: ComputeConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Graph definition and shapes of one layer (`layers`) or of the rest (`surroundings`)."""
    return nnx.split(nnx.eval_shape(lambda: _make(kind, config, compute, jax.random.key(0))))


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model as pure functions of its parameters, a nested dict of float32 arrays. Hashable: may be a static argument
    of `jax.jit` or closed over.

    Parameters of the layers have a leading L axis; linear kernels are (in, out). See docs of the project for the tree.
    """

    config: ModelConfig
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)

    def init(self, key: Array) -> Params:
        """Fresh parameters: N(0, initializer_range) for embeddings and kernels, 1 for norms; 0 for the kernels that add
        to the residual stream, with zero_init_outputs."""

        def initial(kind, key):
            return nnx.to_pure_dict(nnx.state(_make(kind, self.config, self.compute, key), nnx.Param))

        outer_key, layers_key = jax.random.split(key)
        layer_keys = jax.random.split(layers_key, self.config.num_hidden_layers)
        layers = jax.vmap(functools.partial(initial, "layers"))(layer_keys)
        return {**initial("surroundings", outer_key), "layers": layers}

    def abstract_params(self) -> Params:
        """Shapes and dtypes of the parameters, without making them."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def logical_axes(self) -> Params:
        """For each parameter a tuple with the name of each of its axes: layers, embed, heads, kv_heads, mlp, experts,
        vocab, or None."""

        def names(kind, prefix):
            state = _split_abstract(kind, self.config, self.compute)[1]
            is_param = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
            tree = jax.tree.map(lambda param: prefix + param.get_metadata("axes"), state, is_leaf=is_param)
            return nnx.to_pure_dict(tree)

        return {**names("surroundings", ()), "layers": names("layers", ("layers",))}

    def hidden(
        self,
        params: Params,
        tokens_BT: Array,
        positions_BT: Array | None = None,
        segment_ids_BT: Array | None = None,
        *,
        cache: KVCache | None = None,
        write_index: Array | int | None = None,
        dropout_key: Array | None = None,
    ) -> ModelOutput:
        """The network without its head.

        positions_BT: int32 position of each token in its document, 0..T-1 when None.
        segment_ids_BT: int32, 0 for padding and 1.. for the documents of a packed row; attention stays inside a
            document. None: each row is one document without padding.
        cache, write_index: the T tokens are written to slots write_index..write_index+T of every row, and each sees
            the tokens in the cache at positions up to its own. Padding has position -1 and is never seen, so prompts
            of unequal length are padded on the left and share one write index.
        dropout_key: of this pass; None for no dropout. Embeddings and both branches of a layer are dropped out.
        """
        context, cache = self._context(tokens_BT, positions_BT, segment_ids_BT, cache, write_index)
        outer = self._surroundings(params)
        keys_L = None
        with jax.named_scope("embed"):
            x_BTD = outer.embed(tokens_BT, compute_dtype(self.compute))
            if dropout_key is not None:
                embed_key, layers_key = jax.random.split(dropout_key)
                x_BTD = _dropout(x_BTD, self.config.dropout, embed_key)
                keys_L = jax.random.split(layers_key, self.config.num_hidden_layers)
        x_BTD, cache, router_loss = self._layers(params["layers"], x_BTD, context, cache, keys_L)
        with jax.named_scope("norm"):
            return ModelOutput(outer.norm(x_BTD), router_loss, cache)

    def logits(self, params: Params, hidden_BTD: Array) -> Array:
        """Scores of the next token, float32 (B, T, V)."""
        with jax.named_scope("head"):
            return multiply(hidden_BTD, TransposedKernel(self.head_kernel(params)), jnp.float32)

    def head_kernel(self, params: Params) -> Array:
        """What hidden states are multiplied with, (V, D) float32: the embedding when tied."""
        outer = self._surroundings(params)
        return outer.embed.embedding[...] if self.config.tie_word_embeddings else outer.lm_head.kernel[...].T

    def apply(
        self,
        params: Params,
        tokens_BT: Array,
        positions_BT: Array | None = None,
        segment_ids_BT: Array | None = None,
    ) -> tuple[Array, ModelOutput]:
        """`logits` of `hidden`, and the latter's output."""
        output = self.hidden(params, tokens_BT, positions_BT, segment_ids_BT)
        return self.logits(params, output.hidden_BTD), output

    def _surroundings(self, params: Params) -> Surroundings:
        graph, _ = _split_abstract("surroundings", self.config, self.compute)
        return nnx.merge(graph, {name: value for name, value in params.items() if name != "layers"})

    def _context(self, tokens_BT, positions_BT, segment_ids_BT, cache, write_index):
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        if cache is not None:
            cache = cache.write_positions(positions_BT, write_index)
        length_BT = None
        if self.config.rope_scaling is not None and self.config.rope_scaling.rope_type == "dynamic":
            seen = positions_BT if cache is None else cache.positions_BS
            length_BT = rope.document_length(seen, segment_ids_BT)
            length_BT = length_BT if cache is None else length_BT[:, :1]
        cos_BTh, sin_BTh = rope.rope_tables(self.config, positions_BT, length_BT)
        seen_BS = None if cache is None else cache.positions_BS
        return _Context(cos_BTh, sin_BTh, positions_BT, segment_ids_BT, seen_BS, write_index), cache

    def _layers(self, layers: Params, x_BTD: Array, context: _Context, cache: KVCache | None, keys_L: Array | None):
        """Scans the layers; returns the residual stream, the cache and the sum of the router losses."""
        if cache is not None or isinstance(layers, tuple):
            return self._loose_layers(layers, x_BTD, context, cache, keys_L)
        graph, _ = _split_abstract("layers", self.config, self.compute)

        def run(x_BTD, layer):
            params, key = layer
            x_BTD, _, router_loss = nnx.merge(graph, params)(x_BTD, context, None, key)
            return x_BTD, router_loss

        remat, L = self.compute.remat, self.config.num_hidden_layers
        if remat == "full":
            run = jax.checkpoint(run)
        elif remat == "dots":
            policies = jax.checkpoint_policies
            keep = policies.save_from_both_policies(
                policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(*SAVED_NAMES)
            )
            run = jax.checkpoint(run, policy=keep)
        with jax.named_scope("layers"):
            x_BTD, losses_L = jax.lax.scan(run, x_BTD, (layers, keys_L), unroll=scan_unroll(self.compute, L))
        return x_BTD, None, jnp.sum(losses_L)

    def _loose_layers(self, layers, x_BTD, context: _Context, cache: KVCache | None, keys_L):
        """`_layers` one after another, of parameters from `unstack_layers`, or of stacked ones with a cache."""
        graph, _ = _split_abstract("layers", self.config, self.compute)
        layers = layers if isinstance(layers, tuple) else _unstack(layers)
        losses, caches = [], []
        for index, params in enumerate(layers):
            with jax.named_scope("layers"):
                key = None if keys_L is None else keys_L[index]
                layer_cache = None if cache is None else cache.layers[index]
                x_BTD, layer_cache, loss = nnx.merge(graph, params)(x_BTD, context, layer_cache, key)
            losses.append(loss)
            caches.append(layer_cache)
        return x_BTD, cache and cache._replace(layers=tuple(caches)), sum(losses)


def unstack_layers(params: Params) -> Params:
    """The same parameters for generation, which `LanguageModel` takes, too: `layers` is a tuple of one tree a layer,
    and on a CPU the layers' kernels are stored as (out, in).

    A scan copies each layer's kernels out of the stack at every token, which takes as long as the products themselves.
    The program is longer and compiles more slowly.
    """
    if isinstance(params["layers"], tuple):
        return params
    layers = _unstack(params["layers"])
    return {**params, "layers": _transpose_kernels(layers) if jax.default_backend() == "cpu" else layers}


@jax.jit
def _unstack(stacked: Params) -> tuple[Params, ...]:
    count = jax.tree.leaves(stacked)[0].shape[0]
    return tuple(jax.tree.map(operator.itemgetter(index), stacked) for index in range(count))


@jax.jit
def _transpose_kernels(layers: tuple[Params, ...]) -> tuple[Params, ...]:
    """Experts' kernels and the router's stay as they are: the mixture does not multiply row by row."""

    def transpose(path, leaf):
        names = {key.key for key in path[1:]}
        return TransposedKernel(leaf.T) if "kernel" in names and "router" not in names and leaf.ndim == 2 else leaf

    return jax.tree_util.tree_map_with_path(transpose, layers)

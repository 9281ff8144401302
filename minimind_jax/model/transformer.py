"""The decoder-only transformer of Qwen3 and Qwen3-MoE: `LanguageModel`, the functional face of the modules in `layers`.

The layers' parameters are stacked on a leading L axis and scanned.
"""

import contextlib
import dataclasses
import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from minimind_jax.model import rope
from minimind_jax.model.attention import SAVED_NAMES
from minimind_jax.model.config import ComputeConfig, ModelConfig
from minimind_jax.model.kv_cache import KVCache
from minimind_jax.model.layers import Block, Context, Surroundings, dropout
from minimind_jax.model.linear import TransposedKernel, multiply
from minimind_jax.model.lora import Adapter

Params = dict[str, Any]


class ModelOutput(NamedTuple):
    """hidden_BTD: after the last norm, in the compute dtype. router_loss: float32 scalar, 0 for a dense model.
    cache: the key/value cache with these tokens in it, None when none was given."""

    hidden_BTD: Array
    router_loss: Array
    cache: KVCache | None


def compute_dtype(compute: ComputeConfig) -> jnp.dtype:
    """The dtype of activations and matrix products; `auto` is bfloat16 where the default device is no CPU."""
    if compute.dtype == "auto":
        return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return jnp.dtype(compute.dtype)


def full_precision(compute: ComputeConfig) -> contextlib.AbstractContextManager:
    """In which products of float32 are those of float32, where `compute` asks for that dtype by name: devices multiply
    it in TF32 (GPU) or bfloat16 (TPU) unless they are told. Nothing changes on a CPU."""
    return jax.default_matmul_precision("highest") if compute.dtype == "float32" else contextlib.nullcontext()


def _in_full_precision(method):
    @functools.wraps(method)
    def run(self, *args, **kwargs):
        with full_precision(self.compute):
            return method(self, *args, **kwargs)

    return run


def scan_unroll(compute: ComputeConfig, layers: int) -> int:
    """Layers unrolled per step of the scan."""
    if compute.scan_unroll is None:
        return layers if layers <= 32 and compute.remat != "full" else 1
    return compute.scan_unroll or layers


def count_parameters(params: Params) -> int:
    """Numbers in a tree of arrays or shapes; a tied head counts once."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _make(kind: str, config: ModelConfig, compute: ComputeConfig, adapter: Adapter | None, key: Array) -> nnx.Module:
    rngs = nnx.Rngs(params=key)
    return Block(config, compute, adapter, rngs=rngs) if kind == "layers" else Surroundings(config, rngs=rngs)


@functools.lru_cache(maxsize=32)
def _split_abstract(
    kind: str, config: ModelConfig, compute: ComputeConfig, adapter: Adapter | None
) -> tuple[nnx.GraphDef, nnx.State]:
    """Graph definition and shapes of one layer (`layers`) or of the rest (`surroundings`)."""
    return nnx.split(nnx.eval_shape(lambda: _make(kind, config, compute, adapter, jax.random.key(0))))


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model as pure functions of its parameters, a nested dict of float32 arrays. Hashable: may be a static argument
    of `jax.jit` or closed over.

    Parameters of the layers have a leading L axis; linear kernels are (in, out). See docs of the project for the tree.
    Others that stand beside them (a head of scores, a teacher) are ignored.
    adapter: the low-rank adapters that are in the parameters, too (see `lora`); None for none.
    """

    config: ModelConfig
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    adapter: Adapter | None = None

    def init(self, key: Array) -> Params:
        """Fresh parameters: N(0, initializer_range) for embeddings and kernels, 1 for norms; 0 for the kernels that add
        to the residual stream, with zero_init_outputs. Adapters are 0 (see `lora.init_adapters`)."""

        def initial(kind, key):
            return nnx.to_pure_dict(nnx.state(_make(kind, self.config, self.compute, self.adapter, key), nnx.Param))

        outer_key, layers_key = jax.random.split(key)
        layer_keys = jax.random.split(layers_key, self.config.num_hidden_layers)
        layers = jax.vmap(functools.partial(initial, "layers"))(layer_keys)
        return {**initial("surroundings", outer_key), "layers": layers}

    def abstract_params(self) -> Params:
        """Shapes and dtypes of the parameters, without making them."""
        return jax.tree.map(lambda leaf: leaf, _abstract_params(self))  # dicts of the caller's own

    def logical_axes(self) -> Params:
        """For each parameter a tuple with the name of each of its axes: layers, embed, heads, kv_heads, mlp, experts,
        vocab, or None."""

        def names(kind, prefix):
            state = self._split(kind)[1]
            is_param = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
            tree = jax.tree.map(lambda param: prefix + param.get_metadata("axes"), state, is_leaf=is_param)
            return nnx.to_pure_dict(tree)

        return {**names("surroundings", ()), "layers": names("layers", ("layers",))}

    def read_batch(self, params: Params, batch: dict[str, Array], dropout_key: Array | None = None) -> ModelOutput:
        """`hidden` of packed rows: tokens, positions and segment_ids (B, T) of a batch, whose other arrays are ignored.
        Whatever trains or scores on batches reads them here."""
        arrays = batch["tokens"], batch["positions"], batch["segment_ids"]
        return self.hidden(params, *arrays, dropout_key=dropout_key)

    @_in_full_precision
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
            of unequal length are padded on the left and share one write index. With the number 0 they are the first
            tokens of their rows, in order.
        dropout_key: of this pass; None for no dropout. Embeddings and both branches of a layer are dropped out.
        """
        context, cache = self._context(tokens_BT, positions_BT, segment_ids_BT, cache, write_index)
        outer = self._surroundings(params)
        keys_L = None
        with jax.named_scope("embed"):
            x_BTD = outer.embed(tokens_BT, compute_dtype(self.compute))
            if dropout_key is not None:
                embed_key, layers_key = jax.random.split(dropout_key)
                x_BTD = dropout(x_BTD, self.config.dropout, embed_key)
                keys_L = jax.random.split(layers_key, self.config.num_hidden_layers)
        x_BTD, cache, router_loss = self._layers(params["layers"], x_BTD, context, cache, keys_L)
        with jax.named_scope("norm"):
            return ModelOutput(outer.norm(x_BTD), router_loss, cache)

    @_in_full_precision
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

    def _split(self, kind: str) -> tuple[nnx.GraphDef, nnx.State]:
        return _split_abstract(kind, self.config, self.compute, self.adapter)

    def _surroundings(self, params: Params) -> Surroundings:
        """Of the parameters its own: others may stand beside them, a head of scores or another model."""
        graph, own = self._split("surroundings")
        return nnx.merge(graph, {name: params[name] for name in own})

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
        if cache is not None and positions_BT.shape[1] == 1 and jax.default_backend() == "cpu":
            # XLA computes cosines again wherever they are read, in every layer and for every head, but not a product.
            identity = jnp.eye(cos_BTh.shape[-1])
            cos_BTh, sin_BTh = cos_BTh @ identity, sin_BTh @ identity
        seen_BS = None if cache is None else cache.positions_BS
        if cache is not None and isinstance(write_index, int) and write_index == 0:
            # Nothing else can be seen in the cache: attention of whole rows, by the platform's kernel.
            segment_ids_BT, seen_BS = (positions_BT >= 0).astype(jnp.int32), None
        return Context(cos_BTh, sin_BTh, positions_BT, segment_ids_BT, seen_BS, write_index), cache

    def _layers(self, layers: Params, x_BTD: Array, context: Context, cache: KVCache | None, keys_L: Array | None):
        """Scans the layers; returns the residual stream, the cache and the sum of the router losses."""
        if cache is not None or isinstance(layers, tuple):
            return self._loose_layers(layers, x_BTD, context, cache, keys_L)
        graph, _ = self._split("layers")

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

    def _loose_layers(self, layers, x_BTD, context: Context, cache: KVCache | None, keys_L):
        """`_layers` one after another, of parameters from `unstack_layers`, or of stacked ones with a cache."""
        graph, _ = self._split("layers")
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


@functools.lru_cache(maxsize=32)
def _abstract_params(model: LanguageModel) -> Params:
    return jax.eval_shape(model.init, jax.random.key(0))

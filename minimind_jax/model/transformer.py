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
from minimind_jax.model.attention import SAVED_NAMES, attention, cached_attention, choose_path
from minimind_jax.model.config import ComputeConfig, ModelConfig, Platform
from minimind_jax.model.kv_cache import KVCache
from minimind_jax.model.layers import Attend, Block, Context, Surroundings, dropout
from minimind_jax.model.linear import TransposedKernel, multiply
from minimind_jax.model.loose_experts import LooseKernels
from minimind_jax.model.lora import Adapter
from minimind_jax.model.vision import VISION, features, init_vision, project, row_features, splice, vision_axes

Params = dict[str, Any]

# Of a GPU's compiler: no sums in the order in which threads come, and kernels chosen by rule and not by time, which
# another process would measure otherwise.
FIXED_ORDER = {"xla_gpu_deterministic_ops": True}


class ModelOutput(NamedTuple):
    """hidden_BTD: after the last norm, in the compute dtype. router_loss: float32 scalar, 0 for a dense model."""

    hidden_BTD: Array
    router_loss: Array


def full_precision(compute: ComputeConfig) -> contextlib.AbstractContextManager:
    """In which products of float32 are those of float32, where `compute` asks for that dtype by name: devices multiply
    it in TF32 (GPU) or bfloat16 (TPU) unless they are told. Nothing changes on a CPU."""
    return jax.default_matmul_precision("highest") if compute.dtype == "float32" else contextlib.nullcontext()


def compiler_options(compute: ComputeConfig, platform: str) -> dict[str, bool] | None:
    """Of `jax.jit`: what `compute.deterministic` asks of a GPU's compiler. Others do it so anyway."""
    return FIXED_ORDER if compute.deterministic and platform in ("gpu", "cuda") else None


def in_full_precision(method):
    """Of a method of a model with a `compute`, which it follows as `full_precision` says."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        with full_precision(self.compute):
            return method(self, *args, **kwargs)

    return run


def compute_dtype(compute: ComputeConfig, platform: Platform) -> jnp.dtype:
    """Of activations and matrix products."""
    if compute.dtype == "auto":
        return jnp.dtype("float32" if platform == "cpu" else "bfloat16")
    return jnp.dtype(compute.dtype)


def scan_unroll(compute: ComputeConfig, layers: int) -> int:
    """Layers unrolled per step of the scan."""
    if compute.scan_unroll is None:
        return layers if layers <= 32 and compute.remat != "full" else 1
    return compute.scan_unroll or layers


def count_parameters(params: Params) -> int:
    """Numbers in a tree of arrays or shapes; a tied head counts once."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def cast_matrices(params: Params, dtype: Any) -> Params:
    """The same parameters with their kernels and embeddings in `dtype`, so that no step reads and casts more; norms and
    routers stay as they are."""

    def cast(path, leaf):
        names = [key.key for key in path]
        is_matrix = names[-1] in ("kernel", "embedding") and "router" not in names
        return leaf.astype(dtype, copy=False) if is_matrix else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def _make(kind: str, config: ModelConfig, adapter: Adapter | None, key: Array) -> nnx.Module:
    rngs = nnx.Rngs(params=key)
    return Block(config, adapter, rngs=rngs) if kind == "layers" else Surroundings(config, rngs=rngs)


@functools.lru_cache(maxsize=32)
def _split_abstract(kind: str, config: ModelConfig, adapter: Adapter | None) -> tuple[nnx.GraphDef, nnx.State]:
    """Graph definition and shapes of one layer (`layers`) or of the rest (`surroundings`)."""
    return nnx.split(nnx.eval_shape(lambda: _make(kind, config, adapter, jax.random.key(0))))


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model as pure functions of its parameters, a nested dict of float32 arrays. Hashable: may be a static argument
    of `jax.jit` or closed over.

    Two functions read tokens, as the embeddings that `embed` makes of them, some of which may be those of images:
    `read_rows` whole rows, to train and to score; `read_next` what follows in each row of a cache: a whole prompt, a
    part of a long one, or the next token.

    Parameters of the layers have a leading L axis; linear kernels are (in, out); those of a tower and a projector are a
    branch of their own (see `vision`), and a model that sees reads batches of texts as any other does. See docs of the
    project for the tree. Others that stand beside them (a head of scores, a teacher) are ignored.
    adapter: the low-rank adapters that are in the parameters, too (see `lora`); None for none.
    platform: of the devices it runs on, by default JAX's own; dtypes and paths that are `auto` follow from it.
    """

    config: ModelConfig
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    adapter: Adapter | None = None
    platform: Platform = dataclasses.field(default_factory=jax.default_backend)

    @property
    def dtype(self) -> jnp.dtype:
        return compute_dtype(self.compute, self.platform)

    def init(self, key: Array) -> Params:
        """Fresh parameters: N(0, initializer_range) for embeddings and kernels, 1 for norms; 0 for the kernels that add
        to the residual stream, with zero_init_outputs. Adapters are 0 (see `lora.init_adapters`)."""

        def initial(kind, key):
            return nnx.to_pure_dict(nnx.state(_make(kind, self.config, self.adapter, key), nnx.Param))

        outer_key, layers_key = jax.random.split(key)
        layer_keys = jax.random.split(layers_key, self.config.num_hidden_layers)
        layers = jax.vmap(functools.partial(initial, "layers"))(layer_keys)
        params = {**initial("surroundings", outer_key), "layers": layers}
        if (vision := self.config.vision) is not None:
            sizes = self.config.hidden_size, self.config.initializer_range
            params[VISION] = init_vision(vision, *sizes, jax.random.fold_in(key, 1))
        return params

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

        axes = {**names("surroundings", ()), "layers": names("layers", ("layers",))}
        return axes if self.config.vision is None else {**axes, VISION: vision_axes(self.config.vision)}

    def embed(self, params: Params, tokens_BT: Array, images_BMD: Array | None = None) -> Array:
        """What the network reads, (B, T, D) in the compute dtype.

        images_BMD: image tokens, of `project`, that stand in the places of each row's markers (see `vision.splice`).
        """
        with jax.named_scope("embed"):
            x_BTD = self._surroundings(params).embed(tokens_BT, self.dtype)
            return x_BTD if images_BMD is None else splice(x_BTD, self._is_marker(tokens_BT), images_BMD)

    @in_full_precision
    def features(self, params: Params, pixels_NHWC: Array) -> Array:
        """What the tower says of images, (N, P, W); see `vision.features`."""
        return features(self.config.vision, params[VISION]["tower"], pixels_NHWC, self.dtype, self.platform)

    @in_full_precision
    def project(self, params: Params, features_NPW: Array) -> Array:
        """Tokens of images, (..., image_tokens, D), from their `features`."""
        return project(self.config.vision, params[VISION]["projector"], features_NPW, self.dtype, self.platform)

    def read_batch(self, params: Params, batch: dict[str, Array], dropout_key: Array | None = None) -> ModelOutput:
        """`read_rows` of a batch, and the one place where batches are read: its tokens with positions and segment_ids
        (B, T), or with lengths (B,) if each row is one document; with pixels or features if there are images to see
        (see `vision`). Other arrays are ignored."""
        x_BTD = self.embed(params, batch["tokens"], self._images(params, batch))
        if "lengths" in batch:
            return self.read_rows(params, x_BTD, lengths_B=batch["lengths"], dropout_key=dropout_key)
        return self.read_rows(params, x_BTD, batch["positions"], batch["segment_ids"], dropout_key=dropout_key)

    @in_full_precision
    def read_rows(
        self,
        params: Params,
        x_BTD: Array,
        positions_BT: Array | None = None,
        segment_ids_BT: Array | None = None,
        *,
        lengths_B: Array | None = None,
        dropout_key: Array | None = None,
    ) -> ModelOutput:
        """The network without its head over whole rows.

        positions_BT: int32 position of each token in its document, 0..T-1 when None.
        segment_ids_BT: int32, 0 for padding and 1.. for the documents of a packed row; attention stays inside a
            document. None: each row is one document.
        lengths_B: tokens of each row, where it is one document and what is behind it padding. That needs no mask, which
            segment ids do: no token sees what follows. What comes out for padding is then of no use.
        dropout_key: of this pass; None for no dropout. Embeddings and both branches of a layer are dropped out.
        """
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2])
        is_token_BT = None if segment_ids_BT is None else segment_ids_BT > 0
        if lengths_B is not None:
            is_token_BT = positions_BT < lengths_B[:, None]
        keys_L = None
        if dropout_key is not None:
            embed_key, layers_key = jax.random.split(dropout_key)
            x_BTD = dropout(x_BTD, self.config.dropout, embed_key)
            keys_L = jax.random.split(layers_key, self.config.num_hidden_layers)
        length_BT, scaling = None if lengths_B is None else lengths_B[:, None], self.config.rope_scaling
        if length_BT is None and scaling is not None and scaling.rope_type == "dynamic":
            length_BT = rope.document_length(positions_BT, segment_ids_BT)
        attend = self._attend_row(x_BTD, segment_ids_BT)
        context = self._context(positions_BT, length_BT, is_token_BT, lambda q, k, v, _: (attend(q, k, v), None))
        x_BTD, router_loss = self._layers(params["layers"], x_BTD, context, keys_L)
        return ModelOutput(self._norm(params, x_BTD), router_loss)

    def new_cache(self, rows: int, slots: int) -> KVCache:
        """An empty cache for `rows` rows of `slots` tokens."""
        return KVCache.create(self.config, rows, slots, self.dtype, self.platform)

    @in_full_precision
    def read_next(
        self,
        params: Params,
        x_BTD: Array,
        starts_B: Array | None,
        cache: KVCache,
        lengths_B: Array | None = None,
        rows_B: Array | None = None,
        adapter_B: Array | None = None,
    ) -> tuple[Array, KVCache]:
        """Hidden states (B, T, D) of T more tokens of each row, and the cache with them in slots starts..starts+T-1.

        starts_B: tokens of each row that the cache holds, which the new ones see; what is in later slots is written
        over, tokens beyond the last slot are dropped. None: none, and attention is that of whole rows. lengths_B: of
        each row with these, where padding is behind them. rows_B: the rows of the cache; beyond its last for a row
        that is there to fill up and is not kept. As many as the cache has, or None, are in its order. adapter_B: the
        number of each row's adapter, where the parameters hold several (see `lora.stack`); -1 for none.
        """
        B, T, _ = x_BTD.shape
        attend_row = self._attend_row(x_BTD, None) if starts_B is None else None
        starts_B = jnp.zeros(B, jnp.int32) if starts_B is None else starts_B
        positions_BT = starts_B[:, None] + jnp.arange(T)
        length_B = starts_B + T if lengths_B is None else lengths_B

        def attend(q_BTNH, k_BTKH, v_BTKH, layer):
            layer = layer.write(k_BTKH, v_BTKH, positions_BT, rows_B)
            if attend_row is not None:
                return attend_row(q_BTNH, k_BTKH, v_BTKH), layer
            return cached_attention(q_BTNH, layer, positions_BT, self.platform, rows_B), layer

        context = self._context(positions_BT, length_B[:, None], None, attend, adapter_B)
        return self._read_into(cache, params, x_BTD, context)

    @in_full_precision
    def logits(self, params: Params, hidden_BTD: Array) -> Array:
        """Scores of the next token, float32 (B, T, V)."""
        with jax.named_scope("head"):
            return multiply(hidden_BTD, TransposedKernel(self.head_kernel(params)), self.platform, jnp.float32)

    def head_kernel(self, params: Params) -> Array:
        """What hidden states are multiplied with, (V, D) float32: the embedding when tied."""
        outer = self._surroundings(params)
        if self.config.tie_word_embeddings:
            return outer.embed.embedding[...]
        kernel = outer.lm_head.kernel[...]
        return kernel.kernel_OI if isinstance(kernel, TransposedKernel) else kernel.T

    def apply(
        self, params: Params, tokens_BT: Array, positions_BT: Array | None = None, segment_ids_BT: Array | None = None
    ) -> tuple[Array, ModelOutput]:
        """`logits` of `read_rows`, and the latter's output."""
        output = self.read_rows(params, self.embed(params, tokens_BT), positions_BT, segment_ids_BT)
        return self.logits(params, output.hidden_BTD), output

    def unstack(self, params: Params) -> Params:
        """The same parameters for generation, which all functions here take, too: `layers` is a tuple of one tree a
        layer, and on a CPU kernels are stored as (out, in), the head's too, and experts apart (see `loose_experts`).

        A scan copies each layer's kernels out of the stack at every token, which takes as long as the products
        themselves. The program is longer and compiles more slowly. No gradient passes through experts apart.
        """
        if isinstance(params["layers"], tuple):
            return params
        arranged = {name: params[name] for name in ("layers", "lm_head") if name in params}
        return {**params, **_lay_out(self, arranged)}

    @in_full_precision
    def _images(self, params: Params, batch: dict[str, Array]) -> Array | None:
        """The image tokens of a batch's rows, (B, M, D); None for a batch of texts."""
        if self.config.vision is None or not {"pixels", "features"} & batch.keys():
            return None
        found_BIPW = batch.get("features")
        if found_BIPW is None:
            found_BIPW = row_features(
                self.config.vision, params[VISION]["tower"], batch["pixels"], self._is_marker(batch["tokens"]),
                self.dtype, self.platform, self.compute,
            )  # fmt: skip
        return self.project(params, found_BIPW).reshape(len(found_BIPW), -1, self.config.hidden_size)

    def _is_marker(self, tokens_BT: Array) -> Array:
        return tokens_BT == self.config.vision.marker_id

    def _split(self, kind: str) -> tuple[nnx.GraphDef, nnx.State]:
        return _split_abstract(kind, self.config, self.adapter)

    def _surroundings(self, params: Params) -> Surroundings:
        """Of the parameters its own: others may stand beside them, a head of scores or another model."""
        graph, own = self._split("surroundings")
        return nnx.merge(graph, {name: params[name] for name in own})

    def _context(self, positions_BT, length_BT, is_token_BT, attend: Attend, adapter_B=None) -> Context:
        cos_BTh, sin_BTh = rope.rope_tables(self.config, positions_BT, length_BT)
        if self.platform == "cpu":
            # XLA computes cosines again wherever they are read, in every layer and for every head, but not a product.
            cos_BTh, sin_BTh = (table_BTh @ jnp.eye(table_BTh.shape[-1]) for table_BTh in (cos_BTh, sin_BTh))
        return Context(cos_BTh, sin_BTh, is_token_BT, attend, self.compute.experts, self.platform, adapter_B)

    def _attend_row(self, x_BTD: Array, segment_ids_BT: Array | None):
        """Attention over the row itself, by the path that the model and its devices allow."""
        shape, mesh = self.config, jax.sharding.get_abstract_mesh()
        queries = (*x_BTD.shape[:2], shape.num_attention_heads, shape.head_dim)
        asked, own = self.compute.attention, (self.dtype, self.platform, mesh, self.compute.deterministic)
        path = choose_path(asked, queries, shape.num_key_value_heads, *own).path
        return functools.partial(attention, segment_ids_BT=segment_ids_BT, path=path, platform=self.platform)

    def _norm(self, params: Params, x_BTD: Array) -> Array:
        with jax.named_scope("norm"):
            return self._surroundings(params).norm(x_BTD)

    def _layers(self, layers: Params, x_BTD: Array, context: Context, keys_L: Array | None) -> tuple[Array, Array]:
        """Scans the layers; returns the residual stream and the sum of the router losses."""
        if isinstance(layers, tuple):
            x_BTD, _, router_loss = self._loose_layers(layers, x_BTD, context, keys=keys_L)
            return x_BTD, router_loss
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
        return x_BTD, jnp.sum(losses_L)

    def _read_into(self, cache: KVCache, params: Params, x_BTD: Array, context: Context) -> tuple[Array, KVCache]:
        layers = params["layers"] if isinstance(params["layers"], tuple) else _unstack(params["layers"])
        x_BTD, caches, _ = self._loose_layers(layers, x_BTD, context, cache.layers)
        return self._norm(params, x_BTD), KVCache(caches)

    def _loose_layers(self, layers, x_BTD, context: Context, caches=None, keys=None):
        """One layer after another: the residual stream, the layers' caches and the sum of the router losses."""
        graph, _ = self._split("layers")
        losses, written, none = [], [], [None] * len(layers)
        caches, keys = none if caches is None else caches, none if keys is None else keys
        # Traced and lowered once for all layers, and inlined by XLA; called outside of a jitted function it compiles.
        run = jax.jit(lambda params, x_BTD, cache, key: nnx.merge(graph, params)(x_BTD, context, cache, key))
        for params, cache, key in zip(layers, caches, keys, strict=True):
            with jax.named_scope("layers"):
                x_BTD, cache, loss = run(params, x_BTD, cache, key)
            losses.append(loss)
            written.append(cache)
        return x_BTD, tuple(written), sum(losses)


@jax.jit
def _unstack(stacked: Params) -> tuple[Params, ...]:
    count = jax.tree.leaves(stacked)[0].shape[0]
    return tuple(jax.tree.map(operator.itemgetter(index), stacked) for index in range(count))


@functools.partial(jax.jit, static_argnums=0)
def _lay_out(model: LanguageModel, params: Params) -> Params:
    """Layers and head as `unstack` has them; one program, so that nothing is held a third time on the way."""
    params = {**params, "layers": _unstack(params["layers"])}

    def arrange(path, leaf):
        names = {key.key for key in path if isinstance(key, jax.tree_util.DictKey)}
        if "kernel" not in names or "router" in names:
            return leaf
        if "experts" not in names:
            return TransposedKernel(leaf.T)
        return LooseKernels.of(leaf, len(params["layers"])) if model.compute.experts == "auto" else leaf

    return jax.tree_util.tree_map_with_path(arrange, params) if model.platform == "cpu" else params


@functools.lru_cache(maxsize=32)
def _abstract_params(model: LanguageModel) -> Params:
    return jax.eval_shape(model.init, jax.random.key(0))

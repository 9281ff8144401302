"""What training changes: the step, the parameters and the optimizer's state; and what it only reads."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from minimind_jax.model.lora import TRAINED, Path, join, split
from minimind_jax.model.transformer import LanguageModel, Params, cast_matrices
from minimind_jax.training.optimizer import Group


def is_adapter(path: Path) -> bool:
    return path[-1] in TRAINED


class Parameters(NamedTuple):
    """The parameters of a run, as nested dicts: those that are trained, and those that its loss only reads.

    abstract, axes: shapes and dtypes, and logical axes, of all. load: makes or loads all of them, onto the mesh. It is
    called when there is no checkpoint, and for the frozen ones at every start, since checkpoints do not hold them.
    is_trained: of a parameter's path. groups: those with an optimizer of their own. layers: of the path of a trained
    parameter that is stacked over layers, the numbers of those that are trained; None for all. The others keep every
    bit, though they are part of a checkpoint and have moments, which are 0.
    """

    abstract: Params
    axes: Params
    load: Callable[[], Params]
    is_trained: Callable[[Path], bool] = lambda path: True
    groups: tuple[Group, ...] = ()
    layers: Callable[[Path], Sequence[int] | None] = lambda path: None

    def layer_masks(self) -> Params | None:
        """Of each trained parameter which of its values are: True, or a mask (L, 1, ...) over its layers. None: all."""

        def mask(path, leaf):
            layers = self.layers(tuple(entry.key for entry in path))
            if layers is None:
                return True
            return np.isin(np.arange(leaf.shape[0]), layers).reshape(-1, *[1] * (len(leaf.shape) - 1))

        masks = jax.tree_util.tree_map_with_path(mask, self.split(self.abstract)[0])
        return None if all(mask is True for mask in jax.tree.leaves(masks)) else masks

    def split(self, tree: Params) -> tuple[Params, Params]:
        """(trained, frozen) of a tree of all parameters."""
        return split(tree, self.is_trained)

    @classmethod
    def of(cls, model: LanguageModel, load: Callable[[], Params], frozen_dtype: str = "float32") -> "Parameters":
        """All parameters of a model: trained, or with adapters only these. frozen_dtype: of matrices that are not."""
        abstract, axes = model.abstract_params(), model.logical_axes()
        if model.adapter is None:
            return cls(abstract, axes, load)

        trained, frozen = split(abstract, is_adapter)
        shapes = jax.eval_shape(lambda params: cast_matrices(params, frozen_dtype), frozen)
        return cls(join(trained, shapes), axes, load, is_adapter)

    def adding(
        self, name: str, abstract: Params, axes: Params, load: Callable[[Params], Params], *, is_trained: bool = False
    ) -> "Parameters":
        """With those of another model, or of a head, as the branch `name`. load: makes them, on the mesh, out of all
        that were loaded before them."""

        def load_all() -> Params:
            params = self.load()
            return {**params, name: load(params)}

        return self._replace(
            abstract={**self.abstract, name: abstract},
            axes={**self.axes, name: axes},
            load=load_all,
            is_trained=lambda path: is_trained if path[0] == name else self.is_trained(path),
        )


class TrainState(NamedTuple):
    """step: int32 scalar, optimizer steps done. params: those that are trained, float32. opt_state: of the optax
    optimizer, float32. frozen: parameters that the loss reads beside them. held: int32 scalar, why the rest of a stride
    is not trained on, 0 where it is (see `step.Skip`); None without such a rule. The last two are in no checkpoint."""

    step: jax.Array
    params: Params
    opt_state: Any
    frozen: Params = {}  # noqa: RUF012  never changed in place, as no pytree is
    held: jax.Array | None = None

    def stored(self) -> "TrainState":
        """What a checkpoint holds."""
        return self._replace(frozen={}, held=None)

    def all_params(self) -> Params:
        """What the loss is given."""
        return join(self.frozen, self.params)


def fingerprint(params: Params) -> str:
    """Tells other values from the same ones, wherever they lie on a mesh: a hash of sums of their bits. "" for none.

    Sums of integers do not depend on their order, and so not on the mesh.
    """
    if not params:
        return ""

    def sums(params):
        def total(leaf):
            bits = jax.lax.bitcast_convert_type(leaf, jnp.uint16 if leaf.dtype.itemsize == 2 else jnp.uint32)
            place = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, bits.ndim - 1) if bits.ndim else jnp.uint32(0)
            return jnp.sum(bits.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)

        return jnp.stack([total(leaf) for leaf in jax.tree.leaves(params)])

    mesh = jax.tree.leaves(params)[0].sharding.mesh
    on_every_device = jax.jit(sums, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return hashlib.sha256(np.asarray(on_every_device(params)).tobytes()).hexdigest()[:16]


def create_state(
    params: Params, optimizer: optax.GradientTransformation, shardings: TrainState | None = None
) -> TrainState:
    """The state before the first step, of the parameters that are trained. The optimizer's arrays are made where
    `shardings` puts them."""

    def create(params):
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return jax.jit(create, out_shardings=shardings and shardings.stored())(params)


def state_shardings(
    optimizer: optax.GradientTransformation, param_shardings: Params, abstract_params: Params
) -> TrainState:
    """A TrainState of shardings: the optimizer's arrays lie as their parameters do, everything else is on all devices.

    param_shardings, abstract_params: trees of NamedSharding and of shapes (see `sharding.param_shardings`), of the
    parameters that are trained.
    """
    whole = NamedSharding(jax.tree.leaves(param_shardings)[0].mesh, PartitionSpec())

    def is_masked(node):  # where optax.partition leaves a parameter to another optimizer
        return isinstance(node, optax.MaskedNode)

    opt_shardings = optax.tree.map_params(
        optimizer,
        lambda node, sharding: node if is_masked(node) else sharding,
        jax.eval_shape(optimizer.init, abstract_params),
        param_shardings,
        transform_non_params=lambda _: whole,
        is_leaf=is_masked,
    )
    return TrainState(whole, param_shardings, opt_shardings)

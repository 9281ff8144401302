"""The policy that writes: the parameters as the last step left them, in an engine on this machine's devices."""

import functools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.inference.engine import Engine
from minimind_jax.model.transformer import LanguageModel, Params, cast_matrices
from minimind_jax.sharding import MESH_AXES


class LocalPolicy:
    """Writes with the parameters in training. There is one engine for all of them, so that nothing is compiled twice.

    model, tokenizer, mesh: of the run. slots: episodes in the making at once, of this process. context: most tokens of
    an episode. Alone, a process writes on the run's mesh. Of several, each has an engine of its own for its own
    episodes, whose rows are cut over its devices: each of these holds the whole model.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer | None, mesh: Mesh, *, slots: int, context: int):
        self._model, self._mesh = model, mesh
        # on a CPU a step takes as long as it has rows: when half of the answers are there, it is one of half as many
        sizes = [slots >> n for n in (1, 2, 3)] if model.platform == "cpu" else ()
        self._start = functools.partial(Engine, model, tokenizer=tokenizer, slots=slots, context=context, sizes=sizes)
        self._engine: Engine | None = None

    def load(self, params: Params) -> Engine:
        """The engine with these parameters, which lie on the mesh; others that stand beside the model's are left out.

        What was written with earlier ones is forgotten: the same requests get the same answers to the last bit,
        whatever was asked before. All processes call it together. Raises ValueError while answers are in work.
        """
        own = {name: params[name] for name in self._model.abstract_params()}
        if jax.process_count() > 1:
            whole = NamedSharding(self._mesh, PartitionSpec())
            own = jax.tree.map(self._on_own_devices, _cast_to(self._model.dtype, whole, own))
        if self._engine is None:
            self._engine = self._start(own)
        else:
            self._engine.load(own)
        return self._engine

    @functools.cached_property
    def _own_place(self) -> NamedSharding:
        """Whole on each device of this process, over which rows are cut."""
        devices = np.array(self._mesh.local_devices).reshape(-1, *[1] * (len(MESH_AXES) - 1))
        return NamedSharding(Mesh(devices, MESH_AXES), PartitionSpec())

    def _on_own_devices(self, array: jax.Array) -> jax.Array:
        """The same array without the other processes' copies of it."""
        parts = [shard.data for shard in array.addressable_shards]
        return jax.make_array_from_single_device_arrays(array.shape, self._own_place, parts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _cast_to(dtype: np.dtype, place: NamedSharding, params: Params) -> Params:
    """What an engine would cast, before it is sent."""
    return jax.lax.with_sharding_constraint(cast_matrices(params, dtype), place)

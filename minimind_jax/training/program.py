"""The jitted program of a run, from its settings: what the loop runs and `minimind plan` compiles."""

import math
from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh

from minimind_jax.config.stages import RunConfig
from minimind_jax.errors import UserError
from minimind_jax.losses import LossFn
from minimind_jax.sharding import param_shardings, row_shards
from minimind_jax.training.optimizer import make_clip, make_optimizer, make_rates
from minimind_jax.training.state import Parameters, TrainState, create_state, state_shardings
from minimind_jax.training.step import Skip, TrainStep, make_train_step


class Program(NamedTuple):
    """step: the jitted training step. parts: its micro-batches. optimizer: its optax transformation. shardings: of the
    state it takes. abstract: that state's shapes, dtypes and shardings."""

    step: TrainStep
    parts: int
    optimizer: optax.GradientTransformationExtraArgs
    shardings: TrainState
    abstract: TrainState


def make_program(
    config: RunConfig, parameters: Parameters, loss_fn: LossFn, mesh: Mesh, total_steps: int, skip: Skip | None = None
) -> Program:
    """The training step of `config` for these parameters on `mesh`; nothing is computed or compiled yet.

    Raises UserError for a warm-up that is longer than the run, and for rows or parameters that do not divide over the
    mesh.
    """
    parts = count_parts(config, mesh)
    trained, frozen = parameters.split(parameters.abstract)
    lies = parameters.split(param_shardings(mesh, parameters.axes, parameters.abstract))
    optimizer = make_optimizer(config.optimizer, total_steps, parameters.groups)
    shardings = state_shardings(optimizer, lies[0], trained)
    shardings = shardings._replace(frozen=lies[1], held=skip and shardings.step)
    step = make_train_step(
        loss_fn,
        optimizer,
        make_rates(config.optimizer, total_steps, parameters.groups),
        make_clip(config.training.max_grad_norm, parameters.groups),
        accumulation_steps=parts,
        seed=config.seed,
        masks=parameters.layer_masks(),
        skip=skip,
        shardings=shardings,
        compute=config.compute,
    )
    shapes = jax.eval_shape(lambda params: create_state(params, optimizer), trained)
    shapes = shapes._replace(frozen=frozen, held=skip and shapes.step)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return Program(step, parts, optimizer, shardings, abstract)


def count_parts(config: RunConfig, mesh: Mesh) -> int:
    """Micro-batches of a step: `training.accumulation_steps`, or as many fewer as a device's rows divide into.

    So settings made for one device run on many, which need fewer parts for the same memory.
    Raises UserError when the rows of a step do not divide over data x fsdp.
    """
    shards, rows, wanted = row_shards(mesh), config.rows_per_step, config.training.accumulation_steps
    if rows % shards:
        unit = config.data.seq_len * math.lcm(shards, wanted)
        raise UserError(
            f"{rows} rows a step do not divide over {shards} devices (mesh.data {mesh.shape['data']} x mesh.fsdp "
            f"{mesh.shape['fsdp']}); set training.batch_tokens to a multiple of {unit}, such as "
            f"{max(1, round(config.training.batch_tokens / unit)) * unit}"
        )
    return next(count for count in range(wanted, 0, -1) if rows // shards % count == 0)

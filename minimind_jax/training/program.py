"""The jitted program of a run, from its settings: what the loop runs and `minimind plan` compiles."""

from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh

from minimind_jax.config import PretrainConfig
from minimind_jax.losses import LossFn
from minimind_jax.sharding import param_shardings
from minimind_jax.training.optimizer import make_optimizer, make_schedule
from minimind_jax.training.state import Parameters, TrainState, create_state, state_shardings
from minimind_jax.training.step import TrainStep, make_train_step


class Program(NamedTuple):
    """step: the jitted training step. optimizer: its optax transformation. shardings: of the state it takes. abstract:
    that state's shapes, dtypes and shardings."""

    step: TrainStep
    optimizer: optax.GradientTransformationExtraArgs
    shardings: TrainState
    abstract: TrainState


def make_program(
    config: PretrainConfig, parameters: Parameters, loss_fn: LossFn, mesh: Mesh, total_steps: int
) -> Program:
    """The training step of `config` for these parameters on `mesh`; nothing is computed or compiled yet.

    Raises UserError for a warm-up that is longer than the run and for parameters that do not divide over the mesh.
    """
    trained, frozen = parameters.split(parameters.abstract)
    lies = parameters.split(param_shardings(mesh, parameters.axes, parameters.abstract))
    schedule = make_schedule(config.optimizer, total_steps)
    optimizer = make_optimizer(config.optimizer, total_steps, trained)
    shardings = state_shardings(optimizer, lies[0], trained, lies[1])
    step = make_train_step(
        loss_fn,
        optimizer,
        schedule,
        accumulation_steps=config.training.accumulation_steps,
        max_grad_norm=config.training.max_grad_norm,
        seed=config.seed,
        shardings=shardings,
    )
    shapes = jax.eval_shape(lambda params: create_state(params, optimizer), trained)._replace(frozen=frozen)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return Program(step, optimizer, shardings, abstract)

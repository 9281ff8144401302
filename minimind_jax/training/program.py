"""The jitted program of a run, from its settings: what the loop runs and `minimind plan` compiles."""

from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh

from minimind_jax.config import PretrainConfig
from minimind_jax.losses import LossFn
from minimind_jax.model.transformer import LanguageModel, Params
from minimind_jax.sharding import param_shardings
from minimind_jax.training.optimizer import make_optimizer, make_schedule
from minimind_jax.training.state import TrainState, create_state, state_shardings
from minimind_jax.training.step import TrainStep, make_train_step


class Program(NamedTuple):
    """step: the jitted training step. optimizer: its optax transformation. shardings: of the state it takes."""

    step: TrainStep
    optimizer: optax.GradientTransformationExtraArgs
    shardings: TrainState


def make_program(
    config: PretrainConfig, model: LanguageModel, loss_fn: LossFn, mesh: Mesh, total_steps: int
) -> Program:
    """The training step of `config` for `model` on `mesh`; nothing is computed or compiled yet.

    Raises UserError for a warm-up that is longer than the run and for parameters that do not divide over the mesh.
    """
    abstract_params = model.abstract_params()
    schedule = make_schedule(config.optimizer, total_steps)
    optimizer = make_optimizer(config.optimizer, total_steps, abstract_params)
    shardings = state_shardings(
        optimizer, param_shardings(mesh, model.logical_axes(), abstract_params), abstract_params
    )
    step = make_train_step(
        loss_fn,
        optimizer,
        schedule,
        accumulation_steps=config.training.accumulation_steps,
        max_grad_norm=config.training.max_grad_norm,
        seed=config.seed,
        shardings=shardings,
    )
    return Program(step, optimizer, shardings)


def abstract_state(optimizer, abstract_params: Params, shardings: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of the train state."""
    shapes = jax.eval_shape(lambda params: create_state(params, optimizer), abstract_params)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

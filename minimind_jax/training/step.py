"""The one training step that all stages share, and its evaluation twin."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from minimind_jax.errors import UserError
from minimind_jax.losses import Batch, LossFn, Metric, Metrics, together
from minimind_jax.model.config import ComputeConfig
from minimind_jax.model.lora import join
from minimind_jax.model.transformer import full_precision
from minimind_jax.seeds import named_key
from minimind_jax.sharding import ROW_AXES, batch_sharding, row_shards
from minimind_jax.training.state import TrainState

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    *,
    accumulation_steps: int = 1,
    max_grad_norm: float = 0.0,
    seed: int = 0,
    shardings: TrainState | None = None,
    compute: ComputeConfig | None = None,
) -> TrainStep:
    """A jitted `(state, batch) -> (state, metrics)`. The state is donated: its arrays are gone after the call.

    loss_fn: sums over one micro-batch (see `losses`), given all parameters; the gradient is of those that are trained.
    The numerators' gradients and the denominators are summed over `accumulation_steps` micro-batches and all devices
    and divided once, so that how a batch is cut changes nothing.
    schedule: of the learning rate, for the metrics; the optimizer is given the step and applies its own.
    max_grad_norm: global norm the gradient is scaled down to, as torch's clip_grad_norm_ does; 0 for no clipping.
    seed: the dropout key of a micro-batch is derived from it, the step and the micro-batch's number.
    shardings: of the state (see `state_shardings`), when it lies on a mesh. compute: of the model, for the precision of
    float32.

    A loss or gradient that is not finite leaves params and opt_state as they were; the step still counts, so that the
    run gets past the batch if it goes on.

    Metrics, scalars on the device: loss, grad_norm (before clipping), learning_rate, tokens (the denominator, if the
    loss function does not say), finite (1 or 0), and the values of the loss function's own.
    """

    @_precisely(compute)
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        micro_batches = _micro_batches(batch, accumulation_steps, shardings)
        grads, numerator, denominator, metrics = _summed_gradients(loss_fn, state, micro_batches, seed)
        divisor = jnp.maximum(denominator, 1)
        loss = numerator / divisor
        with jax.named_scope("clip"):
            grads = jax.tree.map(lambda grad: grad / divisor, grads)
            grad_norm = optax.tree.norm(grads)
            if max_grad_norm:
                grads = jax.tree.map(lambda grad: grad * jnp.minimum(max_grad_norm / (grad_norm + 1e-6), 1), grads)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params, step=state.step)
            params = optax.apply_updates(state.params, updates)
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
            )
        metrics = {
            "tokens": denominator,
            **{name: metric.value() for name, metric in metrics.items()},
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step),
            "finite": finite.astype(jnp.int32),
        }
        return TrainState(state.step + 1, params, opt_state, state.frozen), metrics

    if shardings is None:
        return jax.jit(train_step, donate_argnums=0)
    return jax.jit(
        _with_mesh(train_step, shardings.step.mesh),
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(shardings.step.mesh)),
        out_shardings=(shardings, shardings.step),
    )


def make_eval_step(
    loss_fn: LossFn, mesh: Mesh | None = None, compute: ComputeConfig | None = None
) -> Callable[[Any, Batch], Metrics]:
    """A jitted `(params, batch) -> metrics`: `loss` and the loss function's own.

    No dropout. Those of all batches are put `losses.together`. mesh: of params and batch, if on one.
    compute: as in `make_train_step`.
    """

    @_precisely(compute)
    def eval_step(params: Any, batch: Batch) -> Metrics:
        numerator, denominator, metrics = loss_fn(params, batch, None)
        return {**metrics, "loss": Metric(numerator, denominator)}

    return jax.jit(eval_step if mesh is None else _with_mesh(eval_step, mesh))


def _precisely(compute: ComputeConfig | None) -> Callable[[Callable], Callable]:
    """Traces a function, gradients included, in the precision that `compute` asks for."""

    def wrap(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args):
            with full_precision(compute or ComputeConfig()):
                return function(*args)

        return run

    return wrap


def _with_mesh(function: Callable, mesh: Mesh) -> Callable:
    """`function`, which finds `mesh` in `sharding.current_mesh` while it is traced: kernels and experts need it."""

    @functools.wraps(function)
    def run(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return run


def _micro_batches(batch: Batch, count: int, shardings: TrainState | None) -> Batch:
    """(rows, ...) to (count, rows / count, ...); micro-batch m has the rows m, m + count, m + 2 count and so on.

    Every device holds neighbouring rows of a batch, so this cut leaves all rows where they are.
    """
    rows = len(next(iter(batch.values())))
    devices = 1 if shardings is None else row_shards(shardings.step.mesh)
    if rows % (count * devices):
        raise UserError(
            f"a batch of {rows} rows does not divide by training.accumulation_steps {count} x {devices} devices "
            "(mesh.data x mesh.fsdp); choose training.batch_tokens so that it does"
        )

    def cut(array):
        array = array.reshape(rows // count, count, *array.shape[1:]).swapaxes(0, 1)
        if shardings is None:
            return array
        return jax.lax.with_sharding_constraint(
            array, NamedSharding(shardings.step.mesh, PartitionSpec(None, ROW_AXES))
        )

    return jax.tree.map(cut, batch)


def _summed_gradients(loss_fn: LossFn, state: TrainState, micro_batches: Batch, seed: int):
    """(gradient of the numerator, numerator, denominator, metrics), each summed over the micro-batches."""
    step_key = named_key(seed, "dropout", state.step)

    def numerator_fn(params, batch, key):
        with jax.named_scope("loss"):
            numerator, denominator, metrics = loss_fn(join(state.frozen, params), batch, key)
        return numerator, (denominator, metrics)

    def add_gradient(grads, inputs):
        index, batch = inputs
        (numerator, (denominator, metrics)), new = jax.value_and_grad(numerator_fn, has_aux=True)(
            state.params, batch, jax.random.fold_in(step_key, index)
        )
        return jax.tree.map(jnp.add, grads, new), (numerator, denominator, metrics)

    count = len(next(iter(micro_batches.values())))
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    grads, (numerators, denominators, metrics) = jax.lax.scan(add_gradient, zeros, (jnp.arange(count), micro_batches))
    return grads, numerators.sum(axis=0), denominators.sum(axis=0), together(metrics)

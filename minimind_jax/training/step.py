"""The one training step that all stages share, its program from a run's settings, and its evaluation twin."""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from minimind_jax.config.stages import RunConfig
from minimind_jax.errors import UserError
from minimind_jax.losses import Batch, LossFn, Metric, Metrics, together
from minimind_jax.model.config import ComputeConfig
from minimind_jax.model.lora import join
from minimind_jax.model.transformer import Params, compiler_options, full_precision
from minimind_jax.seeds import named_key
from minimind_jax.sharding import ROW_AXES, batch_sharding, param_shardings, row_shards
from minimind_jax.training.optimizer import make_clip, make_optimizer, make_rates
from minimind_jax.training.state import Parameters, TrainState, create_state, state_shardings

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]

MADE, NOT_FINITE, NOTHING = 0, 1, 2  # values of the metric `skipped`; above are the limits of a `Skip`, in their order


class Skip(NamedTuple):
    """Updates that a stage does not want: those of a step of which a metric is above a limit (PPO's `approx_kl`), and
    those of the steps behind it up to a multiple of `stride`."""

    above: Mapping[str, float]  # metric -> limit
    stride: int = 1  # steps that belong together (see `source.Source`)


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
    """The training step of `config` for these parameters on `mesh`; nothing is computed or compiled yet. Raises
    UserError for a warm-up that is longer than the run, and for rows or parameters that do not divide over the mesh."""
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


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformationExtraArgs,
    rates: Callable[[jax.Array], dict[str, jax.Array]],
    clip: Callable[[Params], tuple[Params, dict[str, jax.Array]]],
    *,
    accumulation_steps: int = 1,
    seed: int = 0,
    masks: Params | None = None,
    skip: Skip | None = None,
    shardings: TrainState | None = None,
    compute: ComputeConfig | None = None,
) -> TrainStep:
    """A jitted `(state, batch) -> (state, metrics)`. The state is donated: its arrays are gone after the call.

    loss_fn: sums over one micro-batch (see `losses`), given all parameters; the gradient is of those that are trained.
        The numerators' gradients and the denominators are summed over `accumulation_steps` micro-batches and all
        devices and divided once, so that how a batch is cut changes nothing.
    optimizer, rates, clip: of `training.optimizer`; the rates, which the optimizer applies itself, for the metrics.
    seed: the dropout key of a micro-batch is derived from it, the step and the micro-batch's number.
    masks: `Parameters.layer_masks`. shardings: of the state, when it lies on a mesh. compute: of the model, for the
        precision of float32.

    A loss or gradient that is not finite leaves params and opt_state as they were, and so do a batch of which no token
    is trained and `skip`; the step still counts, so that the run gets past the batch if it goes on.

    Metrics, scalars on the device: loss, grad_norm (before clipping), learning_rate, tokens (the denominator, if the
    loss function does not say), skipped (0 for an update that was made, else why not), and the values of the loss
    function's own.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        micro_batches = _micro_batches(batch, accumulation_steps, shardings)
        grads, numerator, denominator, metrics = _summed_gradients(loss_fn, state, micro_batches, seed, masks)
        divisor = jnp.maximum(denominator, 1)
        values = {"tokens": denominator, **{name: metric.value() for name, metric in metrics.items()}}
        values["loss"] = numerator / divisor
        with jax.named_scope("clip"):
            grads = jax.tree.map(lambda grad: grad / divisor, grads)
            grads, norms = clip(grads)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params, step=state.step)
            params = optax.apply_updates(state.params, updates)
            if masks is not None:
                params = jax.tree.map(jnp.where, masks, params, state.params)
            finite = jnp.all(jnp.isfinite(jnp.stack([values["loss"], *norms.values()])))
            held = _held(skip, state, values)
            wanted = jnp.where(values["tokens"] > 0, MADE if held is None else held, NOTHING)
            skipped = jnp.where(finite, wanted, NOT_FINITE)
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(skipped == MADE, new, old),
                (params, opt_state),
                (state.params, state.opt_state),
            )
        metrics = {**values, **norms, **rates(state.step), "skipped": skipped}
        return TrainState(state.step + 1, params, opt_state, state.frozen, held), metrics

    if shardings is None:
        return jax.jit(_traced(train_step, compute), donate_argnums=0, compiler_options=_options(compute, None))
    mesh = shardings.step.mesh
    return jax.jit(
        _traced(train_step, compute, mesh),
        donate_argnums=0,
        compiler_options=_options(compute, mesh),
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, shardings.step),
    )


def _held(skip: Skip | None, state: TrainState, values: dict[str, jax.Array]) -> jax.Array | None:
    """Which limit forbids this update, or did so before in its stride; MADE for none, None without limits."""
    if skip is None:
        return None
    held = jnp.where(state.step % skip.stride == 0, MADE, state.held)
    for number, (name, limit) in enumerate(skip.above.items(), NOTHING + 1):
        held = jnp.where((held == MADE) & (values[name] > limit), number, held)
    return held


def make_eval_step(
    loss_fn: LossFn, mesh: Mesh | None = None, compute: ComputeConfig | None = None
) -> Callable[[Any, Batch], Metrics]:
    """A jitted `(params, batch) -> metrics`: `loss` and the loss function's own, without dropout.

    mesh: of params and batch, if on one. compute: as in `make_train_step`.
    """

    def eval_step(params: Any, batch: Batch) -> Metrics:
        numerator, denominator, metrics = loss_fn(params, batch, None)
        return {**metrics, "loss": Metric(numerator, denominator)}

    return jax.jit(_traced(eval_step, compute, mesh), compiler_options=_options(compute, mesh))


def _options(compute: ComputeConfig | None, mesh: Mesh | None) -> dict[str, bool] | None:
    """`transformer.compiler_options` of where a step is done."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return compiler_options(compute or ComputeConfig(), platform)


def _traced(function: Callable, compute: ComputeConfig | None, mesh: Mesh | None = None) -> Callable:
    """`function`, traced in the precision that `compute` asks for, gradients included, and where it finds `mesh` in
    `sharding.current_mesh`: kernels and experts need it."""

    @functools.wraps(function)
    def run(*args):
        on_mesh = jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if mesh else contextlib.nullcontext()
        with on_mesh, full_precision(compute or ComputeConfig()):
            return function(*args)

    return run


def _micro_batches(batch: Batch, count: int, shardings: TrainState | None) -> Batch:
    """(rows, ...) to (count, rows / count, ...); micro-batch m has the rows m, m + count, m + 2 count and so on.

    Every device holds neighbouring rows of a batch, so this cut leaves all rows where they are. They divide by
    count x devices (see `count_parts`).
    """
    rows = len(next(iter(batch.values())))
    cut = {name: x.reshape(rows // count, count, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}
    if shardings is None:
        return cut
    return jax.lax.with_sharding_constraint(cut, NamedSharding(shardings.step.mesh, PartitionSpec(None, ROW_AXES)))


def _of_trained_layers(mask: bool | np.ndarray, grad: jax.Array) -> jax.Array:
    """0 for the layers that a mask leaves out, put so that the compiler sees that it need not compute what is there."""
    if mask is True:
        return grad
    return jnp.stack([grad[n] if wanted else jnp.zeros_like(grad[n]) for n, wanted in enumerate(mask.reshape(-1))])


def _summed_gradients(loss_fn: LossFn, state: TrainState, micro_batches: Batch, seed: int, masks: Params | None):
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
        new = new if masks is None else jax.tree.map(_of_trained_layers, masks, new)
        return jax.tree.map(jnp.add, grads, new), (numerator, denominator, metrics)

    count = len(next(iter(micro_batches.values())))
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    grads, (numerators, denominators, metrics) = jax.lax.scan(add_gradient, zeros, (jnp.arange(count), micro_batches))
    return grads, numerators.sum(axis=0), denominators.sum(axis=0), together(metrics)

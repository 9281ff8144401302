"""Learning-rate schedules, clipping, and AdamW or Muon as one optax transformation, of all or of groups of parameters.

The optimizers take the step as an argument, `optimizer.update(grads, opt_state, params, step=step)`, and keep no
count of their own for the learning rate: the step of the train state is the only one, so a skipped update cannot make
the schedule lag behind.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from minimind_jax.config.sections import OptimizerConfig
from minimind_jax.errors import UserError
from minimind_jax.model.lora import TRAINED, Path
from minimind_jax.model.transformer import Params


class Group(NamedTuple):
    """Parameters with an optimizer of their own beside that of the others: a value model, a projector."""

    name: str  # of their metrics, `grad_norm/NAME` and `learning_rate/NAME`
    takes: Callable[[Path], bool]  # of a parameter's path
    config: OptimizerConfig  # of their optimizer and schedule, with a learning rate
    max_grad_norm: float  # of their gradient alone, which is not part of the others' norm; 0 for no clipping


def make_schedule(config: OptimizerConfig, total_steps: int, peak: float | None = None) -> optax.Schedule:
    """Learning rate of the optimizer step `step` = 0 .. total_steps - 1; `peak` replaces `config.learning_rate`.

    With k = step + 1 counted from 1 as MiniMind counts, f = final_fraction, W the steps of warm-up and p the progress,
    0 at the start of the decay and 1 at the last step, or behind it where f is 0: a step of rate 0 learns nothing.
    cosine: peak * (f + (1 - f) / 2 * (1 + cos(pi p))); linear, wsd: peak * (f + (1 - f) * (1 - p)); constant: peak.
    The decay starts after the warm-up, for wsd at the last `decay_fraction` of the run. In the warm-up: peak * k / W.

    MiniMind evaluates its cosine at every micro-step; with accumulation over a of them, the rate that acts at optimizer
    step k of K is the one at micro-step a*k of a*K. The cosine depends on the ratio only, so that is k / K here and
    accumulation needs no argument.

    Raises UserError when the warm-up is not shorter than the run.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = min(round(config.warmup_fraction * total_steps), total_steps - 1)
    if warmup >= total_steps:
        raise UserError(
            f"optimizer.warmup_steps {warmup} is not below the {total_steps} steps of this run; "
            "lower it, train for more steps, or set it to null and optimizer.warmup_fraction instead"
        )
    peak = config.learning_rate if peak is None else peak
    decay_steps = total_steps - warmup
    if config.schedule == "wsd":
        decay_steps = min(decay_steps, max(1, round(config.decay_fraction * total_steps)))

    span = decay_steps + (config.final_fraction == 0)

    def schedule(step: int | jax.Array) -> jax.Array:
        k = jnp.asarray(step, jnp.float32) + 1
        progress = jnp.clip((k - (total_steps - decay_steps)) / span, 0, 1)
        if config.schedule == "constant":
            height = 1.0
        elif config.schedule == "cosine":
            height = (1 + jnp.cos(jnp.pi * progress)) / 2
        else:
            height = 1 - progress
        rate = peak * (config.final_fraction + (1 - config.final_fraction) * height)
        return rate * jnp.minimum(k / warmup, 1) if warmup else jnp.asarray(rate)

    return schedule


def make_rates(
    config: OptimizerConfig, total_steps: int, groups: Sequence[Group] = ()
) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """The learning rates at a step, by the names of their metrics."""
    schedules = {"learning_rate": make_schedule(config, total_steps)}
    schedules |= {f"learning_rate/{group.name}": make_schedule(group.config, total_steps) for group in groups}
    return lambda step: {name: schedule(step) for name, schedule in schedules.items()}


def make_clip(
    max_grad_norm: float = 0.0, groups: Sequence[Group] = ()
) -> Callable[[Params], tuple[Params, dict[str, jax.Array]]]:
    """Scales a gradient down to a global norm, as torch's clip_grad_norm_ does (0: not at all), each group's by itself.

    Returns (the gradient, the norms before that by the names of their metrics).
    """
    limits = {"": max_grad_norm, **{group.name: group.max_grad_norm for group in groups}}

    def clip(grads: Params) -> tuple[Params, dict[str, jax.Array]]:
        names = group_names(grads, groups)
        members: dict[str, list[jax.Array]] = {name: [] for name in limits}
        jax.tree.map(lambda name, grad: members[name].append(grad), names, grads)
        norms = {name: optax.tree.norm(grads) for name, grads in members.items()}
        scales = {name: jnp.minimum(limit / (norms[name] + 1e-6), 1) for name, limit in limits.items() if limit}
        grads = jax.tree.map(lambda name, grad: grad * scales[name] if name in scales else grad, names, grads)
        return grads, {f"grad_norm/{name}" if name else "grad_norm": norm for name, norm in norms.items()}

    return clip


def make_optimizer(
    config: OptimizerConfig, total_steps: int, groups: Sequence[Group] = ()
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of all parameters: that of `config`, and of each group its own."""
    if not groups:
        return _adamw_or_muon(config, total_steps)
    configs = {"": config, **{group.name: group.config for group in groups}}
    parts = {name: _adamw_or_muon(own, total_steps) for name, own in configs.items()}
    return optax.partition(parts, lambda params: group_names(params, groups))


def group_names(params: Params, groups: Sequence[Group]) -> Params:
    """The name of each parameter's group, "" for none. Raises ValueError where there are two."""

    def name(path: list[str]) -> str:
        found = [group.name for group in groups if group.takes(tuple(path))]
        if len(found) > 1:
            raise ValueError(f"{'.'.join(path)} is in the groups {', '.join(found)}")
        return found[0] if found else ""

    return _map_names(name, params)


def _adamw_or_muon(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformationExtraArgs:
    """AdamW or Muon with decoupled weight decay: w -= rate(step) * (direction + weight_decay * w).

    AdamW computes what torch.optim.AdamW does. Muon (arXiv 2502.16982) orthogonalises the Nesterov momentum of the
    matrices inside the layers and scales it to the RMS of an Adam update; the others get AdamW.
    """
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    adam_rate = _scale_by_schedule(make_schedule(config, total_steps))
    if config.name == "adamw":
        direction, rate = adam, adam_rate
    else:

        def labels(params):
            return jax.tree.map(lambda is_muon: "muon" if is_muon else "adam", muon_mask(params))

        muon_rate = _scale_by_schedule(make_schedule(config, total_steps, config.muon_learning_rate))
        direction = optax.partition({"muon": scale_by_muon(config.momentum), "adam": adam}, labels)
        rate = optax.partition({"muon": muon_rate, "adam": adam_rate}, labels)
    add_decay = add_cautious_decay if config.cautious_decay else optax.add_decayed_weights
    decay = add_decay(config.weight_decay, functools.partial(decay_mask, decay=config.decay))
    return optax.chain(direction, decay, rate)


def add_cautious_decay(weight_decay: float, mask: Callable[[Params], Params]) -> optax.GradientTransformation:
    """direction + weight_decay * w where the mask of the parameters is True and both have the same sign, so that the
    step w -= rate * direction makes w smaller; the direction alone elsewhere (cautious weight decay, arXiv 2510.12402).
    """
    decayed = optax.stateless_with_tree_map(lambda update, w: update + weight_decay * jnp.where(update * w > 0, w, 0))
    return optax.masked(decayed, mask)


def decay_mask(params: Params, decay: str) -> Params:
    """True where weight decay applies: `all`, or `matrices`: kernels and adapters; no norms, no embedding.

    Decided by name: the stacked scales of a norm, (L, D), have two axes and are no matrix.
    """
    return _map_names(lambda path: decay == "all" or path[-1] in ("kernel", *TRAINED), params)


def muon_mask(params: Params) -> Params:
    """True for the kernels inside the layers, experts' included; not for routers, adapters, embedding and head."""
    return _map_names(lambda path: path[0] == "layers" and path[-1] == "kernel" and "router" not in path, params)


def scale_by_muon(momentum: float) -> optax.GradientTransformation:
    """Orthogonalised momentum of kernels (..., in, out), each matrix for itself, scaled to an RMS of about 0.2.

    Momentum (Nesterov, bias-corrected) and five Newton-Schulz iterations are optax's. `optax.contrib.muon` as a whole
    is not used: it gives its Adam half Nesterov momentum, and no decay mask.
    """
    numbers = functools.partial(jax.tree.map, lambda _: optax.contrib.MuonDimensionNumbers(-2, -1))
    return optax.chain(
        optax.contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=numbers),
        optax.stateless_with_tree_map(lambda update, _: update * (0.2 * math.sqrt(max(update.shape[-2:])))),
    )


def _scale_by_schedule(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """-schedule(step) times the update, of the step that `update` is given."""

    def update(updates, state, params=None, *, step, **_):
        rate = schedule(step)
        return jax.tree.map(lambda u: -rate * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _map_names(function, params: Params) -> Params:
    """`function` of each parameter's path, a list of names, in the tree of the parameters."""
    return jax.tree_util.tree_map_with_path(lambda path, _: function([entry.key for entry in path]), params)

"""Rows of episodes as losses of policies read them, and real steps on them; what tests of policies share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from steps import keep_gradient, no_rates

from minimind_jax.losses.policy import make_policy_loss
from minimind_jax.model.config import ComputeConfig, ModelConfig
from minimind_jax.model.heads import head_axes, init_head
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.sharding import param_shardings, shard_batch
from minimind_jax.training.optimizer import make_clip
from minimind_jax.training.state import create_state, state_shardings
from minimind_jax.training.step import make_train_step

WORDS = 64
OPTIONS = {  # of real steps
    "level": "sequence", "epsilon_high": 0.3, "kl_estimator": "k3", "entropy": 0.02, "temperature": 0.8,
    "correction": "sequence",
}  # fmt: skip
# The platform is said: to ask for it would start JAX before the processes of a test have joined.
MODEL = LanguageModel(
    ModelConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=128,
    ),
    ComputeConfig(dtype="float32", scan_unroll=1),
    platform="cpu",
)  # fmt: skip


def batch_of(tokens, mask, lengths, **more):
    """Rows of one episode each; columns of `mask` and all others are those of the targets."""
    tokens = np.asarray(tokens, np.int32)
    return {
        "tokens": tokens,
        "targets": np.pad(tokens[:, 1:], ((0, 0), (0, 1))),
        "segment_ids": (np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None]).astype(np.int32),
        "lengths": np.asarray(lengths, np.int32),
        "mask": np.asarray(mask, np.float32),
        **{name: np.asarray(x, np.float32) for name, x in more.items()},
    }


def episodes(seed=0, rows=8, columns=12):
    """A batch in which all optional parts are present, with rows of no and of one trained token."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(6, columns + 1, rows)
    mask = (rng.random((rows, columns)) < 0.6) & (np.arange(columns) < lengths[:, None] - 1)
    mask[1], mask[2] = False, np.arange(columns) == 3
    names = ("old_log_probs", "sampler_log_probs", "reference_log_probs")
    logs = {name: -rng.gamma(2.0, 1.0, mask.shape) * mask for name in names}
    drawn = {name: rng.standard_normal(mask.shape) * mask for name in ("advantages", "returns", "old_values")}
    weights = {name: rng.random(mask.shape) * mask for name in ("weights", "kl_weights", "value_weights")}
    return batch_of(rng.integers(0, WORDS, mask.shape), mask, lengths, **logs | drawn | weights)


def with_more_columns(batch, more):
    """The same rows, longer; what is in the padding does not matter."""
    batch = {name: np.pad(x, ((0, 0), (0, more))) if x.ndim == 2 else x for name, x in batch.items()}
    return {**batch, "tokens": np.where(batch["segment_ids"] > 0, batch["tokens"], 9)}


def init_policy_and_critic():
    policy, critic = (jax.jit(MODEL.init)(jax.random.key(seed)) for seed in (0, 1))
    return {**policy, "critic": {**critic, **init_head(jax.random.key(2), 32, 1)}}


@functools.cache
def make_step(mesh=None, parts=1, **options):
    """The real step of a policy and its critic, and the state before the first."""
    params, shardings, optimizer = init_policy_and_critic(), None, keep_gradient()
    if mesh is not None:
        axes = {**MODEL.logical_axes(), "critic": {**MODEL.logical_axes(), **head_axes()}}
        abstract = jax.eval_shape(lambda: params)
        lies = param_shardings(mesh, axes, abstract)
        params, shardings = jax.device_put(params, lies), state_shardings(optimizer, lies, abstract)
    step = make_train_step(
        make_policy_loss(MODEL, critic=MODEL, **options), optimizer, no_rates, make_clip(0.0),
        accumulation_steps=parts, shardings=shardings,
    )  # fmt: skip
    return step, create_state(params, optimizer, shardings)


def step_on(batch, mesh=None, **settings):
    """The metrics of a real step, and its gradient."""
    step, state = make_step(mesh, **settings)
    batch = batch if mesh is None else shard_batch(batch, mesh)
    state, metrics = step(jax.tree.map(jnp.copy, state), batch)
    return {name: float(value) for name, value in metrics.items()}, state.opt_state

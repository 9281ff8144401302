"""What the trainer itself makes of a rollout before it is trained on: log-probabilities of the policy and of the
reference, and the values of the critic, each by the very function that the loss uses."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from minimind_jax.config.rl import RLConfig
from minimind_jax.data.rows import Batch
from minimind_jax.losses.value import values
from minimind_jax.losses.vocabulary import target_scores
from minimind_jax.model.transformer import LanguageModel, Params, compiler_options, full_precision
from minimind_jax.sharding import data_process, shard_batch
from minimind_jax.training.step import count_parts

READ = ("tokens", "targets", "segment_ids", "lengths")


class Scorer:
    """Adds to a rollout's arrays what the settings need: `old_log_probs`, `reference_log_probs`, `old_values`.

    reference: of all parameters, the model and parameters that were the policy at the start; None for none. critic: the
    value model, whose parameters are params["critic"].
    """

    def __init__(
        self,
        config: RLConfig,
        mesh: Mesh,
        model: LanguageModel,
        reference: Callable[[Params], tuple[LanguageModel, Params]] | None,
        critic: LanguageModel | None,
    ):
        policy = config.policy
        self._mesh, self._process = mesh, data_process(mesh)
        self._parts = policy.minibatches * count_parts(config, mesh)  # no more rows at once than in training
        needs_old = config.stride > 1 or policy.kl_target or (policy.beta and policy.kl_placement == "reward")

        def log_probs(model: LanguageModel, params: Params, batch: Batch) -> jax.Array:
            return target_scores(model, params, batch, temperature=config.rollout.temperature)[0].log_probs_BT

        def score(params: Params, batch: Batch) -> Batch:
            found = {"place": batch["place"]}
            with full_precision(model.compute):
                if needs_old:
                    found["old_log_probs"] = log_probs(model, params, batch)
                if reference is not None:
                    found["reference_log_probs"] = log_probs(*reference(params), batch)
                if critic is not None:
                    found["old_values"] = values(critic, params["critic"], batch)[0]
            return found

        options = compiler_options(model.compute, model.platform)
        self._score = jax.jit(score, compiler_options=options) if needs_old or reference or critic else None

    def __call__(self, params: Params, arrays: Batch) -> Batch:
        """arrays: of all rows of a rollout, on all processes; each device scores its own."""
        if self._score is None:
            return arrays
        count, (index, processes) = len(arrays["tokens"]), self._process
        read = {name: arrays[name] for name in READ} | {"place": np.arange(count, dtype=np.int32)}
        found = []
        for own in np.split(np.arange(count), self._parts):
            share = np.split(own, processes)[index]
            with jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh):
                found.append(self._score(params, shard_batch({name: x[share] for name, x in read.items()}, self._mesh)))
        # Only now: what the host waits for, the device waits for.
        gather = functools.partial(multihost_utils.process_allgather, tiled=True)
        found = jax.tree.map(gather, found) if jax.process_count() > 1 else jax.device_get(found)
        joined = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
        order = np.argsort(joined.pop("place"))
        return arrays | {name: np.asarray(x, np.float32)[order] for name, x in joined.items()}

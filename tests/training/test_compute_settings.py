"""Settings of `compute` on a CPU: whatever is put together runs, or is refused before the first step."""

import itertools
import random
import typing

import jax
import numpy as np
import pytest

from minimind_jax.config.sections import DataConfig, ModelSettings, TrainingConfig
from minimind_jax.config.stages import PretrainConfig
from minimind_jax.errors import UserError
from minimind_jax.model import attention, moe
from minimind_jax.model.config import ComputeConfig
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.plan.compile import trace_step
from minimind_jax.seeds import named_key
from minimind_jax.sharding import init_params, make_mesh
from minimind_jax.training.defaults import filled
from minimind_jax.training.optimizer import make_optimizer
from minimind_jax.training.state import create_state

VALUES = {
    "attention": typing.get_args(attention.Path),
    "experts": typing.get_args(moe.Path),
    "remat": ("none", "full", "dots"),
    "deterministic": (False, True),
    "dtype": ("auto", "float32", "bfloat16"),
    "scan_unroll": (None, 0, 1, 2, 7),
}


def covering(values, seed=0):
    """Combinations in which every two values of two settings meet."""
    left = {
        (a, x, b, y) for a, b in itertools.combinations(values, 2) for x in values[a] for y in values[b]
    }  # fmt: skip
    rng = random.Random(seed)
    while left:
        made = [{name: rng.choice(options) for name, options in values.items()} for _ in range(40)]
        best = max(made, key=lambda one: sum(one[a] == x and one[b] == y for a, x, b, y in left))
        left = {pair for pair in left if not (best[pair[0]] == pair[1] and best[pair[2]] == pair[3])}
        yield best


def step(compute, experts):
    shape = {"num_experts": experts, "num_experts_per_tok": 2} if experts else {}
    size = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = filled(
        PretrainConfig(
            model=ModelSettings(**size, num_attention_heads=2, num_key_value_heads=1, **shape),
            compute=compute, data=DataConfig(seq_len=32), training=TrainingConfig(batch_tokens=128),
        )
    )  # fmt: skip
    model, mesh = LanguageModel(config.model.resolve(), compute), make_mesh(config.mesh, jax.devices()[:1])
    traced, abstract = trace_step(config, model, mesh)
    params = init_params(model, named_key(0, "init"), mesh)
    state = create_state(
        params, make_optimizer(config.optimizer, 1000, ()), jax.tree.map(lambda x: x.sharding, abstract)
    )
    tokens = np.random.default_rng(0).integers(3, 64, (4, 32), dtype=np.int32)
    positions = np.tile(np.arange(32, dtype=np.int32), (4, 1))
    segments = 1 + positions // 20
    segments[0, 25:] = 0
    weights = (segments > 0).astype(np.float32)
    names = ("tokens", "targets", "positions", "segment_ids", "target_bytes", "loss_weights")
    batch = dict(zip(names, (tokens, tokens, positions % 20, segments, np.ones_like(tokens), weights), strict=True))
    return jax.device_get(traced.lower().compile()(state, batch)[1])


@pytest.mark.slow
@pytest.mark.parametrize("experts", [0, 4])
def test_any_two_settings_run_together_or_are_refused_by_name(experts):
    expected, ran = step(ComputeConfig(attention="reference", experts="reference", dtype="float32"), experts), 0
    for settings in covering(VALUES):
        compute = ComputeConfig(**settings)
        if attention.FUSED.get(compute.attention):
            with pytest.raises(
                UserError, match=rf"compute.attention {compute.attention} cannot run here: this is a cpu"
            ):
                step(compute, experts)
            continue
        found, ran = step(compute, experts), ran + 1
        for name in ("loss", "grad_norm"):
            near = 0.03 if compute.dtype == "bfloat16" else 1e-4
            assert found[name] == pytest.approx(expected[name], rel=near), (name, settings)
        assert found["skipped"] == 0
    assert ran > 8

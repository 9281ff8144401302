"""What a run says it will do."""

import dataclasses

import pytest

from minimind_jax.data.batches import open_data
from minimind_jax.model.config import ComputeConfig
from minimind_jax.sharding import make_mesh
from minimind_jax.stages.common import load_model, load_tokenizer
from minimind_jax.training.plan import run_facts


@pytest.mark.parametrize(
    ("experts", "path", "shown"),
    [(4, "auto", "blocked"), (4, "ragged", "ragged"), (0, "auto", None)],
)
def test_the_paths_that_compute_are_told(world, tmp_path, experts, path, shown):
    config = world.pretrain(tmp_path / "run", compute=ComputeConfig(dtype="float32", experts=path))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_experts=experts))
    tokenizer = load_tokenizer(config)
    model, mesh = load_model(config, tokenizer), make_mesh(config.mesh)
    facts = run_facts(config, "pretrain", model, mesh, 1, *open_data("text", config, tokenizer), total_steps=24)
    told = f", experts path: {shown}" if shown else ""
    assert facts["compute"] == f"float32, attention path: grouped{told}, remat none"

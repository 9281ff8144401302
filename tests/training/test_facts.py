"""What a run says it will do."""

import dataclasses

import pytest
from run_helpers import assembled

from minimind_jax.config.sections import OptimizerConfig
from minimind_jax.losses.language_model import make_language_model_loss
from minimind_jax.model.config import ComputeConfig
from minimind_jax.runs.parts import open_rows
from minimind_jax.training.facts import run_facts, schedule_change
from minimind_jax.training.packed import PackedRows
from minimind_jax.training.source import Recipe
from minimind_jax.training.state import Parameters


@pytest.mark.parametrize(
    ("experts", "path", "shown"),
    [(4, "auto", "blocked"), (4, "ragged", "ragged"), (0, "auto", None)],
)
def test_the_paths_that_compute_are_told(world, tmp_path, experts, path, shown):
    config = world.pretrain(tmp_path / "run", compute=ComputeConfig(dtype="float32", experts=path))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_experts=experts))
    run = assembled("pretrain", config)
    source = PackedRows(open_rows(run)[0])
    recipe = Recipe(source, make_language_model_loss(run.model), Parameters.of(run.model, dict))
    facts = run_facts(config, recipe, "pretrain", run.model, run.mesh, 1, 24)
    told = f", experts path: {shown}" if shown else ""
    assert facts["compute"] == f"float32, attention path: grouped{told}, remat none"


def test_a_rate_that_jumps_when_a_run_is_made_longer_is_told():
    cosine = OptimizerConfig(learning_rate=3e-3)
    assert "from 3.00e-04 to 8.56e-04 at step 21" in schedule_change(cosine, 20, 20, 30)
    assert schedule_change(cosine, 20, 30, 30) is None
    constant = OptimizerConfig(learning_rate=3e-3, schedule="constant")
    assert schedule_change(constant, 20, 20, 30) is None

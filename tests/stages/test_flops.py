"""FLOPs that a run's MFU counts, stage by stage, beside the matrix products that its traced step really has."""

import dataclasses
import sys

import jax
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr
from run_helpers import with_chats
from test_vision_stages import make as make_seeing  # noqa: F401  a fixture
from test_vision_stages import seen  # noqa: F401
from worlds import ADAPTERS, write_lines

from minimind_jax.config.classify import ClassifyConfig
from minimind_jax.config.rl import GRPOConfig, PPOConfig, RewardsConfig, RolloutConfig
from minimind_jax.config.stages import (
    DistillConfig,
    DPOConfig,
    PreferenceConfig,
    RewardConfig,
    SFTConfig,
    TeacherConfig,
)
from minimind_jax.model.config import ComputeConfig
from minimind_jax.runs.begin import begin
from minimind_jax.stages import STAGES
from minimind_jax.training import speed
from minimind_jax.training.defaults import filled
from minimind_jax.training.step import make_program
from tests.conftest import ROOT

sys.path.append(str(ROOT / "tests" / "plan"))
from products import product_flops

PLAIN = ComputeConfig(attention="reference", experts="ragged", scan_unroll=1)


@pytest.fixture
def share_counted(monkeypatch):
    """Of the products of a stage's step, the share that its MFU counts. again: those of a token that are made twice."""
    monkeypatch.setattr(speed, "peak_flops", lambda compute: 1e12)

    def share_counted(stage, config, again=0):
        run = begin(STAGES[stage], config)
        recipe, config = STAGES[stage].load()(run), filled(run.config)
        recipe.source.begin(0, 2, lambda: False)
        batch, _ = recipe.source.next(0, {})
        recipe.source.close()
        program = make_program(config, recipe.parameters, recipe.loss_fn, run.mesh, 100)
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
        jaxpr = program.step.trace(program.abstract, shapes).jaxpr.jaxpr
        done = product_flops(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])
        full = {**batch, "segment_ids": np.ones_like(batch["segment_ids"])}  # padding is multiplied, too
        if (vision := run.model.config.vision) is not None:  # and so is the room for pictures
            full["tokens"] = np.full_like(batch["tokens"], vision.marker_id)
        counted = speed.Speed(run.model, config, 0.0, not run.kind.has_head, recipe.flops_beside).size_of(full)[1]
        # What attention by the plain formula does above the diagonal, and a CPU to have cosines and sines once.
        shape, passes = run.model.config, 3 + (recipe.flops_beside > 0)
        above = 2 * passes * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim * config.data.seq_len
        tables = (1 + (recipe.flops_beside > 0)) * shape.head_dim**2
        return counted / (done - (above + tables + again) * batch["tokens"].size)

    return share_counted


def test_texts_and_experts(share_counted, world, tmp_path):
    config = world.pretrain(tmp_path / "dense", compute=PLAIN)
    assert share_counted("pretrain", config) == pytest.approx(1, abs=1e-9)
    shape = dataclasses.replace(config.model, num_experts=4, num_experts_per_tok=2)
    mixture = dataclasses.replace(config, run=str(tmp_path / "moe"), model=shape)
    assert share_counted("pretrain", mixture) == pytest.approx(1, abs=0.005)  # but for the balance of experts


def test_models_that_are_only_asked(share_counted, make, world, base, tmp_path):
    dpo = make(DPOConfig, tmp_path / "dpo", "pairs", compute=PLAIN)
    assert share_counted("dpo", dpo) == pytest.approx(1, abs=1e-9)
    alone = dataclasses.replace(dpo, run=str(tmp_path / "simpo"), preference=PreferenceConfig(loss="simpo", beta=2.5))
    assert share_counted("dpo", alone) == pytest.approx(1, abs=1e-9)
    teacher = TeacherConfig(model=base)
    distill = with_chats(make(DistillConfig, tmp_path / "distill", "sft", compute=PLAIN, teacher=teacher), world)
    logits = 2 * (2 * 32 * 304)  # the student's and the teacher's, for the gradient
    assert share_counted("distill", distill, again=logits) == pytest.approx(1, abs=1e-9)


def test_models_with_a_head(share_counted, make, tmp_path):
    """But for the products of the head itself, of one score or of three."""
    for stage, kind, data in (("reward", RewardConfig, "pairs"), ("classify", ClassifyConfig, "labels")):
        config = make(kind, tmp_path / stage, data, compute=PLAIN)
        assert share_counted(stage, config) == pytest.approx(1, abs=0.005)


def test_what_waits_for_rollouts_has_no_mfu(make, world, tmp_path, monkeypatch):
    """Most of its time is no training, and its rows are shorter than data.seq_len and mostly prompts without logits."""
    monkeypatch.setattr(speed, "peak_flops", lambda compute: 1e12)
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": f"the {n} cat"} for n in range(24)])
    for stage, kind in (("grpo", GRPOConfig), ("ppo", PPOConfig)):
        rewards, rollout = RewardsConfig(use=("length(1, 6)",)), RolloutConfig(prompts=2, max_new_tokens=8)
        changes = {"rewards": rewards, "rollout": rollout, "training": {"batch_tokens": None}}
        run = begin(STAGES[stage], make(kind, tmp_path / stage, prompts, policy=kind().policy, **changes))
        recipe = STAGES[stage].load()(run)
        recipe.source.close()
        told = speed.Speed(run.model, filled(run.config), 0.0, True, recipe.flops_beside)
        full = {name: np.ones((2, 8), np.int32) for name in ("segment_ids", "tokens")}
        for _ in range(2):
            told.add(told.size_of(full))
        assert told.read().keys() == {"seconds", "tokens_per_second"}


def test_adapters_count_as_frozen_layers(share_counted, make, world, tmp_path):
    """Their own products are left out: with rank 4 of width 32 they are a seventh, of real models a hundredth."""
    config = with_chats(make(SFTConfig, tmp_path / "lora", "sft", compute=PLAIN, lora=ADAPTERS), world)
    assert 0.83 < share_counted("sft", config) < 1


@pytest.mark.slow
@pytest.mark.parametrize(("train", "least"), [("projector", 1), ("ends", 0.94), ("all", 1), ("tower", 0.92)])
def test_pictures_and_the_tower(share_counted, make_seeing, train, least):  # noqa: F811
    """A tower that is trained looks twice, of which MFU counts one; behind another a projector needs no
    gradient of what it reads. Layers between the ends have gradients, too, as one loop makes all."""
    assert least < share_counted("vlm-sft", make_seeing(train=train, compute=PLAIN)) < 1.01

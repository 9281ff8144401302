"""Adapters, preferences, scores and teachers on a mesh of eight emulated devices: what one device gives.

Devices must be asked for before JAX starts, so this file runs itself in a process of its own.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from minimind_jax.config.sections import DataConfig, MeshConfig, OptimizerConfig, TrainingConfig
from minimind_jax.config.stages import PretrainConfig
from minimind_jax.convert.peft import rank_table
from minimind_jax.losses import pieces
from minimind_jax.losses.classification import make_classification_loss
from minimind_jax.losses.distillation import make_distillation_loss
from minimind_jax.losses.language_model import make_language_model_loss
from minimind_jax.losses.preference import make_preference_loss
from minimind_jax.losses.reward import make_reward_loss
from minimind_jax.model.config import ComputeConfig, ModelConfig
from minimind_jax.model.heads import SCORE, head_axes, init_head
from minimind_jax.model.lora import init_adapters, join, make_adapter
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.runs.frozen import Reference
from minimind_jax.sharding import make_mesh, param_shardings, shard_batch
from minimind_jax.stages.distill import TEACHER
from minimind_jax.training.state import Parameters, create_state, fingerprint
from minimind_jax.training.step import make_program

pytestmark = pytest.mark.slow  # a minute; `test_sharding.py` does it for plain training

SIZES = ModelConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, initializer_range=0.1,
)  # fmt: skip
TABLE = rank_table(SIZES, 4, ("all-linear",), {})
PLAIN = LanguageModel(SIZES, ComputeConfig(scan_unroll=1))
ADAPTED = LanguageModel(SIZES, ComputeConfig(scan_unroll=1), make_adapter(TABLE, dropout=0.1))
MESH = MeshConfig(data=2, fsdp=2, tensor=2)
STEPS, ROWS, LENGTH = 3, 16, 16


def parameters_of(model, place):
    """Drawn parameters; of a model with adapters with both matrices drawn."""
    params = PLAIN.init(jax.random.key(0))
    if model.adapter:
        adapters = init_adapters(jax.random.key(1), params, TABLE, 8.0, False)
        params = join(params, jax.tree_util.tree_map_with_path(draw, adapters))
    return Parameters.of(model, lambda: place(params, model.logical_axes()))


def draw(path, leaf):
    noise = np.random.default_rng(len(str(path))).standard_normal(leaf.shape).astype(np.float32)
    return leaf + 0.05 * noise if path[-1].key == "lora_b" else leaf


def added(parameters, name, tree, axes, is_trained, place):
    return parameters.adding(
        name, jax.eval_shape(lambda: tree), axes, lambda _: place(tree, axes), is_trained=is_trained
    )


STAGES = ("sft", "dpo", "reward", "classify", "distill", "stored")
MODELS = {"all": PLAIN, "lora": ADAPTED}


def case(stage, kind, place):
    """(parameters, loss)."""
    model = MODELS[kind]
    own = parameters_of(model, place)
    if stage == "sft":
        return own, make_language_model_loss(model)
    if stage == "dpo":
        reference = Reference(model, has_own=True)
        return reference.add_to(own), make_preference_loss(model, "sigmoid", beta=0.5, reference=reference)
    if stage == "distill":
        taught = added(own, TEACHER, PLAIN.init(jax.random.key(3)), PLAIN.logical_axes(), False, place)
        return taught, make_distillation_loss(model, lambda params: (PLAIN, params[TEACHER]))
    if stage == "stored":
        return own, make_distillation_loss(model, None)
    head = init_head(jax.random.key(2), 32, 3, std=0.2)[SCORE]
    headed = added(own, SCORE, head, head_axes()[SCORE], True, place)
    if stage == "reward":
        return headed, make_reward_loss(model, 0.01)
    return headed, make_classification_loss(model, np.ones(3, np.float32))


def batches():
    rng = np.random.default_rng(0)
    segments = np.tile(np.repeat([1, 2, 3, 4, 0], [3, 4, 2, 5, 2]), (ROWS, 1)).astype(np.int32)
    positions = np.tile(np.r_[0:3, 0:4, 0:2, 0:5, 0, 0], (ROWS, 1)).astype(np.int32)
    for _ in range(STEPS):
        tokens, targets = rng.integers(0, 64, (2, ROWS, LENGTH)).astype(np.int32)
        weights = ((rng.random((ROWS, LENGTH)) < 0.7) & (segments > 0)).astype(np.float32)
        yield {
            "tokens": tokens, "targets": targets, "loss_weights": weights, "positions": positions,
            "segment_ids": segments, "margins": np.zeros((ROWS, LENGTH // 2), np.float32),
            "values": rng.integers(0, 3, (ROWS, LENGTH // 2, 1)).astype(np.float32),
            "teacher_ids": rng.permuted(np.tile(np.arange(64, dtype=np.int32), (ROWS, LENGTH, 1)), axis=-1)[..., :4],
            "teacher_log_probs": np.log(rng.dirichlet(np.ones(5), (ROWS, LENGTH))[..., :4]).astype(np.float32),
        }  # fmt: skip


def train_on(devices, mesh_config, stage, kind):
    """Losses of the steps, what was trained, and hashes of the frozen before and after."""
    mesh = make_mesh(mesh_config, devices)

    def place(tree, axes):
        shapes = jax.eval_shape(lambda: tree)
        return jax.device_put(tree, param_shardings(mesh, axes, shapes))

    parameters, loss_fn = case(stage, kind, place)
    config = PretrainConfig(
        data=DataConfig(seq_len=LENGTH), training=TrainingConfig(batch_tokens=ROWS * LENGTH),
        optimizer=OptimizerConfig(learning_rate=1e-2, eps=1e-4),
    )  # fmt: skip
    program = make_program(config, parameters, loss_fn, mesh, 100)
    trained, frozen = parameters.split(parameters.load())
    state = create_state(trained, program.optimizer, program.shardings)._replace(frozen=frozen)
    before = fingerprint(state.frozen)
    losses = []
    for batch in batches():
        state, metrics = program.step(state, shard_batch(batch, mesh))
        losses.append(float(metrics["loss"]))
    return losses, state.params, (before, fingerprint(state.frozen))


def main():
    report = {}
    for stage, kind in itertools.product(STAGES, MODELS):
        one = train_on(jax.devices()[:1], MeshConfig(), stage, kind)
        pieces.PIECE_BYTES = 4 * 4 * 64 * 3  # of the logits of four rows three columns
        many = train_on(jax.devices(), MESH, stage, kind)
        pieces.PIECE_BYTES = 2**28
        apart = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), many[1], one[1])
        report[f"{stage} {kind}"] = [many[0], one[0], max(jax.tree.leaves(apart)), many[2], one[2]]
    print(json.dumps(report))


@pytest.fixture(scope="module")
def report():
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("stage", STAGES)
def test_eight_devices_give_what_one_gives(stage, kind, report):
    many, one, apart, frozen_many, frozen_one = report[f"{stage} {kind}"]
    np.testing.assert_allclose(many, one, rtol=1e-5)
    assert apart < 1e-5
    assert frozen_many[0] == frozen_many[1] == frozen_one[0]  # the hash does not depend on the mesh


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
    main()

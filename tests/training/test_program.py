"""How a step's rows are shared by the devices of a mesh."""

import pytest
from jax.sharding import AbstractMesh

from minimind_jax.config.sections import DataConfig, TrainingConfig
from minimind_jax.config.stages import PretrainConfig
from minimind_jax.errors import UserError
from minimind_jax.plan.inputs import load_planned
from minimind_jax.sharding import MESH_AXES
from minimind_jax.training.step import count_parts


def mesh(data=1, fsdp=1, tensor=1, expert=1):
    return AbstractMesh((data, fsdp, tensor, expert), MESH_AXES)


def config(rows, accumulation_steps):
    training = TrainingConfig(batch_tokens=rows * 32, accumulation_steps=accumulation_steps)
    return PretrainConfig(data=DataConfig(seq_len=32), training=training)


@pytest.mark.parametrize(
    ("rows", "asked", "sizes", "parts"),
    [
        (160, 4, {}, 4),
        (160, 4, {"data": 8}, 4),
        (160, 4, {"data": 4, "fsdp": 4}, 2),  # 10 rows a device
        (24, 4, {"data": 8, "tensor": 2}, 3),
        (8, 8, {"fsdp": 8}, 1),
    ],
)
def test_parts_are_as_many_as_asked_or_as_divide_a_devices_rows(rows, asked, sizes, parts):
    assert count_parts(config(rows, asked), mesh(**sizes)) == parts


def test_rows_that_do_not_divide_over_the_devices():
    message = (
        r"^160 rows a step do not divide over 64 devices \(mesh.data 16 x mesh.fsdp 4\); "
        r"set training.batch_tokens to a multiple of 2048, such as 4096$"
    )
    with pytest.raises(UserError, match=message):
        count_parts(config(160, 4), mesh(data=16, fsdp=4))


def planned(name, stage=None):
    return load_planned(["--config", name], stage).config


@pytest.mark.parametrize("devices", [1, 2, 4, 8, 16])
def test_the_configs_of_large_runs_are_for_one_device_and_for_many(devices):
    pipelines = [planned(name, stage) for name in ("zero", "small", "moe") for stage in ("pretrain", "sft")]
    for made in (planned("pretrain"), planned("sft"), *pipelines):
        assert count_parts(made, mesh(data=devices)) <= made.training.accumulation_steps

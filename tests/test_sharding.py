"""The mesh and what lies where: eight emulated devices give what one gives.

The devices must be asked for before JAX starts, so this file runs itself in a process of its own (see `main`) and
compares what that wrote down.
"""

import dataclasses
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import policy_rows
import pytest

from minimind_jax.config.sections import MeshConfig, OptimizerConfig
from minimind_jax.errors import UserError
from minimind_jax.losses import vocabulary
from minimind_jax.losses.language_model import make_language_model_loss
from minimind_jax.model import moe
from minimind_jax.model.config import ComputeConfig, ModelConfig
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.sharding import (
    MESH_AXES,
    arrange_devices,
    data_process,
    init_params,
    initialize_distributed,
    make_mesh,
    param_shardings,
    shard_batch,
)
from minimind_jax.training.optimizer import make_clip, make_optimizer, make_rates
from minimind_jax.training.state import create_state, state_shardings
from minimind_jax.training.step import make_train_step

TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48}  # fmt: skip
# The platform is said: to ask for it would start JAX before the processes of a test have joined.
DENSE = LanguageModel(ModelConfig(**TINY), ComputeConfig(scan_unroll=1), platform="cpu")
MOE = {
    f"moe k {k}": LanguageModel(
        ModelConfig(**TINY, num_experts=4, num_experts_per_tok=k, moe_intermediate_size=24),
        ComputeConfig(experts=path, scan_unroll=1),
        platform="cpu",
    )
    for k, path in ((1, "blocked"), (2, "tiled"))
}
# Model, optimizer and micro-batches: one where there are experts, whose router loss is a statistic of it.
MODELS = {"dense": (DENSE, "muon", 2), **{name: (model, "adamw", 1) for name, model in MOE.items()}}
MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "data 2 fsdp 2 tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp 4 expert 2": MeshConfig(data=1, fsdp=4, expert=2),
    "data 2 expert 4": MeshConfig(data=2, expert=4),
    "fsdp 2 tensor 2 expert 2": MeshConfig(data=1, fsdp=2, tensor=2, expert=2),
}
# The other pairs are slow.
FAST = [
    ("dense", "data 2 fsdp 2 tensor 2"),
    ("moe k 1", "data 2 expert 4"),
    ("moe k 2", "fsdp 2 tensor 2 expert 2"),
]
PIECES_ON = ("data 2 fsdp 2 tensor 2", "fsdp 4 expert 2")
SLOW = [pair for pair in itertools.product(MODELS, MESHES) if pair not in FAST]
STEPS = 5


def make_batches(steps=STEPS, rows=16, length=12):
    rng = np.random.default_rng(0)
    segments = np.tile(np.repeat([1, 2, 0], [5, 4, 3]), (rows, 1)).astype(np.int32)
    positions = np.tile(np.r_[0:5, 0:4, 0, 0, 0].astype(np.int32), (rows, 1))
    for _ in range(steps):
        yield {
            "tokens": rng.integers(0, 64, (rows, length)).astype(np.int32),
            "targets": rng.integers(0, 64, (rows, length)).astype(np.int32),
            "loss_weights": ((rng.random((rows, length)) < 0.6) & (segments > 0)).astype(np.float32),
            "positions": positions,
            "segment_ids": segments,
        }


def train_on(devices, model, mesh_config, optimizer_name, accumulation_steps):
    """Steps from the same seed; the metrics of each, the parameters, and the shardings before and after."""
    mesh = make_mesh(mesh_config, devices)
    # eps is raised so that Adam's division does not blow up the rounding of gradients near zero.
    config = OptimizerConfig(name=optimizer_name, learning_rate=1e-2, eps=1e-4)
    abstract = model.abstract_params()
    optimizer, rates = make_optimizer(config, STEPS), make_rates(config, STEPS)
    shardings = state_shardings(optimizer, param_shardings(mesh, model.logical_axes(), abstract), abstract)
    step = make_train_step(
        make_language_model_loss(model), optimizer, rates, make_clip(1.0),
        accumulation_steps=accumulation_steps, shardings=shardings,
    )  # fmt: skip
    state = create_state(init_params(model, jax.random.key(0), mesh), optimizer, shardings)
    history, (index, count) = [], data_process(mesh)
    for batch in make_batches():
        local = {name: np.split(rows, count)[index] for name, rows in batch.items()}
        state, metrics = step(state, shard_batch(local, mesh))
        history.append(metrics)
    lies_right = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, shardings)
    return history, state, all(jax.tree.leaves(lies_right)), step._cache_size()


def main(pairs):
    """In the process with eight devices: every case against one device; prints the differences as JSON."""
    report, references = {}, {}
    for name, mesh_name in pairs:
        model, optimizer_name, accumulation_steps = MODELS[name]
        if name not in references:
            references[name] = train_on(jax.devices()[:1], model, MeshConfig(), optimizer_name, 1)
        one, state_one, _, _ = references[name]
        many, state, lies_right, compiled = train_on(
            jax.devices(), model, MESHES[mesh_name], optimizer_name, accumulation_steps
        )
        kernel = state.params["layers"]["attention"]["q_proj"]["kernel"]
        report[f"{name}, {mesh_name}"] = {
            "metrics": [[{k: float(v) for k, v in step.items()} for step in run] for run in (many, one)],
            "params": largest_difference(state.params, state_one.params),
            # Sums of gradients and of their squares.
            "optimizer": largest_difference(state.opt_state, state_one.opt_state),
            "lies_right": lies_right,
            "compiled": compiled,
            "kernel_shard": kernel.addressable_shards[0].data.shape,
            "devices": len(kernel.sharding.device_set),
            "process": data_process(make_mesh(MESHES[mesh_name])),
        }
    if pairs == FAST:
        report["collectives"] = collectives_of_experts()
        report["pieces"] = {name: difference_of_pieces(MESHES[name]) for name in PIECES_ON}
    else:
        report["policy"] = difference_of_policies(MESHES["data 2 fsdp 2 tensor 2"])
    print(json.dumps(report))


def largest_difference(tree, expected):
    """The largest difference in an array, as a part of its largest value."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(np.asarray(a) - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in pairs)


def collectives_of_experts():
    """Shapes of what is gathered or added up over the devices for a layer of experts, rows cut over all eight."""
    mesh = make_mesh(MESHES["data 8"])

    def loss(x_MD, kernels, logits_ME):
        out_MD, router_loss = moe.mixture(MOE["moe k 2"].config, x_MD, logits_ME, None, kernels, "ragged", "cpu")
        return jnp.sum(out_MD**2) + router_loss

    def shape(*sizes, rows=None):
        spec = jax.P(rows)
        return jax.ShapeDtypeStruct(sizes, "float32", sharding=jax.NamedSharding(mesh, spec))

    kernels = (shape(4, 32, 24), shape(4, 32, 24), shape(4, 24, 32))
    rows = ("data", "fsdp")
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        text = gradient.lower(shape(1024, 32, rows=rows), kernels, shape(1024, 4, rows=rows)).compile().as_text()
    return re.findall(r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(", text)


def difference_of_pieces(mesh_config):
    """Of `token_scores` over pieces of a large vocabulary on a mesh, and its gradients, to the whole on one device."""

    def run():
        keys = jax.random.split(jax.random.key(0), 4)
        weights_BT = jax.random.normal(keys[3], (8, 6))
        targets_BT = jax.random.randint(keys[2], (8, 6), 0, 600)

        def total(hidden_BTD, kernel_VD):
            scores = vocabulary.token_scores(hidden_BTD, kernel_VD, targets_BT, "cpu", 0.8, True)
            return jnp.sum(weights_BT * (scores.log_probs_BT + scores.log_sums_BT**2 + scores.entropies_BT)), scores

        inputs = jax.random.normal(keys[0], (8, 6, 32)), jax.random.normal(keys[1], (600, 32))
        return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(*inputs)

    whole = run()
    limits = vocabulary.WHOLE_BYTES, vocabulary.PIECE_BYTES
    vocabulary.WHOLE_BYTES = vocabulary.PIECE_BYTES = 0
    with jax.set_mesh(make_mesh(mesh_config)):
        pieces = run()
    vocabulary.WHOLE_BYTES, vocabulary.PIECE_BYTES = limits
    return largest_difference(pieces, whole)


def difference_of_policies(mesh_config):
    """Of a step of a policy and its critic on a mesh, in micro-batches, to that on one device."""
    batch = policy_rows.episodes(rows=16)
    many = policy_rows.step_on(batch, make_mesh(mesh_config), parts=2, **policy_rows.OPTIONS)
    return largest_difference(many, policy_rows.step_on(batch, **policy_rows.OPTIONS))


def main_of_one_process_of_two():
    """In each of two processes with two devices: rows cut over the processes, and over the devices of each."""
    initialize_distributed()
    report = {}
    for name, sizes in {"data 4": {}, "fsdp 2 tensor 2": {"data": 1, "fsdp": 2, "tensor": 2}}.items():
        history, _, _, _ = train_on(jax.devices(), DENSE, MeshConfig(**sizes), "adamw", 1)
        report[name] = [float(metrics["loss"]) for metrics in history]
    one = make_mesh(MeshConfig(data=1, tensor=4))
    report["processes"] = [jax.process_index(), jax.process_count(), *data_process(make_mesh(MeshConfig()))]
    report["shared rows"] = data_process(one)
    print(json.dumps(report))


def start(device_count, *arguments, **environment):
    # Optimising machine code takes longer than these tiny models run.
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={device_count}"
    return subprocess.Popen(
        [sys.executable, __file__, *arguments],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def printed(process):
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


@pytest.fixture(scope="module")
def report():
    return printed(start(8, "fast"))


@pytest.fixture(scope="module")
def slow_report():
    return printed(start(8, "slow"))


def check_case(case):
    many, one = case["metrics"]
    for got, expected in zip(many, one, strict=True):
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)
    assert len(one) == STEPS
    assert case["params"] < 1e-5 and case["optimizer"] < 1e-5
    assert case["devices"] == 8
    # The state keeps its place, and the step is compiled once.
    assert case["lies_right"] and case["compiled"] == 1
    assert case["process"] == [0, 1]


@pytest.mark.parametrize("case", [", ".join(pair) for pair in FAST])
def test_eight_devices_give_what_one_gives(report, case):
    check_case(report[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", [", ".join(pair) for pair in SLOW])
def test_every_model_on_every_mesh(slow_report, case):
    check_case(slow_report[case])


def test_kernels_are_cut_over_fsdp_and_tensor(report):
    assert report["moe k 1, data 2 expert 4"]["kernel_shard"] == [2, 32, 32]
    assert report["dense, data 2 fsdp 2 tensor 2"]["kernel_shard"] == [2, 16, 16]


@pytest.mark.slow
def test_kernels_are_cut_over_fsdp_alone(slow_report):
    assert slow_report["moe k 2, data 8"]["kernel_shard"] == [2, 32, 32]
    assert slow_report["dense, fsdp 8"]["kernel_shard"] == [2, 4, 32]


def test_no_device_gathers_the_tokens_of_others_for_its_experts(report):
    """1,024 tokens, 128 a device: only kernels' gradients and sums over tokens are added up."""
    assert report["collectives"]
    assert not [shape for shape in report["collectives"] if re.search(r"\b(1024|2048)\b", shape)]


@pytest.mark.parametrize("mesh", PIECES_ON)
def test_pieces_of_the_vocabulary_on_a_mesh(report, mesh):
    assert report["pieces"][mesh] < 2e-6


@pytest.mark.slow
def test_policies_and_critics_on_a_mesh(slow_report):
    assert slow_report["policy"] < 1e-5


@pytest.mark.slow
def test_two_processes_give_what_one_gives():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    cluster["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"
    processes = [start(2, "cluster", **cluster, JAX_PROCESS_ID=str(index)) for index in range(2)]
    expected, _, _, _ = train_on(jax.devices()[:1], DENSE, MeshConfig(), "adamw", 1)
    for index, report in enumerate(map(printed, processes)):
        assert report["processes"] == [index, 2, index, 2]
        assert report["shared rows"] == [0, 1]
        for name in ("data 4", "fsdp 2 tensor 2"):
            np.testing.assert_allclose(report[name], [metrics["loss"] for metrics in expected], rtol=1e-5, err_msg=name)


def test_sizes_of_a_mesh_that_do_not_multiply_to_the_devices():
    with pytest.raises(UserError, match=r"mesh.data 3, .* do not fit 1 devices"):
        make_mesh(MeshConfig(data=3), jax.devices()[:1])
    assert dict(make_mesh(MeshConfig(data=1, tensor=-1), jax.devices()[:1]).shape)["tensor"] == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 5}, r"parameter embed/embedding: its axis embed of size 32 does not divide by mesh.fsdp 5"),
        ({"tensor": 3}, r"parameter embed/embedding: its axis vocab of size 64 does not divide by mesh.tensor 3"),
        ({"expert": 3}, r"parameter layers/mlp/experts/\w+/kernel: its axis experts of size 4 .* mesh.expert 3"),
    ],
)
def test_a_parameter_that_does_not_divide_is_named(sizes, message):
    mesh = jax.sharding.AbstractMesh(
        tuple({"data": 1, "fsdp": 1, "tensor": 1, "expert": 1, **sizes}.values()), ("data", "fsdp", "tensor", "expert")
    )
    with pytest.raises(UserError, match=message):
        param_shardings(mesh, MOE["moe k 2"].logical_axes(), MOE["moe k 2"].abstract_params())


def test_one_process_needs_no_start_up():
    initialize_distributed(environ={"SLURM_STEP_NUM_TASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost"})
    assert not jax.distributed.is_initialized()


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks a device of a cluster for."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "H100"


CLUSTER = [Device(index, index // 4, index // 8) for index in range(16)]  # two slices of two processes


@pytest.mark.parametrize(
    ("sizes", "apart", "share"),
    [
        ((16, 1, 1, 1), "data", (1, 4)),
        ((2, 8, 1, 1), "data", (1, 4)),
        ((2, 4, 2, 1), "data", (1, 4)),
        ((2, 1, 8, 1), "data", (0, 2)),  # the two processes of a slice share its rows
        ((1, 16, 1, 1), "fsdp", (1, 4)),
    ],
)
def test_slices_are_cut_over_data_and_everything_else_stays_in_one(sizes, apart, share, monkeypatch):
    devices = arrange_devices(sizes, CLUSTER[::-1])
    assert devices.shape == sizes and set(devices.flat) == set(CLUSTER)
    inside = np.moveaxis(devices, MESH_AXES.index(apart), 0)
    for half, part in enumerate(np.split(inside, 2)):
        assert {device.slice_index for device in part.flat} == {half}
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert data_process(types.SimpleNamespace(devices=devices, shape=dict(zip(MESH_AXES, sizes, strict=True)))) == share


def test_slices_that_do_not_divide():
    with pytest.raises(UserError, match=r"cannot be cut over 2 slices .*; make mesh.data a multiple of 2"):
        arrange_devices((1, 1, 16, 1), CLUSTER)


def test_processes_whose_rows_are_not_neighbours(monkeypatch):
    """As on a TPU v5e 4x4, whose ring of devices comes back to the first host."""

    def share(owners, process):
        monkeypatch.setattr(jax, "process_index", lambda: process)
        devices = np.array([Device(0, owner, 0) for owner in owners]).reshape(-1, 1, 1, 1)
        return data_process(types.SimpleNamespace(devices=devices, shape={"data": len(owners), "fsdp": 1}))

    assert [share([0, 1, 1, 0], process) for process in (0, 1)] == [(0, 2), (1, 2)]
    assert [share([1, 1, 0, 0], process) for process in (0, 1)] == [(1, 2), (0, 2)]
    with pytest.raises(UserError, match="cannot divide the rows"):
        share([0, 1, 1], 0)


def test_a_host_of_a_slice_that_was_told_of_no_others(monkeypatch):
    """JAX counts the hosts of a TPU slice by itself; without a cluster they could not save together."""
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match=r"one of the 4 hosts of a TPU slice.* MINIMIND_DISTRIBUTED=1"):
        initialize_distributed(environ={"TPU_WORKER_HOSTNAMES": "localhost"})


def test_a_coordinator_without_the_process_number():
    with pytest.raises(UserError, match=r"host:1 needs a whole number in JAX_PROCESS_ID; it is None"):
        initialize_distributed(environ={"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2"})


if __name__ == "__main__":
    {"cluster": main_of_one_process_of_two, "fast": lambda: main(FAST), "slow": lambda: main(SLOW)}[sys.argv[1]]()

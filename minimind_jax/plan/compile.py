"""The training step of a run, compiled by the compiler of a GPU or TPU that need not be there.

The order in a process: `prepare_process` before JAX computes, `compile_only_devices`, `trace_step`, `compile_step`.
"""

import importlib.util
import os
import re
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

from minimind_jax.config.stages import RunConfig, SeeingConfig
from minimind_jax.errors import UserError, first_line
from minimind_jax.losses.language_model import make_language_model_loss
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.plan.devices import Device, Topology
from minimind_jax.private import private_module
from minimind_jax.runs.adapters import frozen_dtype
from minimind_jax.runs.vision import with_trained_parts
from minimind_jax.training.state import Parameters
from minimind_jax.training.step import make_program

# The host computes nothing and asks no cloud what it is; libtpu's lock is for processes that use a TPU.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
# Silences the compilers' searches for a device.
QUIET = {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost", "TF_CPP_MIN_LOG_LEVEL": "3"}

TYPICAL_STEPS = 1000  # the schedule's length is a constant in the program, no part of its size


class Memory(NamedTuple):
    """Bytes on each device, from the compiler. aliased: of the outputs that take the place of donated arguments."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


class CompiledStep(NamedTuple):
    """memory, text (of the optimised program).

    Both None where the compiler found that the step needs more memory than there is; then `needed` is what it says of
    it.
    """

    memory: Memory | None
    text: str | None
    needed: int | None = None


def prepare_process() -> None:
    """Keeps JAX from taking a device of this machine. Call it before JAX computes anything."""
    os.environ.update(ENVIRONMENT)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


def compile_only_devices(device: Device, topology: Topology) -> list:
    """Devices that can be compiled for and nothing else. Raises UserError with the compiler's own words."""
    jax.config.update("jax_enable_compilation_cache", False)  # a kept program can only be read where its device is
    _answer_for(device)
    try:
        return list(topologies.get_topology_desc(topology.name, platform=device.platform, **topology.options).devices)
    except Exception as error:  # RuntimeError, NotImplementedError, JaxRuntimeError: each plugin has its own
        asked = topology.name or f"{topology.count} x {device.peak}"
        raise UserError(f"the compiler does not take {asked}: {first_line(error)}") from error


def emulated_devices(device: Device, topology: Topology) -> list:
    """Devices of this machine's CPU, where no compiler is installed for the true ones: what lies where is the same."""
    _answer_for(device)
    if topology.count > 1:
        jax.config.update("jax_num_cpu_devices", topology.count)
    return jax.devices("cpu")[: topology.count]


def _answer_for(device: Device) -> None:
    """From now on the device's GPU is at hand wherever JAX and tokamax ask what kernels can do there. Raises UserError
    where they ask in another way."""
    if device.platform != "cuda":
        return
    inner = private_module("jax._src.cudnn.fused_attention_stablehlo", "check_compute_capability")
    inner.check_compute_capability = lambda least: device.target.capability >= tuple(map(int, least.split(".")))
    if importlib.util.find_spec("tokamax"):
        inner = private_module("tokamax._src.gpu_utils", "_compute_capability", "has_mosaic_gpu_support")
        inner._compute_capability = lambda _=None: float("{}.{}".format(*device.target.capability))
        inner.has_mosaic_gpu_support = lambda _=None: device.target.capability >= (8, 0)


def abstract_batch(config: RunConfig, model: LanguageModel | None = None):
    """Shapes of a batch (see `data.rows`), and of its images (see `model.vision`) where the stage, of `model`, sees."""
    shape = (config.rows_per_step, config.data.seq_len)
    names = ("tokens", "targets", "positions", "segment_ids", "target_bytes")
    batch = {name: jax.ShapeDtypeStruct(shape, np.int32) for name in names}
    if isinstance(config, SeeingConfig):
        tower, room = model.config.vision.tower, config.data.image_room(model.config.vision.image_tokens)
        if config.data.cache_features:
            seen = (shape[0], room, tower.grid**2, tower.hidden_size)
            batch["features"] = jax.ShapeDtypeStruct(seen, model.dtype)
        else:
            seen = (shape[0], room, tower.image_size, tower.image_size, 3)
            batch["pixels"] = jax.ShapeDtypeStruct(seen, np.uint8)
    elif config.data.packing == "pad":
        batch["lengths"] = jax.ShapeDtypeStruct(shape[:1], np.int32)
    return {**batch, "loss_weights": jax.ShapeDtypeStruct(shape, np.float32)}


def trace_step(config: RunConfig, model, mesh):
    """The training step of pretraining and fine-tuning as `training.loop.train` builds it, traced for a mesh.

    model: of the platform that the step is to run on.
    """
    loss_fn = make_language_model_loss(model, getattr(config.training, "z_loss", 0.0))
    steps = config.training.steps or max(TYPICAL_STEPS, (config.optimizer.warmup_steps or 0) + 1)
    parameters = Parameters.of(model, load=dict, frozen_dtype=frozen_dtype(config, model))
    program = make_program(config, with_trained_parts(config, model, parameters), loss_fn, mesh, steps)
    return program.step.trace(program.abstract, abstract_batch(config, model)), program.abstract


def deviceless_options(platform: str, deterministic: bool = False) -> dict[str, str | bool]:
    """Without a device nothing can be timed, so kernels are taken as the compiler's model ranks them. For a fixed order
    of sums XLA has none of Triton's, and from jax 0.12 on it fails at products that were meant for them."""
    if platform != "cuda":
        return {}
    without_triton = deterministic and jax.__version_info__ >= (0, 12)
    return {"xla_gpu_autotune_level": "0"} | ({"xla_gpu_enable_triton_gemm": False} if without_triton else {})


def compile_step(traced, platform: str, deterministic: bool = False) -> CompiledStep:
    """Compiles a traced step. Raises UserError when the compiler refuses it for another reason than memory."""
    options = deviceless_options(platform, deterministic)
    try:
        compiled = traced.lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise UserError(f"the compiler refused the step: {first_line(error)}") from error
        return CompiledStep(None, None, needed_memory(str(error)))
    stats = compiled.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code")
    memory = Memory(*(getattr(stats, f"{name}_size_in_bytes") for name in names))
    return CompiledStep(memory, compiled.as_text())


def needed_memory(message: str) -> int | None:
    """Bytes the TPU compiler says a program needs when there are not as many; None if it does not say."""
    match = re.search(r"(?:Used |\()([\d.]+)([KMGT])(?: of|\) exceeds available)", message)
    return match and int(float(match[1]) * 1024 ** ("KMGT".index(match[2]) + 1))


def state_bytes(state) -> tuple[int, int, int]:
    """Bytes of the parameters, frozen ones included, and of the optimizer's state on each device, and of both on a
    device that has all."""
    params = (state.params, state.frozen)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, state.opt_state)))
    return bytes_per_device(params), bytes_per_device(state.opt_state), whole


def bytes_per_device(tree) -> int:
    """Of a tree of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves)

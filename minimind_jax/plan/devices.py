"""The devices `minimind plan` knows: their memory, and what the compilers want to hear about them.

There is no table of prices: those published for one device differ by a factor of three between sellers and change by
the month (looked at 2026-11-25), so a price is what the user was offered, `--price`.
"""

import importlib.util
import math
import re
from typing import Literal, NamedTuple

from minimind_jax import shell
from minimind_jax.config.settings import nearest
from minimind_jax.errors import UserError
from minimind_jax.model.config import Platform
from minimind_jax.training.speed import PEAK_FLOPS


class Gpu(NamedTuple):
    """What XLA's compiler is told of a GPU, from NVIDIA's data sheets and the CUDA programming guide (tables of compute
    capabilities). clock: GHz, boost. bandwidth: bytes/s. l2: bytes. shared: bytes of a multiprocessor. threads,
    lanes: resident threads and float32 lanes of one."""

    title: str
    capability: tuple[int, int]
    multiprocessors: int
    clock: float
    bandwidth: float
    l2: int
    shared: int
    threads: int
    lanes: int


class Device(NamedTuple):
    """memory: bytes that programs can have. peak: its key in `PEAK_FLOPS`. target: `tpu` generation or GPU.
    smallest: topology taken when none is given."""

    platform: Literal["cuda", "tpu"]
    peak: str
    memory: int
    target: str | Gpu
    smallest: str

    @property
    def backend(self) -> Platform:
        """What JAX calls the platform where there is a device."""
        return "gpu" if self.platform == "cuda" else "tpu"

    @property
    def peak_flops(self) -> float:
        return PEAK_FLOPS[self.peak]


class Topology(NamedTuple):
    """name, options: of `jax.experimental.topologies.get_topology_desc`. count: devices."""

    name: str
    count: int
    options: dict


MIB, GIB = 2**20, 2**30
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 3352e9, 50 * MIB, 228 * 1024, 2048, 128)
A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 2039e9, 40 * MIB, 164 * 1024, 2048, 64)
RTX_3090 = Gpu("NVIDIA GeForce RTX 3090", (8, 6), 82, 1.695, 936e9, 6 * MIB, 100 * 1024, 1536, 128)
RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 2.52, 1008e9, 72 * MIB, 100 * 1024, 1536, 128)

# A TPU's memory is what its compiler lets a program have ("exceeds available HBM (15.75G)"); a GPU's is the card's.
DEVICES = {
    "h100": Device("cuda", "h100", 80 * GIB, H100, "1"),
    "a100": Device("cuda", "a100", 80 * GIB, A100, "1"),
    "rtx3090": Device("cuda", "rtx 3090", 24 * GIB, RTX_3090, "1"),
    "rtx4090": Device("cuda", "rtx 4090", 24 * GIB, RTX_4090, "1"),
    "tpu-v4": Device("tpu", "tpu v4", int(30.75 * GIB), "v4", "2x2x1"),
    "tpu-v5e": Device("tpu", "tpu v5e", int(15.75 * GIB), "v5e", "1x1"),
    "tpu-v5p": Device("tpu", "tpu v5", int(95.74 * GIB), "v5p", "2x2x1"),
    "tpu-v6e": Device("tpu", "tpu v6", int(31.25 * GIB), "v6e", "1x1"),
}

GPU_MEMORY_FRACTION = 0.75  # that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
GPUS_PER_NODE = 8


def find_device(name: str) -> Device:
    """The device called `name`. Raises UserError, naming the nearest."""
    if name not in DEVICES:
        raise UserError(
            f"--device {name} is unknown; did you mean {nearest(name, DEVICES)}? It plans for {', '.join(DEVICES)}"
        )
    return DEVICES[name]


def parse_topology(device: Device, text: str) -> Topology:
    """`8` or `x8` GPUs; a TPU slice `2x4` (v5e, v6e) or `2x2x1` (v4, v5p) in chips. Raises UserError."""
    return _gpu_topology(device, text) if device.platform == "cuda" else _tpu_topology(device, text)


def _gpu_topology(device: Device, text: str) -> Topology:
    match = re.fullmatch(r"x?([1-9]\d*)", text)
    if match is None:
        raise UserError(f"--topology {text} is not a number of GPUs; write 1 or 8")
    count = int(match[1])
    nodes = math.ceil(count / GPUS_PER_NODE)
    if count % nodes:
        raise UserError(f"--topology {count}: {count} GPUs do not fill nodes of {GPUS_PER_NODE}; choose a multiple")
    # partitions x hosts x devices of a host
    return Topology("", count, {"topology": f"1x{nodes}x{count // nodes}", "target_config": target_config(device)})


def _tpu_topology(device: Device, text: str) -> Topology:
    axes = len(device.smallest.split("x"))
    sizes = [int(size) for size in text.split("x")] if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text) else []
    if len(sizes) != axes:
        raise UserError(
            f"--topology {text} is not a slice of {device.target}; its topologies have {axes} sizes, such as "
            f"{'2x4' if axes == 2 else '2x2x1'}"
        )
    host = tuple(map(min, sizes + [1] * (3 - axes), (2, 2, 1)))
    # Both cores of a v4 or v5p chip as one device, as JAX has them on the machine.
    config = "megacore" if axes == 3 else "default"
    options = {"chip_config_name": config, "chips_per_host_bounds": host}
    return Topology(f"{device.target}:{text}", math.prod(sizes), options)


def target_config(device: Device) -> str:
    """XLA's description of a GPU (stream_executor.GpuTargetConfigProto) as protobuf text."""
    gpu = device.target
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
  core_count: {gpu.multiprocessors}
  fpus_per_core: {gpu.lanes}
  clock_rate_ghz: {gpu.clock}
  memory_bandwidth: {gpu.bandwidth:.0f}
  device_memory_size: {device.memory}
  l2_cache_size: {gpu.l2}
  shared_memory_per_core: {gpu.shared}
  shared_memory_per_block: {48 * 1024}
  shared_memory_per_block_optin: {gpu.shared - 1024}
  threads_per_core_limit: {gpu.threads}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{gpu.title}"
"""


def installed_compiler(device: Device) -> str | None:
    """The package that holds the compiler of a device's platform, None where there is none."""
    packages = ("libtpu",) if device.platform == "tpu" else ("jax-cuda12-plugin", "jax-cuda13-plugin")
    return next((name for name in packages if importlib.util.find_spec(name.replace("-", "_"))), None)


def install_command(device: Device) -> str:
    """What installs the compiler of a device's platform."""
    return shell.install_command("tpu" if device.platform == "tpu" else "cuda12")

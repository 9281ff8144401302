"""The device mesh, what lies where on it, and the start of several processes.

Parameters name their axes (`LanguageModel.logical_axes`); one table says over which mesh axis each is cut. Arrays are
placed once, and the compiler inserts the communication (mesh axes are of type Auto throughout).
"""

import math
import os
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from minimind_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor", "expert")

# Rows of a batch are cut over both: fsdp is data parallelism whose parameters are cut, too.
ROW_AXES = ("data", "fsdp")

# Logical axis of a parameter -> mesh axis; None keeps it whole on every device.
RULES: dict[str | None, str | None] = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
    None: None,
}


def initialize_distributed(environ: Mapping[str, str] = os.environ) -> None:
    """Join the processes of a run; does nothing when there is only one. Call it before any computation.

    $JAX_COORDINATOR_ADDRESS ("host:port" of process 0), $JAX_NUM_PROCESSES and $JAX_PROCESS_ID, which the command's
    flags set, say so. Without a coordinator, Slurm, Open MPI and TPU pods on GKE are recognised when they started more
    than one process; $MINIMIND_DISTRIBUTED=1 says so anywhere else where JAX can find the others by itself (TPU VMs).
    Raises UserError when the coordinator is given and one of the other two is not, and on a host of a TPU slice that
    was told of no others.
    """
    if jax.distributed.is_initialized():  # by an earlier stage of a pipeline
        return
    if coordinator := environ.get("JAX_COORDINATOR_ADDRESS"):
        numbers = {name: environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")}
        for name, value in numbers.items():
            if value is None or not value.isdigit():
                raise UserError(f"a run with coordinator {coordinator} needs a whole number in {name}; it is {value}")
        jax.distributed.initialize(coordinator, *map(int, numbers.values()))
    elif _started_by_a_cluster(environ):
        jax.distributed.initialize()
    elif jax.process_count() > 1:
        raise UserError(
            f"this is one of the {jax.process_count()} hosts of a TPU slice, and the run was not told to join the "
            "others; start it on all of them with MINIMIND_DISTRIBUTED=1 (as scripts/tpu_vm.sh does)"
        )


def _started_by_a_cluster(environ: Mapping[str, str]) -> bool:
    tasks = (environ.get("SLURM_STEP_NUM_TASKS", "1"), environ.get("OMPI_COMM_WORLD_SIZE", "1"))
    return (
        environ.get("MINIMIND_DISTRIBUTED") == "1"
        or any(int(count) > 1 for count in tasks)
        or "," in environ.get("TPU_WORKER_HOSTNAMES", "")
    )


def announce(text: str) -> None:
    """Prints, on the first process only."""
    if jax.process_index() == 0:
        print(text, flush=True)


def make_mesh(config, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor, expert) over `devices`, all by default, of the sizes in a `MeshConfig`.

    Where the devices form several slices (TPU slices, GPU nodes: what a fast network joins), `data` is cut over the
    slices, `fsdp` if `data` is too small, and the other axes stay inside of one.
    Raises UserError when the sizes do not multiply to the number of devices, or not to the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    filled = [len(devices) // known if size == -1 else size for size in sizes.values()]
    if math.prod(filled) != len(devices):
        asked = ", ".join(f"mesh.{axis} {size}" for axis, size in sizes.items())
        raise UserError(
            f"{asked} do not fit {len(devices)} devices: the sizes must multiply to it; "
            "set one of them to -1 to take the devices that are left"
        )
    return Mesh(arrange_devices(filled, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def arrange_devices(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices in an array (data, fsdp, tensor, expert) of these sizes, neighbours where the network is fast."""
    slices = len({getattr(device, "slice_index", None) for device in devices})
    data, fsdp, tensor, expert = sizes
    outer_data = math.gcd(data, slices)
    outer_fsdp = slices // outer_data
    if fsdp % outer_fsdp:
        raise UserError(
            f"mesh.data {data} and mesh.fsdp {fsdp} cannot be cut over {slices} slices (or nodes); make mesh.data a "
            f"multiple of {slices}"
        )
    inner = (data // outer_data, fsdp // outer_fsdp, tensor, expert)
    if slices == 1:
        return mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
    outer = (outer_data, outer_fsdp, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)


def current_mesh() -> AbstractMesh | None:
    """The mesh of `jax.set_mesh`, for code below a jitted step; None without one, or with a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def param_shardings(mesh: Mesh, logical_axes, abstract):
    """A NamedSharding for each parameter.

    logical_axes: tree of tuples, the logical axis names of each parameter. abstract: the same tree of shapes.
    Raises UserError, naming parameter, axis and sizes, when an axis does not divide by its mesh axis.
    """

    def place(path, parameter, axes):
        spec = [RULES[axis] for axis in axes]
        for axis, size, mesh_axis in zip(axes, parameter.shape, spec, strict=True):
            if mesh_axis is not None and size % mesh.shape[mesh_axis]:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise UserError(
                    f"parameter {name}: its axis {axis} of size {size} does not divide by "
                    f"mesh.{mesh_axis} {mesh.shape[mesh_axis]}; choose sizes that divide"
                )
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(place, abstract, logical_axes)


def init_params(model, key: jax.Array, mesh: Mesh):
    """The initial parameters of `model`, each device making only its own part; the values do not depend on the mesh."""
    shardings = param_shardings(mesh, model.logical_axes(), model.abstract_params())
    return jax.jit(model.init, out_shardings=shardings)(key)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (the leading axis) cut over data x fsdp; the rest is whole."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are cut: the size of data x fsdp."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def data_process(mesh: Mesh) -> tuple[int, int]:
    """(index, count): this process loads part `index` of `count` equal parts of every batch's rows.

    The process index and count where each process has rows of its own; processes that share their rows (a tensor
    axis that spans them) get the same index. On a TPU slice the devices of a process need not be neighbours in the
    mesh; then its rows are not neighbours in the global array, which changes no sum over them.

    Raises UserError when processes share some of their rows, and not all.
    """
    shards = row_shards(mesh)
    shard_of = np.arange(shards).reshape(mesh.shape["data"], mesh.shape["fsdp"], 1, 1)
    held: dict[int, set[int]] = {}
    for device, shard in zip(mesh.devices.flat, np.broadcast_to(shard_of, mesh.devices.shape).flat, strict=True):
        held.setdefault(device.process_index, set()).add(int(shard))
    shares = sorted({tuple(sorted(own)) for own in held.values()})
    if sum(map(len, shares)) != shards or len({len(share) for share in shares}) != 1:
        raise UserError(
            f"the processes cannot divide the rows of a step: they hold the parts {shares} of {shards}; choose "
            "mesh.tensor and mesh.expert so that they multiply to a divisor or a multiple of a process's devices"
        )
    return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays from the rows that this process has loaded (see `data_process`). Raises UserError when the rows do
    not divide over data x fsdp."""
    shards, rows = row_shards(mesh), len(next(iter(batch.values())))
    local_shards = shards // data_process(mesh)[1]
    if rows % local_shards:
        raise UserError(
            f"{rows} rows do not divide over {local_shards} devices (mesh.data {mesh.shape['data']} x mesh.fsdp "
            f"{mesh.shape['fsdp']}); choose training.batch_tokens and data.seq_len so that they do"
        )
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}

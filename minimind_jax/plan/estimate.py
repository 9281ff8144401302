"""Memory by formulas, where no compiler is installed, what to change when a step does not fit, and time and price."""

import math
from typing import NamedTuple

from minimind_jax.config.stages import RunConfig
from minimind_jax.losses.vocabulary import piece_size
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.transformer import scan_unroll
from minimind_jax.plan.devices import GPU_MEMORY_FRACTION, Device
from minimind_jax.sharding import ROW_AXES


class Estimate(NamedTuple):
    """Bytes on each device. gradients: their float32 sums, the updates and the parameters made of them, and the weights
    in the compute dtype. activations: kept for the backward pass. logits: and their gradient, as much at once as the
    loss makes (`losses.vocabulary`)."""

    state: int
    gradients: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(self)


def estimate_memory(
    config: RunConfig, model: ModelConfig, mesh_shape: dict[str, int], state: int, params: int
) -> Estimate:
    """Memory of a step by formulas, in bfloat16 or float32 as `compute.dtype` says (auto: bfloat16).

    A layer keeps for each token of a micro-batch: its input and the outputs of both norms and both branches (5 D),
    query and key heads before and after norm and rotation, values and attention's output (4 N H + 4 K H), and gate, up
    and their product (3 F, of the experts used). `remat: full` keeps the input alone, and one layer's values. In a loop
    over layers compilers were seen to need about twice that (docs/decisions.md).
    state, params: bytes of both on each device.
    """
    rows = config.rows_per_step // config.training.accumulation_steps
    tokens = rows * config.data.seq_len / math.prod(mesh_shape[axis] for axis in ROW_AXES)
    size, tensor = 4 if config.compute.dtype == "float32" else 2, mesh_shape["tensor"]
    width, heads = model.hidden_size, model.num_attention_heads + model.num_key_value_heads
    mlp = 3 * model.intermediate_size
    if model.is_moe:
        mlp = model.num_experts_per_tok * (3 * model.moe_intermediate_size + 2 * width)
    layer = 5 * width + (4 * heads * model.head_dim + mlp) / tensor
    layers = model.num_hidden_layers
    kept = {"none": layer, "full": width + layer / layers}.get(config.compute.remat, 0.6 * layer)
    kept *= 1 if scan_unroll(config.compute, layers) >= layers else 2
    words = math.ceil(model.vocab_size / tensor)
    # The loss takes the head whole, in the compute dtype, and makes its gradient so, however fsdp cuts it.
    head = words * width * (size + 4) * (1 - 1 / mesh_shape["fsdp"])
    return Estimate(
        state,
        3 * params + params * size // 4 + round(head),
        round(tokens * size * layers * kept),
        round(tokens * 2 * 4 * piece_size(math.ceil(tokens), words)),
    )


def fit(device: Device, needed: int | None) -> tuple[bool, str]:
    """Whether a step of `needed` bytes, None for too many to tell, fits on a device, and a sentence about it."""
    if needed is None:
        return False, "does not fit"
    share, is_gpu = needed / device.memory, device.platform == "cuda"
    if share <= (GPU_MEMORY_FRACTION if is_gpu else 1):
        return True, f"fits, {share:.0%} of the memory"
    if is_gpu and share <= 0.93:
        return True, (
            f"fits, {share:.0%} of the memory, with XLA_PYTHON_CLIENT_MEM_FRACTION=.95 (JAX takes "
            f"{GPU_MEMORY_FRACTION:.0%} of a GPU unless told)"
        )
    return False, f"does not fit, {share:.0%} of the memory"


def advice(config: RunConfig, mesh_shape: dict[str, int], memory: int, state: int, needed: int | None) -> list[str]:
    """Settings that make a step smaller, the cheapest first.

    memory: of a device. state, needed: bytes of the state and of the whole step on each; needed None where unknown.
    """
    lines = []
    shards = math.prod(mesh_shape[axis] for axis in ROW_AXES)
    parts, rows = config.training.accumulation_steps, config.rows_per_step // shards
    if mesh_shape["data"] > 1 and state > 0.3 * memory:
        lines.append(
            f"--mesh.data 1 --mesh.fsdp {shards}: parameters and optimizer are cut over the devices, not copied"
        )
    if rows > parts:
        room = 0.9 * memory - state
        wanted = parts * (2 if needed is None or room <= 0 else max(2, math.ceil((needed - state) / room)))
        more = next((n for n in range(wanted, rows + 1) if rows % n == 0), rows)
        lines.append(f"--training.accumulation_steps {more}: fewer rows at once, same result")
    if config.compute.remat == "none":
        lines.append("--compute.remat full: activations are computed again, about a third more work")
    return lines or ["a device with more memory, more devices with mesh.fsdp, or a shorter data.seq_len"]


class Cost(NamedTuple):
    """tokens_per_second: of all devices together. price: None without a price an hour."""

    hours: float
    tokens_per_second: float
    price: float | None


def cost(tokens: int, flops_per_token: float, peak: float, devices: int, mfu: float, price: float | None) -> Cost:
    """Training time at a model FLOPs utilisation `mfu` of the devices' peak; price: of one device's hour."""
    speed = mfu * peak * devices / flops_per_token
    hours = tokens / speed / 3600
    return Cost(hours, speed, None if price is None else hours * devices * price)

"""`minimind plan`: what a run needs on a named GPU or TPU, told before it is rented."""

import dataclasses
import json
import time
from importlib.metadata import version

from minimind_jax.config.stages import SeeingConfig
from minimind_jax.config.tools import PlanConfig
from minimind_jax.errors import UserError
from minimind_jax.model import attention
from minimind_jax.model.lora import without_adapters
from minimind_jax.model.transformer import LanguageModel, count_parameters
from minimind_jax.model.vision import tower_path
from minimind_jax.plan import compile as compiler
from minimind_jax.plan import devices, estimate, inputs
from minimind_jax.plan.module import ATTENTION_CALLS, read_module
from minimind_jax.sharding import make_mesh
from minimind_jax.training.speed import flops_per_image, flops_per_token
from minimind_jax.training.step import count_parts


def run(config: PlanConfig) -> None:
    """Plans and prints. Raises UserError."""
    compiler.prepare_process()
    plan = make_plan(config)
    print(json.dumps(plan, indent=1, ensure_ascii=False) if config.json else "\n".join(describe(plan)))


# Planning -------------------------------------------------------------------------------------------------------------


def make_plan(asked: PlanConfig) -> dict:
    """Everything that is printed, as JSON has it: sizes in bytes, times in hours."""
    device = devices.find_device(asked.device)
    shape = asked.topology or device.smallest
    topology = devices.parse_topology(device, shape)
    planned = inputs.load_planned(asked.arguments, asked.stage)
    tokens = inputs.planned_tokens(planned, asked.data, asked.tokens)
    is_seeing = isinstance(planned.config, SeeingConfig)
    if asked.images is not None and not (is_seeing and tokens):
        raise UserError("--images N is of stages that see (vlm-pretrain, vlm-sft), and goes with --tokens N or --data")
    package = devices.installed_compiler(device)
    make = compiler.compile_only_devices if package else compiler.emulated_devices
    made = make(device, topology)
    mesh = make_mesh(planned.config.mesh, made)
    parts = count_parts(planned.config, mesh)
    training = dataclasses.replace(planned.config.training, accumulation_steps=parts)
    config = dataclasses.replace(planned.config, training=training)
    model = LanguageModel(planned.architecture, config.compute, inputs.planned_adapter(planned), device.backend)
    # Fused attention cannot even be traced without its compiler.
    compute = config.compute if package else dataclasses.replace(config.compute, attention="grouped")
    traced, state = compiler.trace_step(config, dataclasses.replace(model, compute=compute), mesh)
    params, opt_state, whole = compiler.state_bytes(state)

    share = config.trained_share(model.config.num_hidden_layers)
    formula = flops_per_token(model.config, config.data.seq_len, share)
    tokens = tokens or inputs.Tokens(10**9, "no data is there; for a billion tokens (--data FILE, --tokens N)")
    plan = {
        "model": _model_facts(planned, model),
        "step": _step_facts(config, model, mesh),
        "device": {
            "name": asked.device,
            "topology": shape,
            "count": topology.count,
            "memory": device.memory,
            "peak_flops": device.peak_flops,
            "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        },
        "flops_per_token": formula,
        "state": {"parameters": params, "optimizer": opt_state, "share": (params + opt_state) / whole},
    }
    if package:
        plan |= _compiled_facts(traced, package, device.platform, planned.config.compute.deterministic)
    else:
        plan["compiler"] = {"name": None, "install": devices.install_command(device)}
        gradients = compiler.bytes_per_device(state.params)
        guess = estimate.estimate_memory(config, model.config, dict(mesh.shape), params + opt_state, gradients)
        plan["memory"] = {**guess._asdict(), "total": guess.total}
    needed = plan["memory"]["total"]
    fits, sentence = estimate.fit(device, needed)
    change = [] if fits else estimate.advice(config, dict(mesh.shape), device.memory, params + opt_state, needed)
    plan["fit"] = {"fits": fits, "sentence": sentence, "change": change}
    if is_seeing:
        plan["images"] = images = _image_facts(config, model, asked.images, tokens)
        formula += images["count"] / tokens.count * images["flops"]
    plan["time"] = _time_facts(asked, config, tokens, formula, device.peak_flops, topology.count)
    return plan


def _model_facts(planned, model) -> dict:
    shape = planned.architecture
    return {
        "stage": planned.stage,
        "parameters": count_parameters(without_adapters(model.abstract_params())),
        "adapters": None if model.adapter is None else dict(model.adapter.ranks),
        "layers": shape.num_hidden_layers,
        "hidden_size": shape.hidden_size,
        "vocab_size": shape.vocab_size,
        "experts": shape.num_experts,
        "note": planned.note,
    }


def _step_facts(config, model, mesh) -> dict:
    shape, parts = model.config, config.training.accumulation_steps
    queries = (config.rows_per_step // parts, config.data.seq_len, shape.num_attention_heads, shape.head_dim)
    own = model.dtype, model.platform, mesh, model.compute.deterministic
    choice = attention.choose_path(model.compute.attention, queries, shape.num_key_value_heads, *own)
    return {
        "tokens": config.training.batch_tokens,
        "rows": config.rows_per_step,
        "seq_len": config.data.seq_len,
        "accumulation_steps": parts,
        "dtype": model.dtype.name,
        "remat": config.compute.remat,
        "attention_path": choice.path,
        "attention_reason": choice.reason,
    }


def _image_facts(config: SeeingConfig, model: LanguageModel, asked: int | None, tokens: inputs.Tokens) -> dict:
    """Of one image and of the run's; where nobody says how many there are, as many as the rows have room for."""
    vision, compute = model.config.vision, model.compute
    room = config.data.image_room(vision.image_tokens)
    known = tokens.images if asked is None else asked
    choice = tower_path(vision.tower, compute, model.dtype, model.platform)
    return {
        "side": vision.tower.image_size,
        "patches": vision.tower.grid**2,
        "tokens": vision.image_tokens,
        "in_a_row": room,
        "train": "adapters" if model.adapter else config.vision.train,
        "attention_path": "none" if config.data.cache_features else choice.path,
        "attention_reason": "it looks once, before the first step" if config.data.cache_features else choice.reason,
        "flops": flops_per_image(vision, model.config.hidden_size, config.tower_passes),
        "count": tokens.count * room // config.data.seq_len if known is None else known,
        "is_known": known is not None,
    }


def _compiled_facts(traced, package: str, platform: str, deterministic: bool) -> dict:
    """What the compiler has to say: memory, kernels, collectives."""
    started = time.monotonic()
    step = compiler.compile_step(traced, platform, deterministic)
    name, seconds = f"{package} {version(package)}, jax {version('jax')}", round(time.monotonic() - started, 1)
    told = {"name": name, "seconds": seconds}
    if step.memory is None:
        return {"compiler": told, "memory": {"total": step.needed, "refused": True}}
    module = read_module(step.text)
    return {
        "compiler": told,
        "memory": {**step.memory._asdict(), "total": step.memory.total},
        "attention_kernels": {
            name: {"count": calls, "runs": runs}
            for name, (calls, runs) in module.custom_calls.items()
            if name.startswith(ATTENTION_CALLS)
        },
        "collectives": {kind: vars(found) for kind, found in sorted(module.collectives.items())},
        "loops_of_unknown_length": module.unknown_loops,
    }


def _time_facts(asked: PlanConfig, config, tokens, formula: float, peak: float, count: int) -> dict:
    if config.compute.dtype == "float32":
        return {"note": "no time: the peak is known for bfloat16 only, and compute.dtype is float32"}
    told = estimate.cost(tokens.count, formula, peak, count, asked.mfu, asked.price)
    return {"tokens": tokens.count, "source": tokens.source, "mfu": asked.mfu, **told._asdict()}


# Telling --------------------------------------------------------------------------------------------------------------


def describe(plan: dict) -> list[str]:
    """The plan in lines of text."""
    model, step, device = plan["model"], plan["step"], plan["device"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in device["mesh"].items()) or "one device"
    experts = f", {model['experts']} experts" if model["experts"] else ""
    adapters = f", adapters of rank {max(model['adapters'].values())} trained" if model["adapters"] else ""
    parts = step["accumulation_steps"]
    lines = [
        ("model", f"{model['parameters']:,} parameters ({model['layers']} layers of width {model['hidden_size']}, "
                  f"{model['vocab_size']:,} tokens{experts}), stage {model['stage']}{adapters}"),
        ("", model["note"]),
        ("step", f"{step['tokens']:,} tokens: {step['rows']} rows of {step['seq_len']}"
                 + f" in {parts} parts" * (parts > 1) + f", {step['dtype']}, remat {step['remat']}"),
        ("device", f"{device['count']} x {device['name']} ({mesh}): {gib(device['memory'])} and "
                   f"{device['peak_flops'] / 1e12:,.0f} TFLOP/s each in bfloat16"),
        *_compiler_lines(plan["compiler"]),
        *_image_lines(plan.get("images")),
        ("FLOPs", f"{plan['flops_per_token'] / 1e6:,.1f} million a token"
                  + (f", {plan['images']['flops'] / 1e9:,.1f} billion an image" if "images" in plan else "")),
        ("state", f"parameters {gib(plan['state']['parameters'])}, optimizer {gib(plan['state']['optimizer'])} on each "
                  f"device ({plan['state']['share']:.1%} of all)"),
        ("memory", _memory_line(plan)),
        *[("", f"try {change}") for change in plan["fit"]["change"]],
        *_program_lines(plan),
        *_time_lines(plan["time"], plan.get("images"), device["count"]),
    ]  # fmt: skip
    return [f"{name:<12} {text}" for name, text in lines if text]


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


def _image_lines(told: dict | None) -> list[tuple[str, str]]:
    if told is None:
        return []
    count = f"{told['count']:,} in all" if told["is_known"] else "counted as if all rows were full of them (--images N)"
    line = f"{told['side']} x {told['side']} pixels, {told['patches']} patches, {told['tokens']} tokens each"
    return [("images", f"{line}, at most {told['in_a_row']} a row; {count}; vision.train {told['train']}")]


def _compiler_lines(told: dict) -> list[tuple[str, str]]:
    if told["name"] is not None:
        return [("compiler", f"{told['name']}, no device present; {told['seconds']:.0f} s")]
    missing = "NOT INSTALLED: memory is estimated by formulas, and there are no kernels and collectives"
    return [("compiler", missing), ("", f"install it with: {told['install']}")]


def _memory_line(plan: dict) -> str:
    memory, sentence = dict(plan["memory"]), plan["fit"]["sentence"]
    total = memory.pop("total")
    if memory.pop("refused", False):
        need = f"{gib(total)} or more" if total else "more than there is"
        return f"the compiler finds that the step needs {need}: {sentence}"
    parts = ", ".join(f"{name} {gib(size)}" for name, size in memory.items())
    about = "" if plan["compiler"]["name"] else "about "
    return f"{about}{gib(total)} on each device: {sentence} ({parts})"


def _program_lines(plan: dict) -> list[tuple[str, str]]:
    path = f"path {_path(plan['step'])}"
    if "images" in plan:
        path += f", the tower's {_path(plan['images'])}"
    if "collectives" not in plan:
        return [("attention", path)]
    kernels = ", ".join(f"{found['count']} x {name}" for name, found in plan["attention_kernels"].items())
    first, *others = [
        f"{kind}: {found['count']} in the program, {found['runs']} and {gib(found['bytes'])} a device and step"
        for kind, found in plan["collectives"].items()
    ] or ["none"]
    if unknown := plan["loops_of_unknown_length"]:
        others.append(f"{unknown} loops of unknown length count as one round")
    return [
        ("attention", f"{path}; kernels in the program: {kernels or 'none'}"),
        ("collectives", first),
        *(("", other) for other in others),
    ]


def _path(told: dict) -> str:
    reason = told["attention_reason"]
    return told["attention_path"] + (f" ({reason})" if reason else "")


def _time_lines(told: dict, images: dict | None, count: int) -> list[tuple[str, str]]:
    if "note" in told:
        return [("time", told["note"])]
    hours = told["hours"]
    length = f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"
    price = "" if told["price"] is None else f", price {told['price']:,.2f}"
    speed = f"{told['tokens_per_second']:,.0f} tokens/s"
    if images is not None:
        speed += f" and {told['tokens_per_second'] * images['count'] / told['tokens']:,.0f} images/s"
    return [
        ("time", f"{length} for {told['tokens']:,} tokens at {speed} "
                 f"(--mfu {told['mfu']:g}), {hours * count:,.1f} device hours{price}"),
        ("", told["source"]),
    ]  # fmt: skip

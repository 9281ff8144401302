"""What a TPU's or GPU's compiler makes of our programs, without such a device: memory and compile time.

    python scripts/bench_compile.py --device tpu-v5e tpu-v6e tpu-v4 --splash      # blocks of splash attention
    python scripts/bench_compile.py --device h100 --steps -- --config pretrain    # the step: as it is, in a loop ...

`--splash`: forward and backward of splash attention, 16,384 tokens in rows of several documents, 8 query and 4
key/value heads, bfloat16, for each length, head width and block size. `--steps`: `minimind plan` with the settings
behind `--`, with all layers in one program, in a loop, and on a GPU deterministic. A JSON line each. In a Python that
has the device's compiler.
"""

import argparse
import json
import time
from importlib.metadata import version

from minimind_jax.plan import compile as compiler

compiler.prepare_process()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

from minimind_jax.config.tools import PlanConfig  # noqa: E402
from minimind_jax.errors import UserError, first_line  # noqa: E402
from minimind_jax.model import fused_attention as fused  # noqa: E402
from minimind_jax.plan.command import describe, make_plan  # noqa: E402
from minimind_jax.plan.devices import DEVICES, Device, find_device, parse_topology  # noqa: E402

TOKENS, HEADS, KV_HEADS = 16_384, 8, 4
MIB = 2**20


def compile_splash(place: SingleDeviceSharding, length: int, width: int, block: int) -> dict:
    rows = TOKENS // length

    def total(q, k, v, segment_ids_BT):
        heads = (x.reshape(rows, length, -1, width) for x in (q, k, v))  # as the projections leave them
        return jnp.sum(jnp.square(fused.splash(*heads, segment_ids_BT).astype(jnp.float32)))

    def argument(size, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((rows, length, *size), dtype, sharding=place)

    arguments = [argument((heads * width,)) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    fused.splash_block = lambda _: block
    started = time.monotonic()
    try:
        compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(*arguments, argument((), jnp.int32)).compile()
    except jax.errors.JaxRuntimeError as error:
        return {"cannot": first_line(error)[:120]}
    memory = compiled.memory_analysis()
    return {
        "temporaries MiB": round(memory.temp_size_in_bytes / MIB, 1),
        "code MiB": round(memory.generated_code_size_in_bytes / MIB, 1),
        "compile seconds": round(time.monotonic() - started, 1),
    }


def compile_step(name: str, settings: list[str]) -> dict:
    try:
        plan = make_plan(PlanConfig(device=name, arguments=tuple(settings)))
    except UserError as error:
        return {"cannot": str(error)}
    lines = {line.split()[0]: line.split(None, 1)[1] for line in describe(plan) if line[0] != " "}
    memory = plan["memory"]
    return {
        "temporaries MiB": round(memory["temporaries"] / MIB) if "temporaries" in memory else None,
        "compile seconds": plan["compiler"].get("seconds"),
        **{what: lines[what] for what in ("memory", "attention")},
    }


def say(benchmark: str, of: Device, **found: object) -> None:
    package = "libtpu" if of.platform == "tpu" else "jax-cuda12-plugin"
    about = {"date": time.strftime("%Y-%m-%d"), "jax": jax.__version__, package: version(package)}
    print(json.dumps({"benchmark": benchmark, **about, **found}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", nargs="+", choices=DEVICES, required=True)
    parser.add_argument("--splash", action="store_true")
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 96, 128])
    parser.add_argument("--blocks", nargs="+", type=int, default=[256, 512, 1024, 2048])
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("settings", nargs="*", help="of the step")
    args = parser.parse_args()
    usual = fused.splash_block
    for name in args.device:
        device = find_device(name)
        cases = [(t, h, b) for t in args.lengths for h in args.widths for b in args.blocks if args.splash]
        if cases:
            place = SingleDeviceSharding(
                compiler.compile_only_devices(device, parse_topology(device, device.smallest))[0]
            )
        for length, width, block in cases:
            shown = {"device": name, "length": length, "width": width, "block": block}
            say(
                "splash",
                device,
                **shown,
                is_taken=block == usual(length),
                **compile_splash(place, length, width, block),
            )
        fused.splash_block = usual
        ways = {"one program": [], "loop": ["--compute.scan_unroll", "1"]}
        if device.platform == "cuda":
            ways["deterministic"] = ["--compute.deterministic", "true"]
        for way, more in ways.items() if args.steps else ():
            say(
                "step",
                device,
                device=name,
                way=way,
                settings=args.settings,
                **compile_step(name, [*args.settings, *more]),
            )


if __name__ == "__main__":
    main()

"""Speed of generation, ours and MiniMind's `generate` in turn.

    python scripts/bench_decode.py --minimind CHECKOUT --rows 1
    python scripts/bench_decode.py --minimind CHECKOUT --rows 16

Random weights, random prompts, greedy, no early end. Prints one JSON line: new tokens per second of each side, prefill
included, ours / theirs pair by pair, and the seconds of each side's first token, in which the reading of prompts is
compiled; the program of further tokens is in the next request, which does not count. float32 on a CPU; on a GPU
bfloat16, and MiniMind float16 as its own eval_llm.py has it.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import bench_common as bench
import jax
import numpy as np

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.inference.engine import Engine
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.transformer import LanguageModel, cast_matrices


def serve_ours(settings: dict) -> None:
    shape = {"num_experts": 4, "num_experts_per_tok": 1} if settings["moe"] else {}
    config = ModelConfig(hidden_size=settings["hidden_size"], num_hidden_layers=settings["layers"], **shape)
    model = LanguageModel(config)
    params = cast_matrices(jax.jit(model.init)(jax.random.key(0)), model.dtype)
    engine, random = Engine(model, params), np.random.default_rng(0)

    def generate(count: int) -> dict:
        prompts = random.integers(3, 6400, (settings["rows"], settings["prompt_len"])).tolist()
        started = time.perf_counter()
        done = engine.generate(prompts, SamplingConfig(max_new_tokens=count, temperature=0.0, ignore_eos=True))
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": sum(len(answer.ids) for answer in done)}

    bench.serve({"generate": generate})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minimind", type=Path, help="a checkout of jingyaogong/minimind; without it ours alone")
    parser.add_argument("--minimind_python", default=sys.executable)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--moe", action="store_true")
    parser.add_argument("--rows", type=int, default=1, help="prompts answered at once")
    parser.add_argument("--prompt_len", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve_ours(json.loads(args.serve))

    settings = {name: getattr(args, name) for name in ("hidden_size", "layers", "moe", "rows", "prompt_len")}
    sides = {"ours": bench.ours("bench_decode.py", settings)}
    if args.minimind:
        sides["minimind"] = bench.minimind(args.minimind, args.minimind_python, settings)
    first, answers = bench.interleave(sides, args.pairs, generate=args.new_tokens)
    for side in sides.values():
        side.close()
    shown = {**settings, "new_tokens": args.new_tokens}
    bench.print_result("decode", shown, **{"first seconds": first, "tokens per second": bench.rates(answers, "tokens")})


if __name__ == "__main__":
    main()

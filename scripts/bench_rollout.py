"""Speed of rollouts: the policy's writer and MiniMind's rollout engine, asked in turn.

    python scripts/bench_rollout.py --minimind CHECKOUT

Random weights and prompts: 16 prompts, 4 completions of each, at temperature 1 from all words; log-probabilities come
with the tokens. MiniMind's `TorchRolloutEngine` repeats each prompt, goes on to the longest completion and reads
everything once more for the log-probabilities; its temperature is 0.8 with top-k 50 and top-p 0.85, which it does not
let choose. `full`: all completions have the same length; `unequal`: from 16 tokens to that, and only tokens that were
asked for count. Prints one JSON line a case: tokens of completions per second of each side, ours / MiniMind's pair by
pair, and the seconds of each side's first rollout, in which it compiles.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import bench_common as bench
import jax
from bench_requests import rollout

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.config.sections import MeshConfig
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.inference.request import Request
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.rl.policy import LocalPolicy
from minimind_jax.sharding import init_params, make_mesh


def serve_ours(settings: dict) -> None:
    model, mesh = LanguageModel(ModelConfig(hidden_size=settings["hidden_size"])), make_mesh(MeshConfig())
    params, sequences = init_params(model, jax.random.key(0), mesh), settings["prompts"] * settings["completions"]
    tokenizer = Tokenizer.load(settings["tokenizer"]) if settings["tokenizer"] else None
    context = settings["prompt_len"] + settings["new_tokens"]
    policy, calls = LocalPolicy(model, tokenizer, mesh, slots=sequences, context=context), iter(range(10**6))

    def write(case: str, count: int) -> dict:
        call, answers = next(calls), []
        prompts, lengths = rollout(settings, case, count, call)
        started = time.perf_counter()
        writer = policy.load(params)
        for number, new in enumerate(lengths):
            sampling = SamplingConfig(
                new, temperature=1.0, top_k=0, top_p=1.0, ignore_eos=True, seed=call * sequences + number
            )
            answers.append(writer.submit(Request(tuple(prompts[number // settings["completions"]]), sampling)))
        while writer.busy:
            writer.step(patient=True)
        return {"seconds": time.perf_counter() - started, "tokens": sum(len(answer.tokens) for answer in answers)}

    bench.serve({case: lambda count, case=case: write(case, count) for case in settings["cases"]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minimind", type=Path, help="a checkout of jingyaogong/minimind; without it ours alone")
    parser.add_argument("--minimind_python", default=sys.executable)
    parser.add_argument(
        "--one_core", action="store_true", help="count processor seconds on one core: for a busy machine"
    )
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--completions", type=int, default=4)
    parser.add_argument("--cases", nargs="+", default=["full", "unequal"])
    parser.add_argument("--prompt_len", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve_ours(json.loads(args.serve))
    if args.one_core:
        bench.use_one_core()
    names = ("hidden_size", "prompts", "completions", "prompt_len", "new_tokens", "one_core", "cases")
    settings = {name: getattr(args, name) for name in names} | {"layers": 8, "moe": False}
    settings["tokenizer"] = str(args.minimind / "model") if args.minimind else ""
    sides = {"ours": bench.ours("bench_rollout.py", settings)}
    if args.minimind:
        sides["minimind"] = bench.minimind(args.minimind, args.minimind_python, settings)
    for case in args.cases:
        first, answers = bench.interleave(sides, args.pairs, **{case: args.new_tokens})
        rates = bench.rates(answers, "tokens")
        shown = {**settings, "cases": case}
        bench.print_result("rollout", shown, **{"first seconds": first, "tokens per second": rates})
    for side in sides.values():
        side.close()


if __name__ == "__main__":
    main()

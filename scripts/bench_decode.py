"""Speed of generation: our engine, MiniMind's `generate` and llama.cpp, asked in turn.

    python scripts/bench_decode.py --minimind CHECKOUT                  # greedy, sampled and unequal requests
    python scripts/bench_decode.py --minimind CHECKOUT --llama_cpp      # and real llama.cpp (xllamacpp), F32 and Q8_0
    python scripts/bench_decode.py --minimind CHECKOUT --moe --hidden_size 768 --cases "greedy 1" "greedy 16"

Random weights, random prompts, no early end; `sampled` is temperature 0.85, top-k 50, top-p 0.85. `unequal` are 16
requests with prompts of 16 to 256 tokens and answers of as many: MiniMind takes them as one batch, padded on the left,
and goes on to the longest answer, as its rollouts do; only tokens that were asked for count. Prints one JSON line a
case: new tokens per second of each side, prompts included, ours / theirs pair by pair, and the seconds of each side's
first request, in which it compiles. float32 on a CPU; on a GPU bfloat16, and MiniMind float16 as its own eval_llm.py.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bench_common as bench
import jax
from bench_requests import CASES, requests

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.request import Request
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.transformer import LanguageModel, cast_matrices


def serve_ours(settings: dict) -> None:
    model, params = make_model(settings)
    params, engines, calls = model.unstack(cast_matrices(params, model.dtype)), {}, itertools.count()

    def answer(case: str, count: int) -> dict:
        asked, sampling = requests(settings, case, count, next(calls))
        if len(asked) not in engines:
            engines[len(asked)] = Engine(model, params, slots=len(asked))
        engine = engines[len(asked)]
        started = time.perf_counter()
        answers = [
            engine.submit(
                Request(tuple(prompt), SamplingConfig(max_new_tokens=new, ignore_eos=True, seed=n, **sampling))
            )
            for n, (prompt, new) in enumerate(asked)
        ]
        while engine.busy:
            engine.step(patient=True)
        return {"seconds": time.perf_counter() - started, "tokens": sum(len(answer.tokens) for answer in answers)}

    bench.serve(Cases(answer))


def serve_llama_cpp(settings: dict) -> None:
    """llama.cpp's own server in this process, with a slot for each request, asked over its API."""
    import xllamacpp

    servers, calls = {}, itertools.count()

    def server(rows: int) -> str:
        if rows not in servers:
            params = xllamacpp.CommonParams()
            params.model.path, params.verbosity = settings["file"], -1
            params.n_parallel, params.n_ctx, params.cache_ram_mib = rows, 512 * rows, 0
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
            servers[rows] = xllamacpp.Server(params)
        return servers[rows].listening_address

    def ask(address: str, **body) -> int:
        data = json.dumps({**body, "ignore_eos": True, "cache_prompt": False}).encode()
        request = urllib.request.Request(address + "/completion", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["tokens_predicted"]

    def answer(case: str, count: int) -> dict:
        asked, sampling = requests(settings, case, count, next(calls))
        sampling = {**sampling, "samplers": ["top_k", "top_p", "temperature"]} if sampling["temperature"] else sampling
        address = server(len(asked))
        with ThreadPoolExecutor(len(asked)) as pool:
            started = time.perf_counter()
            tokens = pool.map(lambda one: ask(address, prompt=one[0], n_predict=one[1], **sampling), asked)
            return {"tokens": sum(tokens), "seconds": time.perf_counter() - started}

    bench.serve(Cases(answer))


class Cases(dict):
    """A handler for every case."""

    def __init__(self, answer):
        self._answer = answer

    def __getitem__(self, case):
        return lambda count: self._answer(case, count)


def make_model(settings: dict):
    shape = {"num_experts": 4, "num_experts_per_tok": 1} if settings["moe"] else {}
    config = ModelConfig(hidden_size=settings["hidden_size"], num_hidden_layers=settings["layers"], **shape)
    model = LanguageModel(config)
    return model, jax.jit(model.init)(jax.random.key(0))


def llama_cpp_sides(settings: dict, tokenizer: Path, folder: str) -> dict[str, bench.Side]:
    """A process for each format. The file's weights are ours."""
    from minimind_jax.convert.gguf import params_to_gguf

    model, params = make_model(settings)
    sides = {}
    for dtype in ("float32", "q8_0"):
        file = str(Path(folder) / f"{dtype}.gguf")
        params_to_gguf(file, "bench", model.config, jax.device_get(params), Tokenizer.load(tokenizer), dtype, None)
        own = json.dumps({**settings, "file": file})
        sides[f"llama.cpp {dtype}"] = bench.Side([sys.executable, str(Path(__file__)), "--serve_llama_cpp", own])
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minimind", type=Path, help="a checkout of jingyaogong/minimind; without it ours alone")
    parser.add_argument("--minimind_python", default=sys.executable)
    parser.add_argument(
        "--llama_cpp", action="store_true", help="beside llama.cpp too; needs --minimind for a tokenizer"
    )
    parser.add_argument(
        "--one_core", action="store_true", help="count processor seconds on one core: for a busy machine"
    )
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--moe", action="store_true")
    parser.add_argument(
        "--cases", nargs="+", default=CASES, help="greedy, sampled, plain or unequal, and how many at once"
    )
    parser.add_argument("--prompt_len", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--serve_llama_cpp", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve_ours(json.loads(args.serve))
    if args.serve_llama_cpp:
        return serve_llama_cpp(json.loads(args.serve_llama_cpp))

    if args.one_core:
        bench.use_one_core()
    settings = {name: getattr(args, name) for name in ("hidden_size", "layers", "moe", "prompt_len", "one_core")}
    with tempfile.TemporaryDirectory() as folder:
        sides = {"ours": bench.ours("bench_decode.py", settings)}
        if args.minimind:
            sides["minimind"] = bench.minimind(args.minimind, args.minimind_python, settings)
        if args.llama_cpp:
            sides |= llama_cpp_sides(settings, args.minimind / "model", folder)
        for case in args.cases:
            first, answers = bench.interleave(sides, args.pairs, **{case: args.new_tokens})
            shown = {**settings, "case": case, "new_tokens": args.new_tokens}
            rates = bench.rates(answers, "tokens")
            bench.print_result("decode", shown, **{"first seconds": first, "tokens per second": rates})
        for side in sides.values():
            side.close()


if __name__ == "__main__":
    main()

"""Speed of the training step, ours and MiniMind's in turn.

    python scripts/bench_train.py --minimind CHECKOUT                                  # full rows of random tokens
    python scripts/bench_train.py --minimind CHECKOUT --compile                        # torch.compile on its side
    python scripts/bench_train.py --minimind CHECKOUT --data sft.jsonl --kind conversation --seq_len 768
    python scripts/bench_train.py --hidden_size 768 --moe                              # ours alone
    python scripts/bench_train.py --hidden_size 768 --documents 8 --compute '{"attention": "grouped"}'

Prints one JSON line: tokens per second of each side (all positions of the rows, and useful ones, which are not
padding), ours / theirs pair by pair, the MFU of all positions on one device whose peak is known, and the seconds of
each side's first step, in which it compiles. Ours packs (`concat` for text, `best_fit` for conversations); MiniMind
pads. Both read the data inside the time. `--minimind_python` is a Python with torch, transformers and datasets.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import bench_common as bench
import jax
import numpy as np

from minimind_jax.config.sections import DataConfig, TrainingConfig
from minimind_jax.config.stages import PretrainConfig
from minimind_jax.data.batches import open_data
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.losses.language_model import make_language_model_loss
from minimind_jax.model.config import ComputeConfig, ModelConfig
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.seeds import named_key
from minimind_jax.sharding import init_params, make_mesh, shard_batch
from minimind_jax.training.defaults import filled
from minimind_jax.training.speed import flops_per_token, peak_flops
from minimind_jax.training.state import Parameters, create_state
from minimind_jax.training.step import make_program


def _model_config(settings: dict) -> ModelConfig:
    shape = {"num_experts": 4, "num_experts_per_tok": 1} if settings["moe"] else {}
    return ModelConfig(hidden_size=settings["hidden_size"], num_hidden_layers=settings["layers"], **shape)


def our_batches(settings: dict, config: PretrainConfig):
    """Endless batches: full rows of random tokens, or packed rows of a file."""
    rows, length = settings["rows"], settings["seq_len"]
    if settings["data"]:
        batches, _ = open_data(settings["kind"], config, Tokenizer.load(settings["tokenizer"]), 0, 1)
        yield from batches.iterate(0, 10**6)
    tokens = np.random.default_rng(0).integers(3, 6400, (rows, length), dtype=np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    segment_ids = (1 + positions * settings["documents"] // length).astype(np.int32)
    names = ("tokens", "targets", "positions", "segment_ids", "loss_weights")
    while True:
        yield dict(zip(names, (tokens, tokens, positions, segment_ids, np.ones(tokens.shape, np.float32)), strict=True))


def serve_ours(settings: dict) -> None:
    packing = "best_fit" if settings["kind"] == "conversation" else "concat"
    data = (settings["data"],) if settings["data"] else ()
    config = PretrainConfig(
        data=DataConfig(train=data, val_fraction=0, seq_len=settings["seq_len"], packing=packing,
                        cache_dir=settings["cache"]),
        training=TrainingConfig(batch_tokens=settings["rows"] * settings["seq_len"]),
        compute=ComputeConfig(**settings["compute"]),
    )  # fmt: skip
    config = filled(config)
    model = LanguageModel(_model_config(settings), config.compute)
    mesh = make_mesh(config.mesh)
    parameters = Parameters.of(model, lambda: init_params(model, named_key(0, "init"), mesh))
    program = make_program(config, parameters, make_language_model_loss(model), mesh, 10**6)
    state = create_state(parameters.load(), program.optimizer, program.shardings)
    batches = our_batches(settings, config)

    def train(steps: int) -> dict:
        nonlocal state
        started, tokens, useful = time.perf_counter(), 0, 0
        for _ in range(steps):
            batch = next(batches)
            state, metrics = program.step(state, shard_batch(batch, mesh))
            tokens += batch["tokens"].size
            useful += int(np.count_nonzero(batch["segment_ids"]))
        jax.block_until_ready(metrics)
        return {"seconds": time.perf_counter() - started, "tokens": tokens, "useful": useful}

    bench.serve({"train": train})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minimind", type=Path, help="a checkout of jingyaogong/minimind; without it ours alone")
    parser.add_argument("--minimind_python", default=sys.executable)
    parser.add_argument("--compile", action="store_true", help="torch.compile on MiniMind's side")
    parser.add_argument("--both", action="store_true", help="MiniMind without and with torch.compile")
    parser.add_argument(
        "--compute", type=json.loads, default={}, help="JSON of our `compute` settings that are not auto"
    )
    parser.add_argument("--documents", type=int, default=1, help="of a row of random tokens, on our side")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--moe", action="store_true")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq_len", type=int, default=340)
    parser.add_argument("--data", help="a file of records; random tokens without it")
    parser.add_argument("--kind", choices=("text", "conversation"), default="text")
    parser.add_argument("--tokenizer", help="folder with tokenizer.json; MiniMind's own by default")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="of one measurement")
    parser.add_argument("--one_core", action="store_true", help="count processor seconds on one core")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve_ours(json.loads(args.serve))
    if args.one_core:
        bench.use_one_core()

    tokenizer = args.tokenizer or (str(args.minimind / "model") if args.minimind else None)
    if args.data and not tokenizer:
        parser.error("--data needs --tokenizer or --minimind")
    names = ("hidden_size", "layers", "moe", "rows", "seq_len", "kind", "compile", "compute", "documents")
    shown = {name: getattr(args, name) for name in names}
    data = str(Path(args.data).resolve()) if args.data else None
    with tempfile.TemporaryDirectory() as cache:
        settings = {**shown, "data": data, "tokenizer": tokenizer, "cache": cache}
        sides = {"ours": bench.ours("bench_train.py", settings, keep=True)}
        if args.minimind:
            sides["minimind"] = bench.minimind(args.minimind, args.minimind_python, settings)
        if args.minimind and args.both:
            compiled = {**settings, "compile": True}
            sides["minimind compiled"] = bench.minimind(args.minimind, args.minimind_python, compiled)
        first, answers = bench.interleave(sides, args.pairs, train=args.steps)
        for side in sides.values():
            side.close()
    shown["data"] = Path(args.data).name if args.data else "random"
    results = {"first seconds": first}
    results |= {f"{key} per second": bench.rates(answers, key) for key in ("tokens", "useful")}
    if jax.device_count() == 1 and (peak := peak_flops(ComputeConfig())):
        flops = flops_per_token(_model_config(shown), args.seq_len)
        results["MFU"] = {name: round(results["tokens per second"][name] * flops / peak, 4) for name in sides}
    bench.print_result("train", shown, **results)


if __name__ == "__main__":
    main()

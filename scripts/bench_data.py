"""Speed of the data path alone: rows read from the token cache, packed, shuffled and batched, with nothing computed.

    python scripts/bench_data.py --data pretrain.jsonl --tokenizer FOLDER
    python scripts/bench_data.py --data sft.jsonl --kind conversation --seq_len 768 --tokenizer FOLDER

Prints one JSON line: seconds and tokens per second of tokenising, tokens per second of batches, and the memory of the
process after the first and after the last batch, which must not grow with the file.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import bench_common as bench
import numpy as np

from minimind_jax.config.sections import DataConfig, TrainingConfig
from minimind_jax.config.stages import PretrainConfig
from minimind_jax.data.batches import open_data
from minimind_jax.data.tokenizer import Tokenizer


def peak_megabytes() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--kind", choices=("text", "conversation"), default="text")
    parser.add_argument("--packing", choices=("concat", "best_fit", "pad"), help="default: as the stages of the kind")
    parser.add_argument("--seq_len", type=int, default=340)
    parser.add_argument("--rows", type=int, default=8)
    args = parser.parse_args()

    packing = args.packing or ("best_fit" if args.kind == "conversation" else "concat")
    with tempfile.TemporaryDirectory() as cache:
        config = PretrainConfig(
            data=DataConfig(train=(args.data,), val_fraction=0, seq_len=args.seq_len, packing=packing, cache_dir=cache),
            training=TrainingConfig(batch_tokens=args.rows * args.seq_len),
        )
        started = time.perf_counter()
        batches, _ = open_data(args.kind, config, Tokenizer.load(args.tokenizer), 0, 1)
        tokenising = time.perf_counter() - started
        steps, tokens, first = batches.steps_per_epoch, 0, 0.0
        started = time.perf_counter()
        for batch in batches.iterate(0, steps):
            tokens += int(np.count_nonzero(batch["segment_ids"]))
            first = first or peak_megabytes()
        seconds = time.perf_counter() - started
        found = batches.cache.info["tokens"]
    shown = {
        "data": Path(args.data).name,
        "kind": args.kind,
        "packing": packing,
        "seq_len": args.seq_len,
        "rows": args.rows,
    }
    results = {
        "tokenising seconds": round(tokenising, 2),
        "tokenised tokens per second": round(found / tokenising),
        "batches": steps,
        "tokens per second": round(tokens / seconds),
        "peak megabytes after the first batch": first,
        "peak megabytes after the last batch": peak_megabytes(),
    }
    bench.print_result("data", shown, **results)


if __name__ == "__main__":
    main()

"""Time from the command to the first training step, with an empty cache of compiled programs and with a full one.

    python scripts/bench_startup.py --data pretrain.jsonl --tokenizer FOLDER
    python scripts/bench_startup.py --data pretrain.jsonl --tokenizer FOLDER -- --model.preset minimind2-small

Runs `minimind pretrain` for one step `--times` times, with settings after `--` passed on. The first run also tokenises
the file and compiles; the others find both done. Prints one JSON line.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import bench_common as bench


def seconds_to_first_step(args: argparse.Namespace, work: Path, run: str) -> float:
    """What the stage prints: measured from the start of Python's first module of ours, to the step's end."""
    command = [
        sys.executable, "-m", "minimind_jax", "pretrain", "--run", work / run, "--data.train", args.data,
        "--tokenizer", args.tokenizer, "--training.steps", "1", "--training.eval_every", "0", *args.settings,
    ]  # fmt: skip
    environment = {**os.environ, "MINIMIND_CACHE": str(work / "cache")}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(re.search(r"was done ([\d.]+) s after the program started", printed)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--times", type=int, default=4, help="2 or more: nothing is cached at the first")
    parser.add_argument("settings", nargs="*", help="after `--`: settings of `minimind pretrain`")
    args = parser.parse_args()
    if args.times < 2:
        parser.error("--times must be 2 or more")
    with tempfile.TemporaryDirectory() as folder:
        seconds = [seconds_to_first_step(args, Path(folder), f"run{index}") for index in range(args.times)]
    results = {"seconds, nothing cached": seconds[0], "seconds, cached": round(statistics.median(seconds[1:]), 1)}
    bench.print_result("start-up", {"data": Path(args.data).name, "settings": args.settings}, **results)


if __name__ == "__main__":
    main()

"""Time from nothing to a model as good as MiniMind's: both from scratch on the same file, by the clock on the wall.

    python scripts/bench_target.py --train pretrain.jsonl --val held_out.jsonl --minimind CHECKOUT
    python scripts/bench_target.py --train pretrain.jsonl --val held_out.jsonl --tokenizer DIR --target 2.341

MiniMind's trainer/train_pretrain.py runs unchanged (in a copy of its checkout) on the first `--steps` x 8 records;
what its model reaches on the held-out file (held_out.py) is the target. Without `--minimind` the target is a number.
Ours is `minimind pretrain` on the whole file for `--our_steps` steps, with the settings of recipe.py's MUON and those
given after `--`. Times are of whole commands: start of Python, reading and tokenising the file, compilation, training,
export. Prints one JSON line.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench_common as bench
from held_out import bits_per_byte
from recipe import MUON, flags

from minimind_jax.convert.torch_checkpoint import from_torch


def timed(command: list[str], cwd: Path | None = None) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - started, 1)


def run_minimind(args: argparse.Namespace, work: Path) -> dict:
    for part in ("dataset", "model", "trainer"):
        shutil.copytree(args.minimind / part, work / part)
    (work / "out").mkdir()
    with open(args.train, encoding="utf-8") as lines, open(work / "train.jsonl", "w", encoding="utf-8") as file:
        file.writelines(line for line, _ in zip(lines, range(args.steps * 8), strict=False))
    settings = {
        "epochs": 1, "batch_size": 8, "accumulation_steps": 1, "max_seq_len": args.seq_len, "device": "cpu",
        "num_workers": 1, "hidden_size": args.hidden_size, "num_hidden_layers": args.layers,
        "data_path": work / "train.jsonl",
    }  # fmt: skip
    seconds = timed([args.minimind_python, "train_pretrain.py", *flags(settings)], cwd=work / "trainer")
    weights = work / "out" / f"pretrain_{args.hidden_size}.pth"
    from_torch(weights, work / "hf", tokenizer=work / "model")
    return {"seconds": seconds, "steps": args.steps, "bits per byte": measure(args, work / "hf")}


def run_ours(args: argparse.Namespace, work: Path) -> dict:
    settings = {
        "run": work / "ours", "tokenizer": args.tokenizer or work / "model", "data.train": args.train,
        "data.val_fraction": 0, "data.seq_len": args.seq_len, "data.cache_dir": work / "cache",
        "model.hidden_size": args.hidden_size, "model.num_hidden_layers": args.layers, "export_dtype": "float32",
        "training.steps": args.our_steps, "training.eval_every": 0, "checkpoint.every": 0, **MUON,
    }  # fmt: skip
    command = [sys.executable, "-m", "minimind_jax", "pretrain", *flags(settings), *args.settings]
    return {"seconds": timed(command), "steps": args.our_steps, "bits per byte": measure(args, work / "ours")}


def measure(args: argparse.Namespace, model: Path) -> float:
    return round(bits_per_byte(str(model), args.val, window=args.seq_len - 2), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--minimind", type=Path, help="a checkout of jingyaogong/minimind, to run it, too")
    parser.add_argument("--minimind_python", default=sys.executable)
    parser.add_argument("--steps", type=int, default=2000, help="of MiniMind")
    parser.add_argument("--target", type=float, help="bits per byte, where MiniMind does not run")
    parser.add_argument("--tokenizer", help="folder with tokenizer.json; MiniMind's own by default")
    parser.add_argument("--our_steps", type=int, default=1100)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seq_len", type=int, default=340)
    parser.add_argument("settings", nargs="*", help="after `--`: settings of `minimind pretrain`")
    args = parser.parse_args()
    if args.minimind is None and (args.tokenizer is None or args.target is None):
        parser.error("without --minimind, give --tokenizer and --target")
    args.train, args.val = (str(Path(file).resolve()) for file in (args.train, args.val))

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        results = {"minimind": run_minimind(args, work)} if args.minimind else {}
        results["ours"] = run_ours(args, work)
    target = results["minimind"]["bits per byte"] if args.minimind else args.target
    results |= {"target": target, "reached": results["ours"]["bits per byte"] <= target}
    if args.minimind:
        results["ours / minimind, seconds"] = round(results["ours"]["seconds"] / results["minimind"]["seconds"], 3)
    shown = {name: getattr(args, name) for name in ("hidden_size", "layers", "seq_len", "settings")}
    bench.print_result("time to target", shown, **results)


if __name__ == "__main__":
    main()

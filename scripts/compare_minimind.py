"""Run MiniMind's own training scripts and ours on the same weights and the same batches, and compare every loss.

    python scripts/compare_minimind.py --minimind PATH --data pretrain.jsonl --sft_data sft.jsonl

PATH is a checkout of jingyaogong/minimind; its script runs unchanged in a process of its own (`--minimind_python` is a
Python that has torch, transformers and datasets), on the first `--steps` x `--batch_size` records of the files. Ours
runs as `minimind pretrain` and `minimind sft` do, padded, with MiniMind's settings. What makes the two see the same:

- the starting weights are MiniMind's, initialised from seed 0, and brought over with `convert.torch_checkpoint`;
- MiniMind shuffles with torch.randperm from seed 42; our file is written in that order and not shuffled;
- the template's dice are drawn by MiniMind from Python's `random.random`; there it always returns 0.5 (no system prompt
  is added, empty think blocks are removed), and ours is set to these outcomes;
- MiniMind logs through `swanlab`; a module of that name that writes JSON lines takes its place, so its losses arrive
  in full precision.

MiniMind's load-balancing loss counts padding and ours does not, so with `--moe` take records that fill their rows:
`--min_bytes 1500`.

Prints one JSON line a stage: the losses of both and the largest difference. Exits with 1 if it is above `--tolerance`.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from minimind_jax.config.sections import CheckpointConfig, DataConfig, ModelSettings, OptimizerConfig, TrainingConfig
from minimind_jax.config.stages import PretrainConfig, SFTConfig
from minimind_jax.convert.torch_checkpoint import from_torch

# Run by MiniMind's Python inside a copy of its checkout.
MAKE_WEIGHTS = """
import sys, torch
sys.path.insert(0, "..")
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
torch.manual_seed(0)
hidden, layers, moe, records = (int(a) for a in sys.argv[1:])
model = MiniMindForCausalLM(MiniMindConfig(hidden_size=hidden, num_hidden_layers=layers, use_moe=bool(moe)))
suffix = "_moe" if moe else ""
torch.save({k: v.half() for k, v in model.state_dict().items()}, f"../out/init_{hidden}{suffix}.pth")
torch.manual_seed(42)
print(torch.randperm(records).tolist())
"""

RUN_SCRIPT = """
import random, runpy, sys
random.random = lambda: 0.5
sys.path.insert(0, ".")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

SWANLAB = """
import json
def init(**settings): pass
def get_run(): return None
def log(metrics):
    with open("losses.jsonl", "a") as file:
        file.write(json.dumps(metrics) + "\\n")
"""


def first_records(path: Path, count: int, min_bytes: int) -> list[str]:
    with open(path, encoding="utf-8") as file:
        lines = list(itertools.islice((line for line in file if len(line.encode()) >= min_bytes), count))
    if len(lines) < count:
        raise SystemExit(f"{path} has {len(lines)} records of at least {min_bytes} bytes; {count} are needed")
    return lines


def run_theirs(args, stage: str, work: Path, records: list[str]) -> tuple[list[float], list[int]]:
    """The losses MiniMind's script logs, and the order it took the records in."""
    trainer = work / "trainer"
    data = work / f"{stage}.jsonl"
    data.write_text("".join(records), encoding="utf-8")
    (work / "out").mkdir(exist_ok=True)
    (trainer / "swanlab.py").write_text(SWANLAB)
    shape = [str(args.hidden_size), str(args.num_hidden_layers), str(int(args.moe))]
    order = subprocess.run(
        [args.minimind_python, "-c", MAKE_WEIGHTS, *shape, str(len(records))],
        cwd=trainer, check=True, stdout=subprocess.PIPE, text=True,
    ).stdout  # fmt: skip
    script = {"pretrain": "train_pretrain.py", "sft": "train_full_sft.py"}[stage]
    flags = {
        "epochs": 1, "batch_size": args.batch_size, "accumulation_steps": 1, "learning_rate": args.learning_rate,
        "device": "cpu", "num_workers": 0, "log_interval": 1, "hidden_size": shape[0], "num_hidden_layers": shape[1],
        "use_moe": shape[2], "max_seq_len": args.seq_len, "from_weight": "init", "data_path": data,
    }  # fmt: skip
    command = [args.minimind_python, "-c", RUN_SCRIPT, script, "--use_wandb"]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    subprocess.run(command, cwd=trainer, check=True, stdout=subprocess.DEVNULL)
    log = trainer / "losses.jsonl"
    losses = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
    log.unlink()
    return losses, json.loads(order)


def run_ours(args, stage: str, work: Path, records: list[str], order: list[int]) -> list[float]:
    """The losses of our stage, from its metrics.jsonl."""
    from minimind_jax.stages import start

    data = work / f"{stage}_ordered.jsonl"
    data.write_text("".join(records[i] for i in order), encoding="utf-8")
    suffix = "_moe" if args.moe else ""
    init = work / f"init_{stage}"
    from_torch(work / "out" / f"init_{args.hidden_size}{suffix}.pth", init, tokenizer=work / "model")
    cls = {"pretrain": PretrainConfig, "sft": SFTConfig}[stage]
    run = start(
        cls(
            run=str(work / f"run_{stage}"),
            init_from=str(init),
            model=ModelSettings(router_gradient="none"),
            data=DataConfig(
                train=(str(data),), val_fraction=0, seq_len=args.seq_len, packing="pad", shuffle=False,
                system_prompt_probability=0, empty_think_removal=1, cache_dir=str(work / "cache"),
            ),
            training=TrainingConfig(
                epochs=1, batch_tokens=args.batch_size * args.seq_len, log_every=1, eval_every=0
            ),
            optimizer=OptimizerConfig(learning_rate=args.learning_rate, decay="all"),
            checkpoint=CheckpointConfig(every=0),
        )
    )  # fmt: skip
    metrics = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [m["loss"] for m in metrics if "loss" in m]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minimind", type=Path, required=True, help="a checkout of jingyaogong/minimind")
    parser.add_argument("--minimind_python", default=sys.executable, help="a Python with torch, transformers, datasets")
    parser.add_argument("--data", type=Path, help="pretraining records; without it pretrain is not compared")
    parser.add_argument("--sft_data", type=Path, help="conversations; without them sft is not compared")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--seq_len", type=int, default=128)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--num_hidden_layers", type=int, default=4)
    parser.add_argument("--moe", action="store_true")
    parser.add_argument("--min_bytes", type=int, default=0, help="take only records of at least this size")
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    args = parser.parse_args()

    worst = 0.0
    for stage, path in (("pretrain", args.data), ("sft", args.sft_data)):
        if path is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            for part in ("dataset", "model", "trainer"):
                shutil.copytree(args.minimind / part, work / part)
            records = first_records(path, args.steps * args.batch_size, args.min_bytes)
            theirs, order = run_theirs(args, stage, work, records)
            ours = run_ours(args, stage, work, records, order)
        if len(ours) != len(theirs):
            raise SystemExit(f"{stage}: MiniMind logged {len(theirs)} steps, ours {len(ours)}")
        differences = [abs(a - b) for a, b in zip(theirs, ours, strict=True)]
        difference = math.inf if any(map(math.isnan, differences)) else max(differences)
        worst = max(worst, difference)
        result = {"stage": stage, "moe": args.moe, "steps": len(ours), "largest_difference": difference}
        print(json.dumps({**result, "minimind": theirs, "ours": ours}), flush=True)
    return int(worst > args.tolerance)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())

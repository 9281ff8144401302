"""The experiments behind the default recipe (docs/recipe.md): one change after another, at equal tokens or seconds.

    python scripts/recipe.py --train pretrain.jsonl --val held_out.jsonl --tokenizer DIR --out runs/recipe
    python scripts/recipe.py ... --only muon minimind --tokens 600000
    python scripts/recipe.py ... --only muon minimind --seconds 300 --out runs/recipe_seconds

Every rung trains a model of `--hidden_size` and `--layers` from scratch on as many tokens, padding not counted; with
--seconds, for as many steps as it does in that time, which a short run measures before. Prints one JSON line a rung:
held-out bits per byte (held_out.py), steps, and the seconds of the whole command. Rungs that are done are read, not run
again. Seconds compare only between rungs that ran alone on the machine.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from held_out import bits_per_byte

# MiniMind's settings: a padded text a row, AdamW as torch has it, cosine to a tenth, everything decays.
MINIMIND = {
    "data.packing": "pad",
    "training.batch_tokens": 8 * 340,
    "optimizer.learning_rate": 5e-4,
    "optimizer.decay": "all",
}
PACKED = {**MINIMIND, "data.packing": "concat"}
SMALL_STEPS = {**PACKED, "training.batch_tokens": 4 * 340}
HIGHER = {**SMALL_STEPS, "optimizer.learning_rate": 3e-3}
LINEAR = {
    **HIGHER,
    "optimizer.schedule": "linear",
    "optimizer.final_fraction": 0.0,
    "optimizer.warmup_steps": 10,
    "optimizer.b2": 0.95,
}
MATRICES = {**LINEAR, "optimizer.decay": "matrices", "optimizer.weight_decay": 0.1}
ZERO = {**MATRICES, "model.zero_init_outputs": True}
MUON = {**MATRICES, "optimizer.name": "muon", "optimizer.learning_rate": 6e-3, "optimizer.muon_learning_rate": 1e-2}
MUON_ZERO = {**MUON, "model.zero_init_outputs": True}
CAUTIOUS = {**MUON, "optimizer.cautious_decay": True}
EXPERTS = {"model.num_experts": 4, "model.num_experts_per_tok": 1}
RUNGS: dict[str, dict] = {
    "minimind": MINIMIND,
    "packed": PACKED,
    "packed, 4 rows a step": SMALL_STEPS,
    "adamw 3e-3": HIGHER,
    "linear to 0": LINEAR,
    "decay matrices 0.1": MATRICES,
    "zero outputs": ZERO,
    "muon": MUON,
    "muon, zero outputs": MUON_ZERO,
    "muon, cautious decay": CAUTIOUS,
    "muon, 2 rows a step": {**MUON, "training.batch_tokens": 2 * 340},
    "muon, 8 rows a step": {**MUON, "training.batch_tokens": 8 * 340},
    "muon, rates x 2": {**MUON, "optimizer.learning_rate": 1.2e-2, "optimizer.muon_learning_rate": 2e-2},
    "muon, rates x 0.5": {**MUON, "optimizer.learning_rate": 3e-3, "optimizer.muon_learning_rate": 5e-3},
    "muon, z-loss": {**MUON, "training.z_loss": 1e-4},
    "moe, no router gradient": {**MUON, **EXPERTS, "model.router_gradient": "none"},
    "moe, straight through": {**MUON, **EXPERTS},
    "moe, unnormalised": {**MUON, **EXPERTS, "model.norm_topk_prob": False},
    "moe, balance 0.01": {**MUON, **EXPERTS, "model.router_aux_loss_coef": 0.01},
    "moe, zero outputs": {**MUON_ZERO, **EXPERTS},
    "moe, 2 of 4 experts": {**MUON, **EXPERTS, "model.num_experts_per_tok": 2},
}


def flags(settings: dict) -> list[str]:
    """Settings as the arguments of `minimind`."""
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def used_share(train: str, tokenizer: str, seq_len: int) -> float:
    """Share of the positions of padded rows that are no padding, over the first 4,000 records."""
    from minimind_jax.data.tokenizer import Tokenizer

    encode = Tokenizer.load(tokenizer).encode
    with open(train, encoding="utf-8") as lines:
        lengths = [min(len(encode(json.loads(line)["text"])) + 2, seq_len) for line in itertools.islice(lines, 4000)]
    return sum(lengths) / len(lengths) / seq_len


def train(run: Path, settings: dict, steps: int, args: argparse.Namespace) -> None:
    """Trains a model of `args`' size from scratch."""
    sizes = {"hidden_size": args.hidden_size, "num_hidden_layers": args.layers}
    settings = {
        "run": run, "resume": "never", "tokenizer": args.tokenizer, "export_dtype": "float32",
        **{f"model.{key}": value for key, value in sizes.items()},
        "data.train": args.train, "data.val_fraction": 0.0, "data.seq_len": args.seq_len,
        "training.steps": steps, "training.eval_every": 0, "checkpoint.every": 0, "checkpoint.keep": 1,
        **settings,
    }  # fmt: skip
    subprocess.run(
        [sys.executable, "-m", "minimind_jax", "pretrain", *flags(settings)], check=True, stdout=subprocess.DEVNULL
    )


def steps_in(seconds: float, run: Path, settings: dict, args: argparse.Namespace) -> int:
    """Steps that a rung does in so many seconds, by the last 20 of 30 steps of a run of its own."""
    if not (run / "model").is_dir():
        shutil.rmtree(run, ignore_errors=True)  # of a try that was cut off
        train(run, {**settings, "training.log_every": 10}, 30, args)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    at = {row["step"]: row["seconds"] for row in rows if "seconds" in row}
    return round(seconds * 20 / (at[30] - at[10]))


def run_rung(name: str, settings: dict, args: argparse.Namespace) -> dict:
    """Trains a rung, or reads what it gave."""
    run = args.out / name.replace(", ", "-").replace(" ", "_")
    result_file = run / "result.json"
    if result_file.is_file():
        return json.loads(result_file.read_text())
    if args.seconds:
        steps = steps_in(args.seconds, run.with_name(f"{run.name}-speed"), settings, args)
    else:
        share = used_share(args.train, args.tokenizer, args.seq_len) if settings["data.packing"] == "pad" else 1.0
        steps = round(args.tokens / (settings["training.batch_tokens"] * share))
    started = time.perf_counter()
    train(run, settings, steps, args)
    seconds = time.perf_counter() - started
    measured = bits_per_byte(str(run), args.val, window=args.seq_len - 2)
    result = {"rung": name, "bits per byte": round(measured, 4), "steps": steps, "seconds": round(seconds, 1)}
    result_file.write_text(json.dumps(result) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/recipe"))
    parser.add_argument("--tokens", type=int, default=600_000)
    parser.add_argument("--seconds", type=float, help="of training steps for each rung, in place of --tokens")
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seq_len", type=int, default=340)
    parser.add_argument("--only", nargs="+", choices=RUNGS, default=list(RUNGS))
    args = parser.parse_args()
    for name in args.only:
        print(json.dumps(run_rung(name, RUNGS[name], args)), flush=True)


if __name__ == "__main__":
    main()

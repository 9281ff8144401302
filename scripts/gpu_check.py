"""The parts of `scripts/gpu_check.sh`, which says what it is: runs them one after another and writes what they find.

Each part is a command that prints JSON lines, or only succeeds; all of it goes to its log. No part stops the others,
and none begins when the time of all is up.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path
from typing import NamedTuple

from gpu_check_data import PICTURES
from gpu_check_table import write_table

from minimind_jax.model import attention, moe

HERE = Path(__file__).resolve().parent
WITH_GPU, WITHOUT = 15 * 60, 12 * 60  # seconds of all parts
PYTHONS = {  # variable -> modules of this Python that would do as well, what installs them
    "MINIMIND_CUDA_PYTHON": (("jax_cuda12_plugin", "jax_cuda13_plugin"), "cuda12"),
    "MINIMIND_TPU_PYTHON": (("libtpu",), "tpu"),
}
DONE, NO_TIME = ("passed", "failed", "out of time"), "no time was left"
RESULTS, LEAST = "results.jsonl", 10  # seconds with which it is worth to begin
BIG = ["--hidden_size", "768", "--seq_len", "2048", "--steps", "10"]  # the 63.9M model, or the mixture
SMALL_STEP = (  # that a busy machine compiles in a minute
    "--model.hidden_size 128 --model.num_hidden_layers 2 --model.num_attention_heads 2 --model.num_key_value_heads 1 "
    "--model.vocab_size 1024 --data.seq_len 256 --training.batch_tokens 2048 --training.accumulation_steps 1 "
    "--optimizer.name adamw"
).split()
RUN = HERE.parent / "runs" / "gpu_check_quickstart"


class Part(NamedTuple):
    """missing: why it cannot run here, if so. makes: a folder that is removed before it runs."""

    name: str
    limit: int
    command: list[str]
    missing: str = ""
    makes: Path | None = None


def script(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(HERE / name), *arguments]


def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *arguments]


def lacking(*modules: str) -> str:
    """What to do where this Python has not all of them; empty where it has."""
    missing = ", ".join(module for module in modules if importlib.util.find_spec(module) is None)
    return missing and f"no {missing}: {sys.executable} -m pip install -e '.[test]'"


def data_part(data: Path, limit: int) -> Part:
    return Part("data", limit, script("gpu_check_data.py", str(data)), makes=data)


def quickstart(name: str, limit: int, data: Path, *settings: str) -> Part:
    files = str(data / "texts.jsonl"), str(data / "chats.jsonl")
    command = ["sh", str(HERE / "quickstart.sh"), *files, "--name", RUN.name, *settings]
    return Part(name, limit, command, makes=RUN)  # or the pipeline would find itself done


def paths(kind: object, platform: str, usual: str) -> list[str]:
    """Of the code, those that a whole step can take there and `auto` does not: the plain formula holds all scores."""
    other = {path for path, own in attention.FUSED.items() if own != platform}
    return [path for path in typing.get_args(kind) if path not in {"auto", "reference", usual} | other]


def parts_with_gpu(args: argparse.Namespace, data: Path) -> list[Part]:
    """Their limits come to fifteen minutes at most; what is measured alone needs less than what is measured beside."""
    beside = ["--minimind", str(args.minimind), "--minimind_python", args.minimind_python] if args.minimind else []
    tokenizer = str(RUN / "tokenizer")
    both = [*beside, *(["--both"] if beside else [])]

    def train(name: str, limit: int, compute: dict, *more: str) -> Part:
        settings = ["--rows", str(args.rows), "--documents", "8", "--compute", json.dumps(compute)]
        return Part(name, limit, script("bench_train.py", *BIG, *settings, *more))

    gpu_tests = "tests/training/test_gpu.py"
    rollouts = ["--hidden_size", "768", "--cases", "full", "unequal", "--pairs", "2"]
    grpo = ["--sides", "ours", "--tokenizer", tokenizer, "--folder", str(data / "grpo"), "--hidden_size", "768"]
    pictures = ["--pictures", str(data / "pictures.parquet"), "--texts", str(data / "chats.jsonl")]
    pictures += ["--tokenizer", tokenizer, "--hidden_size", "768"]
    cases = [f"{how} {rows}" for how in ("greedy", "sampled") for rows in (1, 64, 256)]
    return [
        Part("GPU tests", 130, pytest(gpu_tests, "-k", "not deterministic"), lacking("pytest")),
        Part("paths", 75, script("bench_paths.py")),
        train("train", 110 if beside else 50, {}, *both),
        *(train(f"train, attention {path}", 35, {"attention": path}) for path in paths(attention.Path, "gpu", "cudnn")),
        train("train, mixture", 100 if beside else 50, {}, "--moe", *both),
        Part("generate", 75, script("bench_decode.py", "--hidden_size", "768", *beside, "--cases", *cases)),
        data_part(data, 15),
        quickstart("quickstart", 65, data),
        Part("resume to the bit", 40, pytest(gpu_tests, "-k", "deterministic"), lacking("pytest")),
        train("train, deterministic", 35, {"deterministic": True}),
        Part("rollout", 30, script("bench_rollout.py", *rollouts, *beside)),
        Part("GRPO step", 30, script("bench_grpo.py", *grpo)),
        Part("step that sees", 30, script("bench_vlm.py", *pictures), lacking(*PICTURES)),
        *(train(f"train, experts {path}", 30, {"experts": path}, "--moe") for path in paths(moe.Path, "gpu", "tiled")),
    ]


def compiler(variable: str) -> tuple[str, str]:
    """A Python with a platform's compiler, and what to do where there is none."""
    modules, extra = PYTHONS[variable]
    is_here = any(map(importlib.util.find_spec, modules))
    told = (
        f"no compiler: python3 -m venv .venv-{extra} && .venv-{extra}/bin/pip install -e '.[{extra}]', "
        f"then {variable}=.venv-{extra}/bin/python"
    )
    return os.environ.get(variable, sys.executable), "" if is_here or variable in os.environ else told


def parts_without(data: Path) -> list[Part]:
    def compiled(name: str, variable: str, limit: int, *arguments: str) -> Part:
        python, missing = compiler(variable)
        return Part(name, limit, [python, str(HERE / "bench_compile.py"), *arguments], missing)

    cuda, tpu = PYTHONS
    short = (
        "--pretrain.training.steps 20 --pretrain.samples.from_data 0 --pretrain.model.num_hidden_layers 1 "
        "--sft.training.steps 10 --sft.samples.from_data 0"
    ).split()
    fused = pytest("tests/model/test_attention_compiled.py", "-k", "one_gpu")
    splash = ["--splash", "--lengths", "2048", "--widths", "96", "--blocks", "512", "--steps", "--", *SMALL_STEP]
    return [
        Part("paths", 110, script("bench_paths.py", "--documents", "8")),
        Part("H100: kernels of attention", 110, fused, compiler(cuda)[1] or lacking("pytest")),
        compiled("H100: steps", cuda, 110, "--device", "h100", "--steps", "--", *SMALL_STEP),
        data_part(data, 40),
        quickstart("quickstart, shortened", 180, data, *short),
        *(
            compiled(f"{device}: splash and steps", tpu, 150, "--device", device, *splash)
            for device in ("tpu-v5e", "tpu-v6e", "tpu-v4")
        ),
    ]


def run_part(part: Part, limit: float, log: Path, environment: dict) -> tuple[dict, list[dict]]:
    """How it went, and the JSON lines it printed."""
    started = time.monotonic()
    with open(log, "w+", encoding="utf-8", errors="replace") as file:
        try:
            process = subprocess.Popen(
                part.command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=HERE.parent,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:  # a Python that is not there
            return {"part": part.name, "status": "failed", "seconds": 0, "limit": round(limit), "why": str(error)}, []
        try:
            status = "passed" if process.wait(timeout=limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            stop(process)
        file.seek(0)
        lines = file.read().splitlines()
    went = {"part": part.name, "status": status, "seconds": round(time.monotonic() - started), "limit": round(limit)}
    if status == "out of time" and limit < part.limit:
        went["cut"] = "by the time of all"
    if status == "failed":
        went["why"] = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
    whole = [line for line in lines if line.startswith('{"benchmark"') and line.endswith("}")]
    return went, [{"part": part.name, **json.loads(line)} for line in whole]


def stop(process: subprocess.Popen) -> None:
    """The processes that a part has started end with it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=5)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def list_parts(title: str, parts: list[Part], seconds: float) -> None:
    print(f"# {title}: {sum(part.limit for part in parts)} s at most; all of it ends after {seconds / 60:g} minutes")
    for part in parts:
        print(f"{part.limit:4} s  {part.name}{f'  ({part.missing})' if part.missing else ''}")


def chosen(parts: list[Part], names: list[str] | None, found: list[dict]) -> list[Part]:
    """Those that were asked for by name; without names all that have no result in `found`."""
    done = {line["part"] for line in found if line.get("status") in DONE and not line.get("cut")}
    return [part for part in parts if (part.name in names if names else part.name not in done)]


def read_results(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"))
    parser.add_argument("--minimind", type=Path, help="a checkout of jingyaogong/minimind; without it ours alone")
    parser.add_argument("--minimind_python", default=sys.executable)
    parser.add_argument("--rows", type=int, default=32, help="of 2,048 tokens in a step; 8 for a card of 24 GB")
    parser.add_argument("--minutes", type=float, help="after which all of it ends; 15 with a GPU, 12 without")
    parser.add_argument("--go_on", action="store_true", help="keep the results in --out; run what has none there")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="run these, as DRY_RUN=1 lists them")
    args = parser.parse_args()
    args.out, args.minimind = args.out.resolve(), args.minimind and args.minimind.resolve()
    return args


def has_gpu() -> bool:
    """Asked in a process of its own, or this one would hold the GPU's memory. What JAX says meanwhile is shown: it only
    warns of a GPU that it cannot use."""
    asked = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    answer = subprocess.run(asked, stdout=subprocess.PIPE, text=True)
    if answer.returncode:
        raise SystemExit("JAX finds no device, as it says above; JAX_PLATFORMS, if set, may name one that is not here")
    return answer.stdout.strip() == "gpu"


def run_parts(parts: list[Part], seconds: float, out: Path, kept: list[dict]) -> list[dict]:
    """How each went. Behind each part all results are written, behind those that are kept."""
    environment = {
        **os.environ,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share the card; each takes what it needs
        "PYTHONPATH": str(HERE.parent),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # of `minimind`
    }
    found, went = ([line for line in kept if ("status" in line) == is_end] for is_end in (False, True))
    (out / "logs").mkdir(parents=True, exist_ok=True)
    started, first = time.monotonic(), len(went)
    for part in parts:
        left = seconds - (time.monotonic() - started)
        if part.missing or left < LEAST:
            told, lines = {"part": part.name, "status": "skipped", "why": part.missing or NO_TIME}, []
        else:
            if part.makes:
                shutil.rmtree(part.makes, ignore_errors=True)
            told, lines = run_part(part, min(part.limit, left), out / "logs" / f"{part.name}.log", environment)
        print(json.dumps(told), flush=True)
        went.append(told)
        found += lines
        with open(out / RESULTS, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in [*found, *went])
        write_table(out / "results.md", found, went)
    print(f"{time.monotonic() - started:.0f} seconds in all; {out / RESULTS} and results.md")
    return went[first:]


def main() -> int:
    args = arguments()
    data = args.out / "gpu_check_data"  # which is removed: no name that a folder of the user's has
    former = read_results(args.out / RESULTS) if args.go_on else []
    kinds = {"with a GPU": (parts_with_gpu(args, data), WITH_GPU), "without one": (parts_without(data), WITHOUT)}
    known = dict.fromkeys(part.name for parts, _ in kinds.values() for part in parts)
    if unknown := [name for name in args.parts or () if name not in known]:
        print(f"no part is called {', '.join(unknown)}; there are: {'; '.join(known)}", file=sys.stderr)
        return 2
    for title, (parts, seconds) in kinds.items():
        seconds = seconds if args.minutes is None else 60 * args.minutes
        kinds[title] = chosen(parts, args.parts, former), seconds
    if os.environ.get("DRY_RUN"):
        for title, (parts, seconds) in kinds.items():
            list_parts(title, parts, seconds)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with the part that runs
    on_gpu = has_gpu()
    print("a GPU is here" if on_gpu else "no GPU is here: what can be compiled is compiled", flush=True)
    if on_gpu and not args.minimind:
        print("MiniMind is not measured: give --minimind CHECKOUT, and --minimind_python with CUDA's torch", flush=True)
    parts, seconds = kinds["with a GPU" if on_gpu else "without one"]
    anew = {part.name for part in parts}
    went = run_parts(parts, seconds, args.out, [line for line in former if line["part"] not in anew])
    if any(told.get("why") == NO_TIME or told.get("cut") for told in went):
        print("there was no time for all of it: the same with --go_on runs what is left")
    return int(any(told["status"] == "failed" for told in went))


if __name__ == "__main__":
    sys.exit(main())

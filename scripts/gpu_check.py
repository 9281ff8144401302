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

from gpu_check_table import write_table

from minimind_jax.model import attention, moe

HERE = Path(__file__).resolve().parent
WITH_GPU, WITHOUT = 15 * 60, 12 * 60  # seconds of all parts
PYTHONS = {  # variable -> modules of this Python that would do as well, what installs them
    "MINIMIND_CUDA_PYTHON": (("jax_cuda12_plugin", "jax_cuda13_plugin"), "cuda12"),
    "MINIMIND_TPU_PYTHON": (("libtpu",), "tpu"),
}
BIG = ["--hidden_size", "768", "--rows", "32", "--seq_len", "2048", "--steps", "10"]  # the 63.9M model, or the mixture
SMALL_STEP = (  # that a busy machine compiles in a minute
    "--model.hidden_size 128 --model.num_hidden_layers 2 --model.num_attention_heads 2 --model.num_key_value_heads 1 "
    "--model.vocab_size 1024 --data.seq_len 256 --training.batch_tokens 2048 --training.accumulation_steps 1 "
    "--optimizer.name adamw"
).split()
RUN = HERE.parent / "runs" / "gpu_check_quickstart"


class Part(NamedTuple):
    """missing: why it cannot run here, if so."""

    name: str
    limit: int
    command: list[str]
    missing: str = ""


def script(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(HERE / name), *arguments]


def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *arguments]


def data_part(data: Path) -> Part:
    return Part("data", 40, script("gpu_check_data.py", str(data)))


def quickstart(data: Path, *settings: str) -> list[str]:
    files = str(data / "texts.jsonl"), str(data / "chats.jsonl")
    return ["sh", str(HERE / "quickstart.sh"), *files, "--name", RUN.name, *settings]


def paths(kind: object, platform: str) -> list[str]:
    """Of the code, those beside `auto` that a whole step can take there: the plain formula holds all scores."""
    other = {path for path, own in attention.FUSED.items() if own != platform}
    return [path for path in typing.get_args(kind) if path not in {"auto", "reference"} | other]


def parts_with_gpu(args: argparse.Namespace, data: Path) -> list[Part]:
    beside = ["--minimind", str(args.minimind), "--minimind_python", args.minimind_python] if args.minimind else []
    tokenizer = str(RUN / "tokenizer")
    both = [*beside, *(["--both"] if beside else [])]

    def train(name: str, limit: int, compute: dict, *more: str) -> Part:
        settings = ["--documents", "8", "--compute", json.dumps(compute)]
        return Part(name, limit, script("bench_train.py", *BIG, *settings, *more))

    gpu_tests = "tests/training/test_gpu.py"
    rollouts = ["--hidden_size", "768", "--cases", "full", "unequal", "--pairs", "2"]
    grpo = ["--sides", "ours", "--tokenizer", tokenizer, "--folder", str(data / "grpo"), "--hidden_size", "768"]
    pictures = ["--tokenizer", tokenizer, "--pictures", str(data / "pictures.parquet"), "--hidden_size", "768"]
    cases = [f"{how} {rows}" for how in ("greedy", "sampled") for rows in (1, 64, 256)]
    return [
        Part("GPU tests", 180, pytest(gpu_tests, "-k", "not deterministic")),
        Part("paths", 90, script("bench_paths.py")),
        train("train", 150 if beside else 60, {}, *both),
        *(train(f"train, attention {path}", 50, {"attention": path}) for path in paths(attention.Path, "gpu")),
        train("train, mixture", 150 if beside else 60, {}, "--moe", *both),
        Part("generate", 120, script("bench_decode.py", "--hidden_size", "768", *beside, "--cases", *cases)),
        data_part(data),
        Part("quickstart", 120, quickstart(data)),
        Part("resume to the bit", 60, pytest(gpu_tests, "-k", "deterministic")),
        train("train, deterministic", 60, {"deterministic": True}),
        Part("rollout", 60, script("bench_rollout.py", *rollouts, *beside)),
        Part("GRPO step", 60, script("bench_grpo.py", *grpo)),
        Part("step that sees", 60, script("bench_vlm.py", *pictures, "--texts", str(data / "chats.jsonl"))),
        *(train(f"train, experts {path}", 50, {"experts": path}, "--moe") for path in paths(moe.Path, "gpu")),
    ]


def compiler(variable: str) -> tuple[str, str]:
    """A Python with a platform's compiler, and what to do where there is none."""
    modules, extra = PYTHONS[variable]
    is_here = any(map(importlib.util.find_spec, modules))
    told = f"no compiler: pip install 'minimind-jax[{extra}]' in an environment of its own, and name its Python in "
    return os.environ.get(variable, sys.executable), "" if is_here or variable in os.environ else told + variable


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
        Part("H100: kernels of attention", 110, fused, compiler(cuda)[1]),
        compiled("H100: steps", cuda, 110, "--device", "h100", "--steps", "--", *SMALL_STEP),
        data_part(data),
        Part("quickstart, shortened", 180, quickstart(data, *short)),
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


def list_parts(title: str, parts: list[Part], seconds: int) -> None:
    print(f"# {title}; all of it ends after {seconds // 60} minutes")
    for part in parts:
        print(f"{part.limit:4} s  {part.name}{f'  ({part.missing})' if part.missing else ''}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"))
    parser.add_argument("--minimind", type=Path, help="a checkout of jingyaogong/minimind; without it ours alone")
    parser.add_argument("--minimind_python", default=sys.executable)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with the part that runs
    out = args.out.resolve()
    args.minimind = args.minimind and args.minimind.resolve()
    data = out / "gpu_check_data"  # which is removed: no name that a folder of the user's has
    on_gpu, without = parts_with_gpu(args, data), parts_without(data)
    if os.environ.get("DRY_RUN"):
        list_parts("with a GPU", on_gpu, WITH_GPU)
        list_parts("without one", without, WITHOUT)
        return 0
    # In a process of its own, or this one would hold the GPU's memory.
    backend = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.default_backend())"], capture_output=True, text=True
    ).stdout.strip()
    parts, total = (on_gpu, WITH_GPU) if backend == "gpu" else (without, WITHOUT)
    print("a GPU is here" if backend == "gpu" else "no GPU is here: what can be compiled is compiled", flush=True)
    if backend == "gpu" and not args.minimind:
        print("MiniMind is not measured: give --minimind CHECKOUT, and --minimind_python with CUDA's torch", flush=True)
    for former in (data, RUN):  # or the pipeline would find itself done
        shutil.rmtree(former, ignore_errors=True)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share the card; each takes what it needs
        "PYTHONPATH": str(HERE.parent),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # of `minimind`
    }
    started, went, found = time.monotonic(), [], []
    for part in parts:
        left = total - (time.monotonic() - started)
        if part.missing or left < 10:
            told, lines = {"part": part.name, "status": "skipped", "why": part.missing or "no time was left"}, []
        else:
            told, lines = run_part(part, min(part.limit, left), out / "logs" / f"{part.name}.log", environment)
        print(json.dumps(told), flush=True)
        went.append(told)
        found += lines
        with open(out / "results.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in [*found, *went])
        write_table(out / "results.md", found, went)
    print(f"{time.monotonic() - started:.0f} seconds in all; {out}/results.jsonl and results.md")
    return int(any(told["status"] == "failed" for told in went))


if __name__ == "__main__":
    sys.exit(main())

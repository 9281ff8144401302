"""What the benchmarks share: sides that live in processes of their own and are asked in turn, and the line they print.

Machines drift, and two frameworks in one process share its threads. So each side is a process that stays up, the two
are asked A B A B ..., and what is quoted is the median of the ratios pair by pair.
"""

import datetime
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

HERE = Path(__file__).resolve().parent
START = """
import runpy, sys
from minimind_jax.huge_pages import use_huge_pages
use_huge_pages(keep=%s)
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def use_one_core() -> None:
    """This process, and those it starts, on one core, and their seconds those of the processor instead of the clock's:
    what a machine can tell that is busy with other things. Needs Linux."""
    Side.processor_time = True
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ["OMP_NUM_THREADS"] = "1"


class Side:
    """A process that answers JSON lines."""

    processor_time = False

    def __init__(self, command: list[str], cwd: Path | None = None):
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=cwd, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def ask(self, **request: Any) -> dict[str, Any]:
        started = self._processor_seconds()
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{' '.join(self._process.args[:3])} ended:\n{self._process.stderr.read()[-3000:]}")
        spent = {"seconds": self._processor_seconds() - started} if self.processor_time else {}
        return {**json.loads(answer), **spent}

    def _processor_seconds(self) -> float:
        if not self.processor_time:
            return 0.0
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def ours(script: str, settings: dict, keep: bool = False) -> Side:
    """A benchmark's own script, started again to serve our side; keep: memory, as the commands that train."""
    return Side([sys.executable, "-c", START % keep, str(HERE / script), "--serve", json.dumps(settings)])


def minimind(checkout: Path, python: str, settings: dict) -> Side:
    """MiniMind's side, in its checkout."""
    if not (checkout / "model" / "model_minimind.py").is_file():
        raise SystemExit(f"{checkout} is not a checkout of jingyaogong/minimind: it has no model/model_minimind.py")
    return Side([python, str(HERE / "bench_minimind.py"), json.dumps(settings)], cwd=checkout)


def serve(handlers: dict[str, Callable[[int], dict]]) -> None:
    """Answers {name: count} requests on the standard input until it ends."""
    answers = os.dup(1)
    os.dup2(2, 1)
    for line in sys.stdin:
        ((name, count),) = json.loads(line).items()
        os.write(answers, (json.dumps(handlers[name](count)) + "\n").encode())


def made_once(make: Callable[[str], Callable[[int], dict]], name: str) -> Callable[[int], dict]:
    """A handler of `serve` that is made when it is first asked."""
    made = functools.cache(make)
    return lambda count: made(name)(count)


def interleave(sides: dict[str, Side], pairs: int, **request: int) -> tuple[dict[str, float], dict[str, list[dict]]]:
    """Seconds of each side's first request, for 1, in which it compiles; and the sides' answers, asked in turn `pairs`
    times, after one more request to each that does not count."""
    first = {}
    for name, side in sides.items():
        first[name] = round(side.ask(**dict.fromkeys(request, 1))["seconds"], 1)
        side.ask(**request)
    answers = {name: [] for name in sides}
    for _ in range(pairs):
        for name, side in sides.items():
            answers[name].append(side.ask(**request))
    return first, answers


def rates(answers: dict[str, list[dict]], key: str) -> dict[str, Any]:
    """Median rate of each side in `key` per second, and the median of ours / theirs pair by pair."""
    per_second = {name: [a[key] / a["seconds"] for a in found] for name, found in answers.items()}
    result: dict[str, Any] = {name: round(statistics.median(values), 1) for name, values in per_second.items()}
    for name in per_second:
        if name != "ours":
            pairs = zip(per_second["ours"], per_second[name], strict=True)
            result[f"ours / {name}"] = [round(a / b, 3) for a, b in pairs]
            result[f"median ours / {name}"] = round(statistics.median(result[f"ours / {name}"]), 3)
    return result


def print_result(benchmark: str, settings: dict, **results: Any) -> None:
    """One JSON line: what was measured, where and when."""
    device = jax.devices()[0]
    machine = f"{os.cpu_count()} cores, {platform.machine()}" if device.platform == "cpu" else device.device_kind
    about = {"date": str(datetime.date.today()), "machine": machine, "jax": jax.__version__}
    print(json.dumps({"benchmark": benchmark, **about, **settings, **results}), flush=True)

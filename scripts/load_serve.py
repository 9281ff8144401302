"""Load on `minimind serve`: many clients at once, and whether each gets what he would get alone.

    python scripts/load_serve.py --model FOLDER                     # 64 clients for 2 minutes, then half of them leave
    python scripts/load_serve.py --random --seconds 20 --clients 16

--random makes a model of 29.0M random weights with the tokenizer of --tokenizer. Each of the requests, of mixed lengths
and with seeds, is first asked alone, one after the other; then all clients ask at the same time, and every answer is
compared with that; then half of the clients leave most answers unread at a random place. Prints one JSON line; exits
with 1 where an answer differs, a request fails, a row stays busy or memory grows.
"""

import argparse
import asyncio
import datetime
import json
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

MOST_GROWTH = 1.05  # of the server's memory, from a quarter of the time to its end


class Server:
    """The server in a process of its own; log: the last of its lines."""

    def __init__(self, model: str, slots: int):
        command = [sys.executable, "-m", "minimind_jax", "serve", "--model", f"model={model}", "--port", "0"]
        self.process = subprocess.Popen([*command, "--slots", str(slots)], stderr=subprocess.PIPE, text=True)
        self.log: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        while not (found := re.search(r"serving model at (http\S+)", "".join(self.log[:20]))):
            if self.process.poll() is not None:
                raise SystemExit("".join(self.log))
            time.sleep(0.1)
        self.url, begin = found[1], time.monotonic()
        while httpx.get(f"{self.url}/health").status_code != 200:
            time.sleep(0.1)
        self.seconds_to_warm = time.monotonic() - begin

    def _read(self) -> None:
        for line in self.process.stderr:
            self.log = [*self.log[-50:], line]

    def memory(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss

    def busy(self) -> float:
        """Requests that are answered or wait."""
        text = httpx.get(f"{self.url}/metrics").text
        return sum(float(value) for value in re.findall(r"^vllm:num_requests_\w+\{.*\} (\S+)$", text, re.M))


def random_model(folder: Path, tokenizer: str) -> str:
    import jax

    from minimind_jax.convert.hf import save_hf
    from minimind_jax.data.tokenizer import Tokenizer
    from minimind_jax.model.config import ModelConfig
    from minimind_jax.model.transformer import LanguageModel

    config = ModelConfig(vocab_size=6400, hidden_size=512, num_hidden_layers=8, max_position_embeddings=2048)
    words = Tokenizer.load(tokenizer)
    return str(
        save_hf(folder / "random", config, jax.jit(LanguageModel(config).init)(jax.random.key(0)), words, "float32")
    )


def requests(count: int, longest: int) -> list[dict[str, Any]]:
    """Prompts of 5 to 100 words and answers of 16 to `longest` tokens, every one with a seed of its own."""
    rng = random.Random(1)
    words = "the cat sat on a mat while dogs run over green hills and birds sing 你好 世界 很 高兴".split()
    return [
        {
            "messages": [{"role": "user", "content": " ".join(rng.choices(words, k=int(5 * 20 ** rng.random())))}],
            "max_tokens": int(16 * (longest / 16) ** rng.random()),
            "ignore_eos": True,
            "seed": seed,
            "temperature": 0.85,
            "top_k": 50,
            "top_p": 0.85,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for seed in range(count)
    ]


class Run:
    """What came of many requests: texts that differ from those in `alone`, errors, tokens, seconds to the first."""

    def __init__(self, url: str, asked: list[dict[str, Any]], alone: dict[int, str] | None = None):
        self._url, self._asked, self.alone = url, asked, {} if alone is None else alone
        self._collects = alone is None
        self.first: list[float] = []
        self.tokens = self.answers = self.left = 0
        self.wrong: list[str] = []

    async def ask(self, http: httpx.AsyncClient, number: int, leave_after: int = 10**9) -> None:
        """leave_after: chunks, after which the connection is closed."""
        begin, text, chunks = time.monotonic(), "", 0
        async with http.stream("POST", f"{self._url}/v1/chat/completions", json=self._asked[number]) as response:
            if response.status_code != 200:
                self.wrong.append(f"{response.status_code} {await response.aread()!r:.200}")
                return
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    self.wrong.append(str(chunk["error"]))
                    return
                delta = chunk["choices"][0]["delta"].get("content") if chunk["choices"] else ""
                if delta and not text:
                    self.first.append(time.monotonic() - begin)
                text += delta or ""
                if chunk.get("usage"):
                    self.tokens += chunk["usage"]["completion_tokens"]
                chunks += 1
                if chunks > leave_after:
                    self.left += 1
                    return
        self.answers += 1
        if self._collects:
            self.alone[number] = text
        elif self.alone[number] != text:
            self.wrong.append(f"request {number} alone: {self.alone[number]!r:.80}, among others: {text!r:.80}")

    async def client(self, seconds: float, leaves: bool, rng: random.Random) -> None:
        deadline = time.monotonic() + seconds
        async with httpx.AsyncClient(timeout=300) as http:
            while time.monotonic() < deadline:
                leave_after = rng.randrange(12) if leaves and rng.random() < 0.7 else 10**9
                await self.ask(http, rng.randrange(len(self._asked)), leave_after)


async def one_by_one(run: Run, count: int) -> float:
    begin = time.monotonic()
    async with httpx.AsyncClient(timeout=300) as http:
        for number in range(count):
            await run.ask(http, number)
    return time.monotonic() - begin


async def together(run: Run, clients: int, seconds: float, leaving: int, server: Server) -> tuple[float, list[int]]:
    """Seconds until the last answer, and the server's memory every half second."""
    memory, begin = [], time.monotonic()

    async def watch() -> None:
        while True:
            memory.append(server.memory())
            await asyncio.sleep(0.5)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(run.client(seconds, n < leaving, random.Random(n)) for n in range(clients)))
    watching.cancel()
    return time.monotonic() - begin, memory


def quantiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100)
    return {"p50": round(cuts[49], 3), "p99": round(cuts[98], 3)}


def say(words: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {words}", file=sys.stderr, flush=True)


def measure(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    asked = requests(options.clients, options.longest)
    warm = Run(server.url, asked)
    asyncio.run(one_by_one(warm, min(8, len(asked))))
    say("each request alone")
    alone = Run(server.url, asked)
    seconds = asyncio.run(one_by_one(alone, len(asked)))
    single = alone.tokens / seconds
    say(f"{single:.1f} tokens/s; {options.clients} clients at once")
    crowd = Run(server.url, asked, alone.alone)
    seconds, memory = asyncio.run(together(crowd, options.clients, options.seconds, 0, server))
    many = crowd.tokens / seconds
    say(f"{many:.1f} tokens/s; half of them leave")
    leaving = Run(server.url, asked, alone.alone)
    asyncio.run(together(leaving, options.clients, options.seconds / 4, options.clients // 2, server))
    time.sleep(1.0)
    growth = max(memory[len(memory) // 2 :]) / max(memory[: len(memory) // 4 + 1])
    wrong = [*alone.wrong, *crowd.wrong, *leaving.wrong]
    return {
        "clients": options.clients,
        "slots": options.slots,
        "answers": crowd.answers,
        "wrong": len(wrong),
        "first_wrong": wrong[:3],
        "one client, tokens/s": round(single, 1),
        "all clients, tokens/s": round(many, 1),
        "ratio": round(many / single, 2),
        "first token alone, s": quantiles(alone.first),
        "first token among all, s": quantiles(crowd.first),
        "memory grows to": round(growth, 3),
        "left unread": leaving.left,
        "busy afterwards": server.busy(),
        "seconds to warm": round(server.seconds_to_warm, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--tokenizer", default="runs/demo/tokenizer")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--longest", type=int, default=192)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(
            random_model(Path(folder), options.tokenizer) if options.random else options.model, options.slots
        )
        try:
            found = measure(server, options)
        finally:
            server.process.terminate()
            server.process.wait(30)
    found["machine"] = f"{platform.machine()}, {psutil.cpu_count()} CPUs, {datetime.date.today()}"
    print(json.dumps(found, ensure_ascii=False))
    return int(bool(found["wrong"] or found["busy afterwards"] or found["memory grows to"] > MOST_GROWTH))


if __name__ == "__main__":
    sys.exit(main())

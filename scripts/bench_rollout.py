"""Speed of rollouts: the policy's writer and MiniMind's rollout engine, asked in turn.

    python scripts/bench_rollout.py --minimind CHECKOUT

Random weights and prompts: 16 prompts, 4 completions of each, at temperature 1 from all words; log-probabilities come
with the tokens. MiniMind's `TorchRolloutEngine` repeats each prompt, goes on to the longest completion and reads
everything once more for the log-probabilities; its temperature is 0.8 with top-k 50 and top-p 0.85, which it does not
let choose. `full`: all completions have the same length; `unequal`: from 16 tokens to that, and only tokens that were
asked for count. `agent`: episodes of three turns with a tool, all at once here and one by one there; no turn ends early
and each is taken for the same call. Prints one JSON line a case: tokens of completions, or episodes, per second of each
side, ours / MiniMind's pair by pair, and the seconds of each side's first rollout, in which it compiles.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import sys
import time
from pathlib import Path

import bench_common as bench
import jax
from bench_requests import RESULT, agent_messages, rollout

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.config.sections import MeshConfig
from minimind_jax.data.documents import encode_prompt
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.request import Answer, Request
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.rl.environment import SingleTurn
from minimind_jax.rl.episode import Task, Turn
from minimind_jax.rl.play import Start, play
from minimind_jax.rl.policy import LocalPolicy
from minimind_jax.sharding import init_params, make_mesh

CASES = ["full", "unequal", "agent"]


def serve_ours(settings: dict) -> None:
    model, mesh = LanguageModel(ModelConfig(hidden_size=settings["hidden_size"])), make_mesh(MeshConfig())
    params, sequences = init_params(model, jax.random.key(0), mesh), settings["prompts"] * settings["completions"]
    tokenizer = Tokenizer.load(settings["tokenizer"]) if settings["tokenizer"] else None
    turns, prompt_len = (3, 512) if "agent" in settings["cases"] else (1, settings["prompt_len"])
    context = prompt_len + turns * settings["new_tokens"]
    policy, calls = LocalPolicy(model, tokenizer, mesh, slots=sequences, context=context), itertools.count()

    def write(case: str, count: int) -> dict:
        call, answers = next(calls), []
        prompts, lengths = rollout(settings, case, count, call)
        started = time.perf_counter()
        writer = policy.load(params)
        for number, new in enumerate(lengths):
            sampling = SamplingConfig(
                new, temperature=1.0, top_k=0, top_p=1.0, ignore_eos=True, seed=call * sequences + number
            )
            answers.append(writer.submit(Request(tuple(prompts[number // settings["completions"]]), sampling)))
        while writer.busy:
            writer.step(patient=True)
        return {"seconds": time.perf_counter() - started, "tokens": sum(len(answer.tokens) for answer in answers)}

    def play_agents(count: int) -> dict:
        call, starts = next(calls), []
        for number in range(sequences):
            messages, tools = agent_messages(number // settings["completions"])
            task = Task("bench", messages, tools, {})
            ids = encode_prompt(tokenizer, messages, tools, False)
            starts.append(Start(number // settings["completions"], task, ids, False, call * sequences + number))
        sampling = SamplingConfig(count, temperature=1.0, top_k=0, top_p=1.0)
        started = time.perf_counter()
        writer = Talkative(policy.load(params), tokenizer.end_ids[0])
        played = play(writer, starts, SameResult(), tokenizer, sampling=sampling, turns=turns, seq_len=context)
        assert all(len(episode.turns) == 3 for episode in played)
        return {"seconds": time.perf_counter() - started, "episodes": len(played)}

    handlers = {case: functools.partial(write, case) for case in settings["cases"]}
    bench.serve({**handlers, "agent": play_agents})


class Talkative:
    """The engine, where each turn has all its tokens, and the last of them ends it."""

    def __init__(self, engine: Engine, end_id: int):
        self._engine, self._end, self.cancel = engine, end_id, engine.cancel

    def submit(self, request: Request) -> Answer:
        sampling = dataclasses.replace(request.sampling, ignore_eos=True)
        return self._engine.submit(dataclasses.replace(request, sampling=sampling, stop_ids=()))

    def step(self, patient: bool = False) -> list[Answer]:
        answers = self._engine.step(patient)
        for answer in answers:
            if answer.finish_reason == "length":
                answer.finish_reason, answer.ends = "stop", (self._end,)
                answer.tokens[-1] = answer.tokens[-1]._replace(id=self._end)
        return answers


class SameResult(SingleTurn):
    """Takes each turn for the same call."""

    def step(self, state: None, turn: Turn) -> list[dict]:
        return [{"role": "tool", "content": RESULT}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minimind", type=Path, help="a checkout of jingyaogong/minimind; without it ours alone")
    parser.add_argument("--minimind_python", default=sys.executable)
    parser.add_argument(
        "--one_core", action="store_true", help="count processor seconds on one core: for a busy machine"
    )
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--completions", type=int, default=4)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--singly", type=int, default=4, help="episodes that MiniMind plays in a turn of agent")
    parser.add_argument("--prompt_len", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve_ours(json.loads(args.serve))
    if args.one_core:
        bench.use_one_core()
    names = ("hidden_size", "prompts", "completions", "prompt_len", "new_tokens", "one_core", "cases", "singly")
    settings = {name: getattr(args, name) for name in names} | {"layers": 8, "moe": False}
    settings["tokenizer"] = str(args.minimind / "model") if args.minimind else ""
    sides = {"ours": bench.ours("bench_rollout.py", settings)}
    if args.minimind:
        sides["minimind"] = bench.minimind(args.minimind, args.minimind_python, settings)
    for case in args.cases:
        first, answers = bench.interleave(sides, args.pairs, **{case: args.new_tokens})
        what = "episodes" if case == "agent" else "tokens"
        rates = bench.rates(answers, what)
        shown = {**settings, "cases": case}
        bench.print_result("rollout", shown, **{"first seconds": first, f"{what} per second": rates})
    for side in sides.values():
        side.close()


if __name__ == "__main__":
    main()

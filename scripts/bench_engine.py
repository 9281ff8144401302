"""What the engine adds to the device's time, and what a second turn waits for its first token.

    python scripts/bench_engine.py --tokenizer FOLDER

Random weights and prompts. Prints one JSON line: the share of a step that the host takes with all rows at work (drawn
with top-k and top-p, a stop string looked for, a token a step), and the seconds to the first token of a prompt of 300
tokens, of what follows its answer of 60 with 30 more, and the second by the first, pair by pair.
"""

import argparse
import dataclasses
import json
import time

import jax
import numpy as np

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.inference import decode
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.request import Request
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.transformer import LanguageModel

DRAWN = SamplingConfig(64, temperature=0.85, top_k=50, top_p=0.85, stop=("never said",), ignore_eos=True)
GREEDY = SamplingConfig(60, temperature=0.0, ignore_eos=True)


def host_share(engine: Engine, rows: int, random: np.random.Generator) -> float:
    """Of the time in which all rows make tokens, the part that the compiled function does not take."""
    own, seconds = decode.make, []

    def timed(*args, **settings):
        started = time.perf_counter()
        made = jax.block_until_ready(own(*args, **settings))
        seconds.append(time.perf_counter() - started)
        return made

    prompts = random.integers(3, 6400, (rows, 16)).tolist()
    answers = [engine.submit(Request(tuple(p), dataclasses.replace(DRAWN, seed=n))) for n, p in enumerate(prompts)]
    while not all(answer.tokens for answer in answers):
        engine.step()
    decode.make = timed
    started = time.perf_counter()
    while engine.busy:
        for answer in engine.step():
            answer.news()
    decode.make = own
    return 1 - sum(seconds) / (time.perf_counter() - started)


def first_token(engine: Engine, prompt: list[int]) -> tuple[float, list[int]]:
    """Seconds until it is there, and the whole answer."""
    started, pieces = time.perf_counter(), engine.stream(prompt, GREEDY)
    first = next(pieces)
    seconds = time.perf_counter() - started
    return seconds, [token.id for piece in (first, *pieces) for token in piece.tokens]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a folder with MiniMind's tokenizer")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=7)
    args = parser.parse_args()

    model, random = LanguageModel(ModelConfig(hidden_size=args.hidden_size)), np.random.default_rng(0)
    engine = Engine(
        model, jax.jit(model.init)(jax.random.key(0)), Tokenizer.load(args.tokenizer), slots=args.rows, context=512
    )
    engine.warm_up()
    shares, turns = [host_share(engine, args.rows, random) for _ in range(3)], []
    for _ in range(args.pairs):
        prompt = random.integers(3, 6400, 300).tolist()
        first, answer = first_token(engine, prompt)
        second, _ = first_token(engine, [*prompt, *answer, *random.integers(3, 6400, 30).tolist()])
        turns.append((first, second, second / first))
    found = {"first turn": 0, "second turn": 1, "second / first": 2}
    told = {name: [round(turn[place], 3) for turn in turns] for name, place in found.items()}
    print(json.dumps({"rows": args.rows, "host share": [round(share, 4) for share in shares], **told}))


if __name__ == "__main__":
    main()

"""Speed of answers that are bound to a form, beside free ones of the same engine, asked in turn.

    python scripts/bench_constrained.py --tokenizer shared/data/minimind-tokenizer --pairs 7

The 29.0M model with random weights draws at random: lists of objects in JSON, and as many tokens without a form. Prints
a JSON line for 1 and for 16 rows: new tokens per second of both and bound / free, pair by pair; then the microseconds
that a mask takes, with the given vocabulary and with one of 151,936 words.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import jax
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.inference.constrain import Grammars, tokens_of
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.grammar import json_schema
from minimind_jax.inference.request import Request
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.transformer import LanguageModel

FORMS = {
    "texts": {"type": "array", "items": {"type": "string"}},
    "objects": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"label": {"enum": ["billing", "bug", "other"]}, "why": {"type": "string", "maxLength": 30}},
            "required": ["label", "why"],
            "additionalProperties": False,
        },
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--hidden_size", type=int, default=512)
    settings = parser.parse_args()

    tokenizer = Tokenizer.load(settings.tokenizer)
    grammars = Grammars(tokenizer)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=settings.hidden_size, num_hidden_layers=8)
    model = LanguageModel(config)
    engine = Engine(model, model.init(jax.random.key(0)), tokenizer, slots=16)
    for rows in (1, 16):
        speeds = {False: [], True: []}
        for _ in range(settings.pairs + 1):  # the first compiles
            for bound in speeds:
                form = json_schema(FORMS["objects"]) if bound else None
                speeds[bound].append(speed(engine, grammars, form, rows, settings.tokens))
        free, bound = (speeds[side][1:] for side in (False, True))
        ratios = [round(b / f, 3) for b, f in zip(bound, free, strict=True)]
        line = {"rows": rows, "free": statistics.median(free), "bound": statistics.median(bound)}
        print(json.dumps({**line, "bound / free": statistics.median(ratios), "pairs": ratios}), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for each in (grammars, Grammars(large_tokenizer(Path(folder)))):
            print(json.dumps({name: microseconds(each, schema) for name, schema in FORMS.items()}))


def speed(engine: Engine, grammars: Grammars, form, rows: int, count: int) -> float:
    """New tokens per second of so many answers at once."""
    prompts = [engine.encode(f"Question {row}: " + "a cat " * 20) for row in range(rows)]
    sampling = SamplingConfig(max_new_tokens=count, ignore_eos=True, temperature=0.85, top_k=50, top_p=0.85)
    started = time.perf_counter()
    answers = [
        engine.submit(Request(tuple(prompt), sampling, constraint=form and grammars.constraint(form, count)))
        for prompt in prompts
    ]
    while engine.busy:
        engine.step(patient=rows > 1)
    return round(sum(len(answer.tokens) for answer in answers) / (time.perf_counter() - started), 1)


def microseconds(grammars: Grammars, schema: dict) -> dict[str, float]:
    """Of CPU for a mask and for what follows from its token, median and 99th in 100, over answers drawn at random."""
    seconds, rng = [], random.Random(0)
    for _ in range(20):
        constraint = grammars.constraint(json_schema(schema))
        for _ in range(200):
            started = time.thread_time()
            mask = constraint.mask()
            taken = time.thread_time() - started
            token = rng.choice(tokens_of(mask))
            started = time.thread_time()
            constraint.accept(token)
            seconds.append(taken + time.thread_time() - started)
            if constraint.ended:
                break
    cuts = statistics.quantiles(seconds, n=100)
    return {"median": round(cuts[49] * 1e6), "99 %": round(cuts[98] * 1e6)}


def large_tokenizer(folder: Path) -> Tokenizer:
    """151,936 words of random letters and Chinese characters, as many as Qwen's tokenizer has."""
    rng, words = random.Random(0), dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    while len(words) < 151_934:
        text = "".join(rng.choices("etaoinshrdlu cmfwyp,.:{}\"'0123", k=rng.randint(2, 9)))
        text = (
            text if rng.random() < 0.8 else "".join(chr(rng.randint(0x4E00, 0x9FFF)) for _ in range(rng.randint(1, 3)))
        )
        words[spell.pre_tokenize_str(text)[0][0]] = None
    backend = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


if __name__ == "__main__":
    main()

"""A tiny model that plays, and one that says what a test has it say: the engine itself, with every token decided."""

import dataclasses

import jax
import numpy as np

from minimind_jax.data.documents import encode_prompt
from minimind_jax.inference.engine import Engine
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.rl.episode import Task
from minimind_jax.rl.play import Start

CALCULATOR = {"type": "function", "function": {"name": "calculate_math", "description": "calculates"}}


def tiny(tokenizer, max_position_embeddings=4096, **options):
    """An engine with a random model."""
    config = ModelConfig(
        vocab_size=-(-tokenizer.vocab_size // 128) * 128,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=max_position_embeddings,
        initializer_range=0.3,
    )
    model = LanguageModel(config)
    return Engine(model, model.init(jax.random.key(0)), **{"context": 512, "slots": 8, **options})


class Script:
    """Tokens that an answer is made to have."""

    cut = ended = False

    def __init__(self, ids, vocab_size):
        self._ids, self._words = list(ids), -(-vocab_size // 32)

    def mask(self):
        words = np.zeros(self._words, np.uint32)
        words[self._ids[0] // 32] = 1 << self._ids[0] % 32
        return words

    def accept(self, token):
        assert token == self._ids.pop(0)


class Told:
    """An engine that says what `lines(prompt ids)` gives, token by token; where that is None, what it likes."""

    def __init__(self, engine, lines):
        self.engine, self.lines, self.answers = engine, lines, []
        self.step, self.cancel = engine.step, engine.cancel

    def submit(self, request):
        if (ids := self.lines(list(request.prompt))) is not None:
            request = dataclasses.replace(request, constraint=Script(ids, self.engine.model.config.vocab_size))
        self.answers.append(self.engine.submit(request))
        return self.answers[-1]


def start_of(tokenizer, messages, tools=None, *, group=0, thinking=False, seed=0, **fields):
    task = Task("talk.jsonl:1", messages, tools, fields)
    return Start(group, task, encode_prompt(tokenizer, messages, tools, thinking), thinking, seed)


def asks(text):
    return [{"role": "user", "content": text}]

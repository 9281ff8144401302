"""Answers of the engine against the plain network, one row at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.errors import UserError
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.request import Busy, Request
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.transformer import LanguageModel

CONTEXT = 384
CONFIG = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=160,
    max_position_embeddings=CONTEXT,
)  # fmt: skip
MODEL = LanguageModel(CONFIG)
GREEDY = SamplingConfig(max_new_tokens=12, temperature=0.0)
DRAWN = SamplingConfig(max_new_tokens=12, temperature=0.9, top_k=20, seed=5)


@pytest.fixture(scope="module")
def params():
    params = jax.jit(MODEL.init)(jax.random.key(3))
    params["embed"]["embedding"] = params["embed"]["embedding"] * 20  # likelier tokens differ from prompt to prompt
    return params


@pytest.fixture(scope="module")
def check_greedy(params):
    """Whether an answer's tokens are the likeliest of a whole pass over it, and their log-probabilities its own."""
    run = jax.jit(lambda tokens: jax.nn.log_softmax(MODEL.apply(params, tokens[None])[0][0]))

    def check(prompt, answer):
        ids = [*prompt, *answer.ids]
        logprobs = np.array(run(jnp.array(ids + [0] * (CONTEXT - len(ids)))))[len(prompt) - 1 : len(ids) - 1]
        assert answer.ids == logprobs.argmax(-1).tolist()
        np.testing.assert_allclose(answer.logprobs, logprobs.max(-1), atol=1e-4)

    return check


def prompts_of(count, seed=0, longest=120):
    random = np.random.default_rng(seed)
    return [random.integers(3, 160, length).tolist() for length in random.integers(1, longest, count)]


def finish(engine, *answers):
    while any(answer.finish_reason is None for answer in answers):
        engine.step()
    return answers


def test_greedy_answers_to_prompts_of_unequal_length_are_the_networks(params, check_greedy):
    prompts = prompts_of(32)
    for engine in (Engine(MODEL, params), Engine(MODEL, params, slots=5, context=200, held=2)):
        for prompt, answer in zip(prompts, engine.generate(prompts, GREEDY), strict=True):
            check_greedy(prompt, answer)
            assert len(answer.ids) == 12 and answer.finish_reason == "length"
        assert not engine.busy and engine.running == engine.waiting == 0


def test_a_seeded_answer_is_the_same_alone_and_among_others(params):
    prompts = prompts_of(20, seed=1)
    engine = Engine(MODEL, params, slots=7, context=200)
    together = engine.generate(prompts, DRAWN)
    for n in (0, 6, 19):
        own = dataclasses.replace(DRAWN, seed=DRAWN.seed + n)
        alone = [piece.tokens for piece in Engine(MODEL, params).stream(prompts[n], own)]
        assert [token.id for tokens in alone for token in tokens] == together[n].ids


def test_a_second_turn_reads_only_what_is_new(params, check_greedy):
    engine = Engine(MODEL, params, slots=2, context=300)
    [prompt] = prompts_of(1, longest=100)
    [first] = engine.generate([prompt], GREEDY)
    longer = [*prompt, *first.ids, 9, 10, 11]
    [second] = engine.generate([longer], GREEDY)
    assert second.cached_tokens == engine.counts["cached_tokens"] == len(prompt) + 11
    check_greedy(longer, second)


def test_cancelling_frees_the_row_at_once_and_leaves_the_others_alone(params, check_greedy):
    engine = Engine(MODEL, params, slots=2, context=300, queue=2)
    prompts = prompts_of(4, seed=2)
    ask = [Request(tuple(prompt), dataclasses.replace(GREEDY, max_new_tokens=100)) for prompt in prompts]
    first, second = (engine.submit(request) for request in ask[:2])
    while not first.tokens:
        engine.step()
    third, fourth = (engine.submit(request) for request in ask[2:])
    with pytest.raises(Busy):
        engine.submit(ask[0])
    engine.cancel(first)
    engine.cancel(fourth)
    assert first.finish_reason == fourth.finish_reason == "cancelled" and engine.waiting == 1
    finish(engine, second, third)
    check_greedy(prompts[1], second)
    check_greedy(prompts[2], third)
    assert len(second.ids) == len(third.ids) == 100 and not engine.busy


def test_the_cache_grows_with_an_answer(params, check_greedy):
    engine = Engine(MODEL, params)
    [answer] = engine.generate([[5, 6, 7]], SamplingConfig(max_new_tokens=380, temperature=0.0, ignore_eos=True))
    assert len(answer.ids) == 380
    check_greedy([5, 6, 7], answer)


def test_an_end_in_a_step_of_many_tokens_ends_there(params, check_greedy):
    [prompt] = prompts_of(1, seed=4)
    [whole] = Engine(MODEL, params).generate([prompt], GREEDY)
    ids, end = whole.ids, whole.ids[5]
    [answer] = Engine(MODEL, params, eos_ids=[end]).generate([prompt], GREEDY)
    assert answer.ids == ids[: ids.index(end) + 1] and answer.finish_reason == "stop" and answer.stop_reason is None
    engine = Engine(MODEL, params, eos_ids=[])
    answer = engine.submit(Request(tuple(prompt), GREEDY, stop_ids=(end,)))
    finish(engine, answer)
    assert answer.ids == ids[: ids.index(end) + 1] and answer.stop_reason == end


def test_what_cannot_be_answered_is_refused(params):
    engine = Engine(MODEL, params)
    for prompt, message in (([], "empty"), ([160], "160"), ([1] * 380, "exceed"), ("text", "without a tokenizer")):
        with pytest.raises(UserError, match=message):
            engine.generate([prompt], GREEDY)
    with pytest.raises(UserError, match="stop strings"):
        engine.generate([[1]], dataclasses.replace(GREEDY, stop=("x",)))
    assert not engine.busy

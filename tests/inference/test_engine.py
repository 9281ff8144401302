"""Answers of the engine against the plain network, one row at a time."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.errors import UserError
from minimind_jax.inference import decode
from minimind_jax.inference import engine as engine_module
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.programs import Limits
from minimind_jax.inference.request import Busy, Request
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.transformer import LanguageModel

CONTEXT = 384
CONFIG = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=160,
    max_position_embeddings=CONTEXT, eos_token_id=None,
    initializer_range=0.3,  # else answers repeat the last token, whatever was before
)  # fmt: skip
MODEL = LanguageModel(CONFIG)
GREEDY = SamplingConfig(max_new_tokens=12, temperature=0.0)
DRAWN = SamplingConfig(max_new_tokens=12, temperature=0.9, top_k=20, seed=5)
# Two sizes, of which each is compiled once.
MANY, FEW = {"slots": 5, "context": 200}, {"slots": 2, "context": 300}


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(3))


@pytest.fixture(scope="module")
def check_greedy(params):
    """Whether an answer's tokens are the likeliest of a whole pass over it, and their log-probabilities its own."""
    run = jax.jit(lambda tokens: jax.nn.log_softmax(MODEL.apply(params, tokens[None])[0][0]))

    def check(prompt, answer):
        ids = [*prompt, *answer.ids]
        if not answer.ids:
            return
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
    for engine in (Engine(MODEL, params), Engine(MODEL, params, **MANY)):
        for prompt, answer in zip(prompts, engine.generate(prompts, GREEDY), strict=True):
            check_greedy(prompt, answer)
            assert len(answer.ids) == 12 and answer.finish_reason == "length"
        assert not engine.busy and engine.running == engine.waiting == 0


def test_a_seeded_answer_is_the_same_alone_and_among_others(params):
    prompts = prompts_of(20, seed=1)
    engine = Engine(MODEL, params, **MANY)
    together = engine.generate(prompts, DRAWN)
    for n in (0, 6, 19):
        own = dataclasses.replace(DRAWN, seed=DRAWN.seed + n)
        alone = [piece.tokens for piece in Engine(MODEL, params).stream(prompts[n], own)]
        assert [token.id for tokens in alone for token in tokens] == together[n].ids


def test_a_second_turn_reads_only_what_is_new(params, check_greedy):
    engine = Engine(MODEL, params, **FEW)
    [prompt] = prompts_of(1, longest=100)
    [first] = engine.generate([prompt], GREEDY)
    longer = [*prompt, *first.ids, 9, 10, 11]
    [second] = engine.generate([longer], GREEDY)
    assert second.cached_tokens == engine.counts["cached_tokens"] == len(prompt) + 11
    check_greedy(longer, second)


def test_cancelling_frees_the_row_at_once_and_leaves_the_others_alone(params, check_greedy):
    engine = Engine(MODEL, params, **FEW, queue=2)
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


def test_the_cache_has_room_for_a_long_prompt_that_passes_others(params, check_greedy):
    engine = Engine(MODEL, params, slots=3)
    random = np.random.default_rng(1)
    same, long = random.integers(3, 160, 40).tolist(), random.integers(3, 160, 340).tolist()
    prompts = [same, same, same, long]  # the second and third wait for the first
    for prompt, answer in zip(prompts, engine.generate(prompts, GREEDY), strict=True):
        check_greedy(prompt, answer)


def test_streams_beside_each_other_lose_nothing(params):
    long, short = (SamplingConfig(max_new_tokens=n, temperature=0.0, ignore_eos=True) for n in (40, 5))
    engine = Engine(MODEL, params, **FEW)
    first, second = engine.stream([5, 6, 7], long), engine.stream([8, 9], short)
    ids = [token.id for token in next(second).tokens]
    assert sum(len(piece.tokens) for piece in first) == 40  # the second has ended meanwhile
    assert [*ids, *(token.id for piece in second for token in piece.tokens)] == engine.generate([[8, 9]], short)[0].ids


def test_a_row_that_ends_hands_on_its_place_at_once(params, check_greedy):
    """Not at the end of a call that makes many tokens of the others."""
    engine = Engine(MODEL, params, **FEW)
    short, long = (SamplingConfig(count, temperature=0.0, ignore_eos=True) for count in (4, 30))
    first, other, waiting = (
        engine.submit(Request((n, n + 1, n + 2), s)) for n, s in ((5, short), (9, long), (3, short))
    )
    while not first.finish_reason:
        engine.step(patient=True)
    assert len(other.tokens) == 4 and engine.waiting == 1
    engine.step(patient=True)
    assert engine.waiting == 0 and engine.running == 2
    finish(engine, other, waiting)
    for answer in (first, other, waiting):
        check_greedy(list(answer.request.prompt), answer)


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
    for more in ({"stop_ids": (2**40,)}, {"stop_ids": (-1,)}, {"logit_bias": ((160, 1.0),)},
                 {"logit_bias": ((5, float("nan")),)}, {"logit_bias": ((5, float("inf")),)}):  # fmt: skip
        with pytest.raises(UserError, match=next(iter(more))):
            engine.submit(Request((1,), GREEDY, **more))
    with pytest.raises(UserError, match="stop strings"):
        engine.generate([[1]], dataclasses.replace(GREEDY, stop=("x",)))
    assert not engine.busy


class Multiples:
    """Only multiples of a number, and so many of them."""

    def __init__(self, of, count):
        self.of, self.left, self.asked, self.cut = of, count, 0, False

    def mask(self):
        self.asked += 1
        allowed = np.arange(160) % self.of == 0
        return np.packbits(allowed, bitorder="little").view(np.uint32)

    def accept(self, token):
        assert token % self.of == 0
        self.left -= 1

    @property
    def ended(self):
        return self.left == 0


def test_constrained_answers_hold_what_is_allowed_beside_free_ones(params, check_greedy):
    engine = Engine(MODEL, params, **MANY)
    prompts = prompts_of(3, seed=6)
    rules = [Multiples(7, 5), None, Multiples(3, 50)]
    answers = [
        engine.submit(Request(tuple(prompt), GREEDY, constraint=rule))
        for prompt, rule in zip(prompts, rules, strict=True)
    ]
    finish(engine, *answers)
    for prompt, answer, rule in zip(prompts, answers, rules, strict=True):
        if rule is None:
            check_greedy(prompt, answer)
            continue
        logits = np.array(MODEL.apply(params, jnp.array([[*prompt, *answer.ids]]))[0][0])[len(prompt) - 1 : -1]
        logits[:, np.arange(160) % rule.of != 0] = -np.inf
        assert answer.ids == logits.argmax(-1).tolist() and rule.asked == len(answer.ids)
    assert [len(answer.ids) for answer in answers] == [5, 12, 12]
    assert [answer.finish_reason for answer in answers] == ["stop", "length", "length"]


class Faulty(Multiples):
    """Fails at its third question, or allows nothing then."""

    def __init__(self, of, count, at):
        super().__init__(of, count)
        self.at = at

    def mask(self):
        if self.at == "mask" and self.asked == 2:
            raise UserError("no mask")
        return super().mask() * (self.at != "nothing" or self.asked < 3)

    def accept(self, token):
        super().accept(token)
        if self.at == "accept" and self.asked == 3:
            raise UserError("not accepted")


@pytest.mark.parametrize("at", ["mask", "accept", "nothing"])
def test_a_constraint_that_fails_ends_its_own_answer_alone(params, check_greedy, at):
    engine = Engine(MODEL, params, **MANY)
    free, bad = (engine.submit(Request((5, 6, 7), GREEDY, constraint=rule)) for rule in (None, Faulty(1, 50, at)))
    finish(engine, free, bad)
    assert (
        bad.finish_reason == "error" and "no" in str(bad.error) and len(bad.ids) <= 3 and free.finish_reason == "length"
    )
    check_greedy([5, 6, 7], free)
    assert not engine.busy and engine.running == 0
    with pytest.raises(UserError, match="no"):
        list(engine.stream([5, 6], GREEDY, constraint=Faulty(1, 50, at)))
    with pytest.raises(UserError, match="no"):
        list(engine.answers([Request((5, 6), GREEDY, constraint=Faulty(1, 50, at))]))
    check_greedy([5, 6], *engine.generate([[5, 6]], GREEDY))


def test_the_likeliest_tokens_are_told_where_they_are_asked_for(params):
    engine = Engine(MODEL, params)
    first, second = (
        engine.submit(Request((5, 6), GREEDY, logit_bias=bias, top_logprobs=count))
        for bias, count in ((((9, 100.0),), 3), ((), 0))
    )
    finish(engine, first, second)
    assert first.ids == [9] * 12 and 9 not in second.ids
    logprobs = np.array(jax.nn.log_softmax(MODEL.apply(params, jnp.array([[5, 6, *first.ids]]))[0][0]))[1:-1]
    for token, row in zip(first.tokens, logprobs, strict=True):
        assert [id for id, _ in token.top] == np.argsort(-row)[:3].tolist()
        np.testing.assert_allclose([logprob for _, logprob in token.top], np.sort(row)[:-4:-1], atol=1e-4)
        assert token.logprob == pytest.approx(row[9], abs=1e-4)
    assert all(token.top == () for token in second.tokens)


def test_other_weights_forget_what_was_read(params):
    engine, [prompt] = Engine(MODEL, params, **FEW), prompts_of(1, seed=7)
    [before] = engine.generate([prompt], GREEDY)
    other = jax.tree.map(lambda leaf: leaf * 1.01, params)
    open_answer = engine.submit(Request(tuple(prompt), GREEDY))
    with pytest.raises(ValueError, match="in work"):
        engine.load(other)
    engine.cancel(open_answer)
    engine.load(other)
    [after] = engine.generate([prompt], GREEDY)
    [expected] = Engine(MODEL, other).generate([prompt], GREEDY)
    assert after.cached_tokens == 0 and after.ids == expected.ids
    assert after.logprobs == pytest.approx(expected.logprobs, abs=1e-5) and after.logprobs != before.logprobs


def test_long_prompts_are_read_in_parts_between_the_steps_of_others(params, check_greedy, monkeypatch):
    monkeypatch.setattr(engine_module, "LATENCY", 0)
    engine = Engine(MODEL, params, **FEW)
    engine._programs.limits = Limits(32, 16, (16,))
    short = Request((5, 6, 7), dataclasses.replace(GREEDY, max_new_tokens=100))
    long = Request(tuple(np.random.default_rng(8).integers(3, 160, 250).tolist()), GREEDY)
    first = engine.submit(short)
    engine.step()
    second = engine.submit(long)
    grew = []
    while not second.tokens:
        grew.append(first in engine.step())
    assert len(grew) > 2 * 250 // 16 and not any(a is b is False for a, b in itertools.pairwise(grew))
    finish(engine, first, second)
    check_greedy(short.prompt, first)
    check_greedy(long.prompt, second)


def test_an_interrupted_call_leaves_an_engine_that_works(params, check_greedy, monkeypatch):
    engine, [prompt] = Engine(MODEL, params, **FEW), prompts_of(1, seed=9)
    answer = engine.submit(Request(tuple(prompt), GREEDY))
    engine.step()

    def interrupted(model, params, cache, *_, **__):
        jax.tree.map(lambda leaf: leaf.delete(), cache)  # as a program does that is given it
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decode, "make", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert answer.finish_reason == "cancelled" and not engine.busy
    check_greedy(prompt, *engine.generate([prompt], GREEDY))


def test_an_interrupt_while_rows_are_given_leaves_an_engine_that_works(params, check_greedy, monkeypatch):
    engine, prompts = Engine(MODEL, params, **FEW), prompts_of(3, seed=9)
    answers = [engine.submit(Request(tuple(prompt), GREEDY)) for prompt in prompts]

    def interrupted():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._scheduler, "_tick", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert {answer.finish_reason for answer in answers} == {"cancelled"} and not engine.busy and engine.waiting == 0
    for prompt, answer in zip(prompts, engine.generate(prompts, GREEDY), strict=True):
        check_greedy(prompt, answer)


# Any order of requests, steps and cancellations -----------------------------------------------------------------------

STEMS = [np.random.default_rng(n).integers(3, 160, 40).tolist() for n in range(3)]
PROMPTS = st.builds(lambda stem, cut, rest: [*STEMS[stem][:cut], *rest] or [1], st.integers(0, 2), st.integers(0, 40),
                    st.lists(st.integers(3, 159), max_size=30))  # fmt: skip
REQUESTS = st.tuples(st.just("submit"), PROMPTS, st.integers(1, 20), st.booleans())
ACTIONS = st.one_of(
    REQUESTS, st.tuples(st.just("step"), st.integers(1, 4)), st.tuples(st.just("cancel"), st.integers(0))
)


@pytest.fixture(scope="module")
def shared(params):
    """One for all examples: rows hold what earlier ones left."""
    engine = Engine(MODEL, params, slots=3, context=100)
    engine._programs.limits = Limits(32, 8, (8, 16))
    return engine


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(actions=st.lists(ACTIONS, min_size=1, max_size=30))
def test_answers_are_the_networks_whatever_else_happens(shared, check_greedy, actions):
    answers, cancelled = [], []
    for name, *values in actions:
        if name == "submit":
            prompt, count, is_constrained = values
            sampling = dataclasses.replace(GREEDY, max_new_tokens=count)
            rule = Multiples(1, 99) if is_constrained else None
            answers.append(shared.submit(Request(tuple(prompt), sampling, constraint=rule)))
        elif name == "step":
            for _ in range(values[0]):
                shared.step(patient=values[0] == 3)
        elif answers:
            cancelled.append(answers[values[0] % len(answers)])
            shared.cancel(cancelled[-1])
    finish(shared, *answers)
    assert not shared.busy and shared.running == shared.waiting == 0 and shared.cache_usage == 0
    for answer in answers:
        count = answer.request.sampling.max_new_tokens
        assert (answer.finish_reason == "length" and len(answer.ids) == count) or answer in cancelled
        check_greedy(answer.request.prompt, answer)

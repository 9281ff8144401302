"""Sampling against transformers' own processors in float64, for every row's own settings; and draws that follow the
distribution they say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_jax.inference import sampling
from minimind_jax.inference.sampling import NO_TOKEN, Counts, SamplingConfig, SamplingValues

sample = jax.jit(sampling.sample)
ROWS = 8
SMALL, MEDIUM, LARGE = 97, 1500, 20_000  # without candidates, with 64, with 1,024 too and 64 found in blocks


def random_logits(seed, vocab_size, scale=3.0, rows=ROWS):
    return np.random.default_rng(seed).normal(0, scale, (rows, vocab_size)).astype(np.float32)


def repeated(array, times):
    return np.repeat(array, times, axis=0)


def packed(allowed_BV):
    """The bits in llguidance's layout, made by NumPy's own packing."""
    rows, V = allowed_BV.shape
    padded = np.zeros((rows, -(-V // 32) * 32), bool)
    padded[:, :V] = allowed_BV
    return np.packbits(padded, axis=1, bitorder="little").view("<u4")


def reference(logits_V, config, prompt=(), answer=(), bias=(), allowed_V=None):
    """Log-probabilities (V,) of the distribution that is drawn from, float64, by transformers' processors; the
    presence and frequency penalties by OpenAI's formula."""
    hf = pytest.importorskip("transformers", reason="the reference")
    torch = pytest.importorskip("torch", reason="compared with transformers, which needs torch")
    ids = torch.as_tensor([[*prompt, *answer]], dtype=torch.int64)
    scores = torch.as_tensor(logits_V[None].astype(np.float64))
    if bias:
        scores = hf.SequenceBiasLogitsProcessor({(token,): float(value) for token, value in bias})(ids, scores)
    if config.repetition_penalty != 1 and ids.numel():
        scores = hf.RepetitionPenaltyLogitsProcessor(config.repetition_penalty)(ids, scores)
    counts = torch.as_tensor(np.bincount(answer, minlength=len(logits_V)) if len(answer) else np.zeros(len(logits_V)))
    scores = scores - config.frequency_penalty * counts - config.presence_penalty * (counts > 0)
    if allowed_V is not None:
        scores = scores.masked_fill(~torch.as_tensor(allowed_V), -torch.inf)
    if config.temperature > 0:
        scores = hf.TemperatureLogitsWarper(float(config.temperature))(ids, scores)
        if 0 < config.top_k < len(logits_V):
            scores = hf.TopKLogitsWarper(config.top_k)(ids, scores)
        if config.top_p < 1:
            scores = hf.TopPLogitsWarper(config.top_p)(ids, scores)
        if config.min_p > 0:
            scores = hf.MinPLogitsWarper(config.min_p)(ids, scores)
    return torch.log_softmax(scores, -1)[0].numpy()


configs = st.builds(
    SamplingConfig,
    temperature=st.sampled_from([0.0, 0.3, 0.85, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 50, 63, 64, 65, 300, 5000]),
    top_p=st.sampled_from([0.01, 0.3, 0.85, 0.95, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.3]),
    presence_penalty=st.sampled_from([-1.5, 0.0, 2.0]),
    frequency_penalty=st.sampled_from([-0.5, 0.0, 1.0]),
)


@pytest.mark.parametrize("vocab_size", [SMALL, MEDIUM, LARGE])
def test_every_row_draws_from_transformers_distribution_for_its_own_settings(vocab_size):
    """Tokens lie where it has any probability, and their log-probability is its own; nothing compiles again."""
    draws, programs = 6, set()

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(
        st.integers(0, 2**32 - 1),
        st.sampled_from([0.5, 1.5, 4.0]),
        st.lists(configs, min_size=ROWS, max_size=ROWS),
        st.lists(st.sampled_from(["", "bias", "mask", "bias mask"]), min_size=ROWS, max_size=ROWS),
    )
    def check(seed, scale, chosen, extras):
        rng = np.random.default_rng(seed)
        logits = random_logits(seed, vocab_size, scale)
        prompts, answers = rng.integers(0, vocab_size, (ROWS, 30)), rng.integers(0, vocab_size, (ROWS, 20))
        answers[:, :5] = answers[:, 5:10]  # some twice
        in_prompt, in_answer = np.zeros((ROWS, vocab_size), bool), np.zeros((ROWS, vocab_size), np.int32)
        np.put_along_axis(in_prompt, prompts, True, axis=1)
        for row in range(ROWS):
            in_answer[row] = np.bincount(answers[row], minlength=vocab_size)
        biases = [
            list(zip(set(answers[row, 5:9].tolist()), (6.0, -4.0, 2.5, -100.0), strict=False))
            if "bias" in extra
            else []
            for row, extra in enumerate(extras)
        ]
        allowed = np.array([(rng.random(vocab_size) < 0.4) | ("mask" not in extra) for extra in extras])
        values = SamplingValues.of(chosen, biases)
        bits = packed(allowed)
        bits[allowed.all(axis=1)] = 0xFFFFFFFF
        drawn = sample(
            *(repeated(logits, draws), np.tile(np.arange(draws, dtype=np.int32), ROWS)),
            jax.tree.map(lambda column: repeated(column, draws), values),
            Counts(repeated(in_prompt, draws), repeated(in_answer, draws)),
            repeated(bits, draws),
        )
        programs.add(sample._cache_size())
        tokens, logprobs, sampled_logprobs = (np.asarray(x).reshape(ROWS, draws) for x in drawn[:3])
        for row, config in enumerate(chosen):
            given_V = (prompts[row], answers[row], biases[row], allowed[row])
            expected_V = reference(logits[row], config, *given_V)
            raw_V = reference(logits[row], SamplingConfig(temperature=1, top_p=1.0))
            np.testing.assert_allclose(logprobs[row], raw_V[tokens[row]], atol=1e-4)
            if config.temperature == 0:
                assert (tokens[row] == expected_V.argmax()).all() and (sampled_logprobs[row] == 0).all()
            elif is_settled(logits[row], config, given_V):
                np.testing.assert_allclose(
                    sampled_logprobs[row], expected_V[tokens[row]], atol=2e-4, err_msg=str(config)
                )

    check()
    assert len(programs) == 1


def is_settled(logits_V, config, given_V):
    """Is top-p so far from a sum of probabilities that float32 cannot fall on its other side?"""
    near = [min(1.0, config.top_p * factor) for factor in (1 - 1e-5, 1 + 1e-5)]
    found = [reference(logits_V, dataclasses.replace(config, top_p=top_p), *given_V) for top_p in near]
    return config.top_p == 1 or (np.isfinite(found[0]) == np.isfinite(found[1])).all()


def kept(config, logits, rows=1000):
    """The tokens that come in many draws of one row of logits."""
    many = np.broadcast_to(logits, (rows, logits.shape[-1]))
    return set(
        np.asarray(sample(many, np.arange(rows, dtype=np.int32), SamplingValues.of([config] * rows)).token_B).tolist()
    )


@pytest.mark.parametrize("vocab_size", [SMALL, MEDIUM])
@pytest.mark.parametrize("k", [3, 50, 64])
def test_tokens_tied_at_rank_k_all_stay_as_in_transformers(vocab_size, k):
    logits = np.full((1, vocab_size), -1.0, np.float32)
    logits[0, ::2] = np.where(np.arange(len(logits[0, ::2])) < k - 2, 1.5, 1.0)[: len(logits[0, ::2])]
    logits[0, 80:] = -1.0 if vocab_size == SMALL else logits[0, 80:]
    config = SamplingConfig(temperature=2.0, top_k=k, top_p=1.0)
    expected = set(np.flatnonzero(np.isfinite(reference(logits[0], config))).tolist())
    drawn = kept(config, logits)
    assert drawn <= expected and len(drawn) > min(k, len(expected) - 1) * 0.9


def test_tokens_as_likely_as_the_one_that_crosses_top_p_stay():
    logits = np.log(np.array([[0.5, 0.2, 0.2, 0.06, 0.04]], np.float32))
    assert kept(SamplingConfig(temperature=1, top_p=0.6), logits) == {0, 1, 2}
    assert kept(SamplingConfig(temperature=1, top_p=0.95), logits) == {0, 1, 2, 3}


@pytest.mark.parametrize("vocab_size", [SMALL, MEDIUM, LARGE])
def test_what_a_row_gets_depends_on_no_other_row(vocab_size):
    """Whatever the others make run: greedy ones, cuts among few candidates, among more and in the whole vocabulary; and
    where both draw from all tokens, which goes a way of its own."""
    others = [
        SamplingConfig(temperature=1, top_p=1.0, seed=4),
        SamplingConfig(temperature=0),
        SamplingConfig(temperature=1, top_k=50, top_p=0.9),
        SamplingConfig(temperature=2, top_p=0.999),
        SamplingConfig(temperature=1, top_p=1.0, repetition_penalty=1.5),
    ]
    logits = random_logits(3, vocab_size, 1.5, rows=2)
    positions = np.array([7, 8], np.int32)
    for config in (*others, *(SamplingConfig(temperature=0.7, top_k=k, top_p=1.0, seed=5) for k in (0, 900))):
        results = []
        for other in others:
            values = SamplingValues.of([config, other])
            counts = Counts(np.zeros((2, vocab_size), bool), np.eye(2, vocab_size, dtype=np.int32))
            found = sample(logits, positions, values, counts)
            results.append(tuple(float(column[0]) for column in found[:3]))
        assert len(set(results)) == 1, config


@pytest.mark.parametrize(
    "vocab_size, config",
    [
        (SMALL, SamplingConfig(temperature=1.0, top_p=1.0)),
        (SMALL, SamplingConfig(temperature=0.9, top_p=0.8)),
        (MEDIUM, SamplingConfig(temperature=1.3, top_p=1.0)),
        (MEDIUM, SamplingConfig(temperature=0.85, top_k=50, top_p=0.85)),
        (MEDIUM, SamplingConfig(temperature=0.6, top_p=0.9)),
        (MEDIUM, SamplingConfig(temperature=1.5, top_p=1.0, min_p=0.02)),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(vocab_size, config):
    logits = random_logits(10, vocab_size, scale=1.5, rows=1)
    rows, calls = 500, 24
    many = np.broadcast_to(logits, (rows, vocab_size))
    tokens = []
    for call in range(calls):
        positions = np.arange(call * rows, (call + 1) * rows, dtype=np.int32)
        values = SamplingValues.of([config] * rows)
        tokens.append(np.asarray(sample(many, positions, values).token_B))
    probs = np.exp(reference(logits[0], config))
    observed, expected = np.bincount(np.concatenate(tokens), minlength=vocab_size), probs * rows * calls
    assert observed[probs == 0].sum() == 0
    rare = expected < 10
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    chi_squared, freedom = ((observed - expected) ** 2 / expected).sum(), len(expected) - 1
    assert chi_squared < freedom + 5 * np.sqrt(2 * freedom)


def test_a_temperature_next_to_0_takes_the_likeliest():
    logits = random_logits(15, MEDIUM, scale=30)
    for config in (SamplingConfig(temperature=1e-45, top_p=1.0), SamplingConfig(temperature=1e-30, top_k=50)):
        found = sample(logits, np.zeros(ROWS, np.int32), SamplingValues.of([config] * ROWS))
        np.testing.assert_array_equal(found.token_B, logits.argmax(-1))
        assert (np.asarray(found.sampled_logprob_B) == 0).all()


@pytest.mark.parametrize("uniform", [0.0, 0.5, float(np.nextafter(np.float32(1), np.float32(0)))])
def test_the_ends_of_the_unit_interval_draw_a_token_that_is_allowed(uniform):
    logits = random_logits(11, 600)
    logits[:, :200] = logits[:, -200:] = -np.inf
    token, total = map(np.asarray, sampling.draw(jnp.asarray(logits), jnp.full(ROWS, uniform, jnp.float32)))
    assert np.isfinite(logits[np.arange(ROWS), token]).all()
    np.testing.assert_allclose(total, np.log(np.exp(logits.astype(np.float64)).sum(-1)), rtol=1e-5)


def test_a_draw_depends_on_seed_and_position_alone():
    logits = np.broadcast_to(random_logits(12, SMALL, rows=1), (4, SMALL))
    config = SamplingConfig(temperature=1.5, top_p=1.0, seed=5)
    rows = [dataclasses.replace(config, seed=5 + row) for row in range(4)]
    batch = sample(logits, np.full(4, 9, np.int32), SamplingValues.of(rows)).token_B
    assert sample(logits[:1], np.full(1, 9, np.int32), SamplingValues.of(rows[2:3])).token_B[0] == batch[2]
    many, positions = np.broadcast_to(logits[:1], (300, SMALL)), np.arange(300, dtype=np.int32)
    assert len(set(np.asarray(sample(many, positions, SamplingValues.of([config] * 300)).token_B).tolist())) > 10


def test_the_likeliest_tokens_are_of_the_models_own_logits_and_only_where_asked():
    logits = random_logits(13, MEDIUM)
    values = SamplingValues.of([SamplingConfig(top_k=5)] * ROWS, [[(3, 50.0)]] * ROWS, [0] * 7 + [20])
    found = sample(logits, np.zeros(ROWS, np.int32), values)
    expected = reference(logits[7], SamplingConfig(temperature=1, top_p=1.0))
    best = np.argsort(-expected)[:20]
    np.testing.assert_array_equal(found.top_ids_BT[7], best)
    np.testing.assert_allclose(found.top_logprobs_BT[7], expected[best], atol=1e-5)
    assert (np.asarray(found.top_logprobs_BT[:7]) == 0).all()
    assert (np.asarray(found.token_B) == 3).all()  # the bias decided
    few = sample(logits[:, :7], np.zeros(ROWS, np.int32), values)
    np.testing.assert_array_equal(few.top_ids_BT[7], np.argsort(-logits[7, :7]))


def test_the_one_allowed_token_is_taken_whatever_else_is_set():
    logits = random_logits(14, MEDIUM)
    allowed = np.zeros((ROWS, MEDIUM), bool)
    allowed[:, 1499] = True
    for config in (SamplingConfig(temperature=0), SamplingConfig(top_k=50), SamplingConfig(temperature=1, top_p=1.0)):
        found = sample(logits, np.zeros(ROWS, np.int32), SamplingValues.of([config] * ROWS), None, packed(allowed))
        assert (np.asarray(found.token_B) == 1499).all() and (np.asarray(found.sampled_logprob_B) == 0).all()


def test_tokens_are_counted_in_their_rows():
    counts = Counts.none(3, SMALL).with_tokens(jnp.array([[5, NO_TOKEN, 7], [5, NO_TOKEN, 8]]))
    expected = np.zeros((3, SMALL), int)
    expected[0, 5], expected[2, 7], expected[2, 8] = 2, 1, 1
    np.testing.assert_array_equal(counts.answer_BV, expected)
    assert not counts.prompt_BV.any()
    asks = [SamplingConfig(), SamplingConfig(presence_penalty=0.1), SamplingConfig(repetition_penalty=1.1)]
    np.testing.assert_array_equal(SamplingValues.of(asks).counts_B, [False, True, True])


@pytest.mark.parametrize(
    "field, value",
    [
        ("max_new_tokens", 0),
        ("temperature", -1.0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", float("nan")),
        ("stop", ("",)),
    ],
)
def test_a_setting_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is .*it must be"):
        SamplingConfig(**{field: value})

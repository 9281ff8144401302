"""Sampling: each step against transformers' own, exact truncation, and draws that follow the distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minimind_jax.inference import sampling
from minimind_jax.inference.sampling import SamplingConfig, SamplingValues, row_keys

draw, keep_min_p, keep_top_k, keep_top_p, penalize_repetition, process, sample = map(
    jax.jit,
    (
        sampling.draw,
        sampling.keep_min_p,
        sampling.keep_top_k,
        sampling.keep_top_p,
        sampling.penalize_repetition,
        sampling.process,
        sampling.sample,
    ),
)
ROWS, VOCABULARY = 6, 97


def random_logits(seed, scale=3.0):
    return np.random.default_rng(seed).normal(0, scale, (ROWS, VOCABULARY)).astype(np.float32)


def rows(value, dtype=np.float32):
    return np.full(ROWS, value, dtype)


def theirs(logits, processors, ids=None):
    torch = pytest.importorskip("torch", reason="compared with transformers, which needs torch")
    ids = torch.as_tensor(np.zeros((ROWS, 1), np.int64) if ids is None else ids)
    scores = torch.as_tensor(logits)
    for processor in processors:
        scores = processor(ids, scores)
    return scores.numpy()


def assert_same_scores(ours, expected):
    np.testing.assert_array_equal(np.isinf(ours), np.isinf(expected))
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 50, 96, 97])
def test_top_k_equals_transformers(k):
    hf = pytest.importorskip("transformers", reason="the reference")
    logits = random_logits(k)
    assert_same_scores(keep_top_k(logits, rows(k, np.int32)), theirs(logits, [hf.TopKLogitsWarper(k)]))


@pytest.mark.parametrize("p", [0.01, 0.3, 0.85, 0.95, 0.999])
def test_top_p_equals_transformers(p):
    hf = pytest.importorskip("transformers", reason="the reference")
    for seed in range(20):
        logits = random_logits(seed)
        assert_same_scores(keep_top_p(logits, rows(p)), theirs(logits, [hf.TopPLogitsWarper(p)]))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 1.0])
def test_min_p_equals_transformers(p):
    hf = pytest.importorskip("transformers", reason="the reference")
    logits = random_logits(3)
    assert_same_scores(keep_min_p(logits, rows(p)), theirs(logits, [hf.MinPLogitsWarper(p)]))


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty_equals_transformers(penalty):
    hf = pytest.importorskip("transformers", reason="the reference")
    logits = random_logits(4)
    ids = np.random.default_rng(5).integers(0, VOCABULARY, (ROWS, 30))
    seen = np.zeros((ROWS, VOCABULARY), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    expected = theirs(logits, [hf.RepetitionPenaltyLogitsProcessor(penalty)], ids)
    assert_same_scores(penalize_repetition(logits, seen, rows(penalty)), expected)


def test_all_steps_together_equal_transformers_in_its_order():
    hf = pytest.importorskip("transformers", reason="the reference")
    config = SamplingConfig(temperature=0.7, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.2)
    ids = np.random.default_rng(6).integers(0, VOCABULARY, (ROWS, 30))
    seen = np.zeros((ROWS, VOCABULARY), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    for seed in range(20):
        logits = random_logits(seed)
        expected = theirs(
            logits,
            [
                hf.RepetitionPenaltyLogitsProcessor(1.2),
                hf.TemperatureLogitsWarper(0.7),
                hf.TopKLogitsWarper(40),
                hf.TopPLogitsWarper(0.9),
                hf.MinPLogitsWarper(0.02),
            ],
            ids,
        )
        assert_same_scores(process(logits, SamplingValues.of(config, ROWS), seen), expected)


def test_top_p_keeps_the_token_that_crosses_the_threshold():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    kept = np.isfinite(keep_top_p(logits, jnp.array([0.6])))
    np.testing.assert_array_equal(kept, [[True, True, False, False]])


def test_rows_with_different_settings_do_not_touch_each_other():
    """Rows for which a cut is off keep every token, although another row has it on."""
    logits = random_logits(7)[:2]
    values = SamplingValues(
        temperature_B=np.array([0.0, 2.0], np.float32),
        top_k_B=np.array([0, 3], np.int32),
        top_p_B=np.array([1.0, 0.9], np.float32),
        min_p_B=np.array([0.0, 0.01], np.float32),
    )
    scores = np.asarray(process(logits, values))
    np.testing.assert_array_equal(scores[0], logits[0])
    assert np.isfinite(scores[1]).sum() <= 3
    token, _ = sample(logits, row_keys(0, 2), values)
    assert token[0] == logits[0].argmax()


def test_greedy_takes_the_likeliest_token_and_reports_the_models_log_probability():
    logits = random_logits(8)
    token, logprob = sample(logits, row_keys(0, ROWS), SamplingValues.of(SamplingConfig(temperature=0), ROWS))
    np.testing.assert_array_equal(token, logits.argmax(-1))
    exact = logits.astype(np.float64)
    expected = exact.max(-1) - np.log(np.exp(exact).sum(-1))
    np.testing.assert_allclose(logprob, expected, rtol=0, atol=1e-6)


def test_log_probability_is_of_the_raw_logits_whatever_the_sampling():
    logits = random_logits(9)
    config = SamplingConfig(temperature=0.3, top_k=5, top_p=0.8)
    token, logprob = sample(logits, row_keys(1, ROWS), SamplingValues.of(config, ROWS))
    expected = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(token)[:, None], 1)[:, 0]
    np.testing.assert_allclose(logprob, expected, rtol=1e-5)


def test_draws_follow_the_truncated_distribution_and_never_leave_it():
    logits = random_logits(10, scale=1.5)[:1]
    config = SamplingConfig(temperature=0.9, top_p=0.8)
    count = 40_000
    many = jnp.broadcast_to(jnp.asarray(logits), (count, VOCABULARY))
    keys = jax.random.split(jax.random.key(0), count)
    token, _ = sample(many, keys, SamplingValues.of(config, count))
    expected = np.asarray(jax.nn.softmax(process(logits, SamplingValues.of(config, 1))))[0]
    observed = np.bincount(np.asarray(token), minlength=VOCABULARY) / count
    assert observed[expected == 0].sum() == 0
    kept = expected > 0
    chi_squared = count * ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert chi_squared < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("uniform", [0.0, 0.5, float(np.nextafter(np.float32(1), np.float32(0)))])
def test_the_ends_of_the_unit_interval_draw_a_token_that_is_allowed(uniform):
    logits = random_logits(11)
    logits[:, :10] = logits[:, -10:] = -np.inf
    token = np.asarray(draw(logits, rows(uniform)))
    assert np.isfinite(logits[np.arange(ROWS), token]).all()


def test_a_row_of_a_batch_draws_as_a_single_prompt_with_its_seed():
    batch, single = row_keys(5, 4), row_keys(7, 1)
    np.testing.assert_array_equal(jax.random.key_data(batch)[2], jax.random.key_data(single)[0])
    assert len(np.unique(jax.random.key_data(batch), axis=0)) == 4


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
        ("stop", ("",)),
    ],
)
def test_a_setting_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is .*it must be"):
        SamplingConfig(**{field: value})

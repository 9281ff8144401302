"""What the engine drew tokens from is what the trainer thinks of them; where the two differ, the metrics say so."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from policy_rows import MODEL, batch_of

from minimind_jax.convert.peft import rank_table
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.request import Request
from minimind_jax.inference.sampling import SamplingConfig
from minimind_jax.losses.policy import make_policy_loss
from minimind_jax.losses.vocabulary import target_scores
from minimind_jax.model.lora import init_adapters, join, make_adapter, without_adapters
from minimind_jax.rl.advantages import reduction_weights

TEMPERATURE, NEW, END = 0.7, 12, 2
PROMPTS = [tuple(range(5, 5 + length)) for length in (1, 3, 9, 4, 6, 3)]
TABLE = rank_table(MODEL.config, 4, ("all-linear",), {})
TRAINER = dataclasses.replace(MODEL, adapter=make_adapter(TABLE))
DIFFERENCE, RATIO = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"


@functools.cache
def parameters():
    """(the base, an adapter that has learned something)."""
    base, rng = jax.jit(MODEL.init)(jax.random.key(0)), np.random.default_rng(0)
    fresh = init_adapters(jax.random.key(1), base, TABLE, 8.0, False)

    def draw(path, leaf):
        return np.asarray(leaf) + 0.1 * rng.standard_normal(leaf.shape, np.float32) * (path[-1].key == "lora_b")

    return base, jax.tree_util.tree_map_with_path(draw, fresh)


@functools.cache
def rollout(temperature=TEMPERATURE, adapter="learned"):
    """Answers of the engine to prompts of several lengths, fewer at once than there are, as rows of a batch."""
    base, learned = parameters()
    engine = Engine(MODEL, base, eos_ids=(END,), adapters={"learned": learned}, slots=4, context=64)
    answers = engine.answers(
        Request(prompt, SamplingConfig(NEW, temperature, top_p=1.0, seed=seed), adapter=adapter)
        for seed, prompt in enumerate(PROMPTS)
    )
    tokens, mask, sampled = np.zeros((3, len(PROMPTS), 9 + NEW))
    lengths = []
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        lengths.append(len(prompt) + len(answer.tokens))
        written = np.s_[len(prompt) - 1 : lengths[-1] - 1]
        tokens[row, : lengths[-1]] = [*prompt, *answer.ids]
        mask[row, written] = 1
        sampled[row, written] = [token.sampled_logprob for token in answer.tokens]
    weights = reduction_weights(mask, np.ones(len(mask)), "token", NEW)
    advantages = mask * np.linspace(-1, 1, len(mask))[:, None]
    return batch_of(tokens, mask, lengths, sampler_log_probs=sampled, weights=weights, advantages=advantages)


@functools.cache
def programs():
    """Scoring, and the loss with its gradient, as two programs, which a run has."""
    loss_fn = make_policy_loss(TRAINER, temperature=TEMPERATURE, kl_estimator="k2")

    def loss(params, batch):
        numerator, denominator, metrics = loss_fn(params, batch, None)
        return numerator / denominator, {name: metric.value() for name, metric in metrics.items()}

    return scoring(TRAINER), jax.jit(jax.grad(loss, has_aux=True))


def scoring(model):
    return jax.jit(lambda params, batch: target_scores(model, params, batch, None, TEMPERATURE)[0].log_probs_BT)


def learn(params, batch, reference=None):
    """The first update on a rollout: (scores of before, gradient, metrics); the divergence from the reference is
    trained where it is given."""
    score, gradient = programs()
    scored = np.asarray(score(params, batch))
    kl_weights = batch["weights"] if reference is not None else 0 * batch["weights"]
    logs = {"old_log_probs": scored, "reference_log_probs": scored if reference is None else reference}
    gradients, metrics = gradient(params, {**batch, **logs, "kl_weights": kl_weights})
    return scored, gradients, {name: float(value) for name, value in metrics.items()}


def test_the_trainer_thinks_of_tokens_what_the_engine_drew_them_from():
    batch = rollout()
    scored, _, metrics = learn(join(*parameters()), batch)
    trained = batch["mask"] > 0
    np.testing.assert_allclose(scored[trained], batch["sampler_log_probs"][trained], atol=1e-5)
    assert END in batch["targets"][trained], "none has ended"
    for name in ("val/ratio", f"{RATIO}/mean", f"{RATIO}/min", f"{RATIO}/max"):
        assert metrics[name] == pytest.approx(1, abs=1e-5), name
    assert metrics["approx_kl"] < 1e-10
    assert metrics[f"{DIFFERENCE}/max"] < 1e-5


def test_a_reference_with_the_adapter_off_is_the_policy_at_step_0():
    base, learned = parameters()
    fresh = join(base, init_adapters(jax.random.key(1), base, TABLE, 8.0, False))
    batch = rollout(adapter="")
    reference = np.asarray(scoring(MODEL)(without_adapters(fresh), batch))
    batch = {**batch, "advantages": 0 * batch["advantages"]}
    _, gradients, metrics = learn(fresh, batch, reference)
    assert abs(metrics["kl"]) < 1e-7
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradients)) < 1e-5
    assert learn(join(base, learned), batch, reference)[2]["kl"] > 0.01


def with_positions(batch, apart):
    """Rows whose tokens are so far apart."""
    positions = np.broadcast_to(apart * np.arange(batch["tokens"].shape[1], dtype=np.int32), batch["tokens"].shape)
    return {**{name: x for name, x in batch.items() if name != "lengths"}, "positions": positions}


FAULTS = {
    "temperature": lambda: rollout(temperature=1.0),
    "adapter": lambda: rollout(adapter=""),
    "mask": lambda: {**rollout(), "mask": np.roll(rollout()["mask"], -1, axis=1)},
    "position": lambda: with_positions(rollout(), 2),
    "column": lambda: {**rollout(), "sampler_log_probs": np.roll(rollout()["sampler_log_probs"], 1, axis=1)},
    "prompt": lambda: {**rollout(), "tokens": np.where(rollout()["tokens"] == 5, 6, rollout()["tokens"])},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_difference_between_sampling_and_scoring_shows(fault):
    _, _, metrics = learn(join(*parameters()), FAULTS[fault]())
    assert metrics[f"{DIFFERENCE}/max"] > 0.1
    assert metrics[f"{DIFFERENCE}/mean"] > 0.01
    assert metrics[f"{RATIO}/min"] < 0.99 or metrics[f"{RATIO}/max"] > 1.01

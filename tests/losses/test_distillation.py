"""Divergences in float64, the loss of a student, and that pieces of the rows change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minimind_jax.losses import distillation, pieces
from minimind_jax.losses.distillation import (
    divergences,
    make_distillation_loss,
    stored_divergences,
)
from minimind_jax.losses.language_model import make_language_model_loss
from minimind_jax.model.config import ComputeConfig, ModelConfig
from minimind_jax.model.transformer import LanguageModel

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
FLOAT32 = ComputeConfig(dtype="float32")
STUDENT = LanguageModel(ModelConfig(**SIZES), FLOAT32)
TEACHER = "teacher"
TEACHERS = {
    "dense": LanguageModel(ModelConfig(**{**SIZES, "hidden_size": 48, "num_hidden_layers": 3}), FLOAT32),
    "moe": LanguageModel(ModelConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24), FLOAT32),
    "padded": LanguageModel(ModelConfig(**{**SIZES, "vocab_size": 64}), FLOAT32),
    "smaller vocabulary": LanguageModel(ModelConfig(**{**SIZES, "vocab_size": 48}), FLOAT32),
}


def drawn(model, seed):
    return jax.jit(model.init)(jax.random.key(seed))


def expected(student, teacher, kind, temperature, beta):
    words = min(student.shape[-1], teacher.shape[-1])
    student, teacher = student[..., :words], teacher[..., :words]

    def softmax(logits):
        e = np.exp(logits.astype(np.float64) / temperature)
        return e / e.sum(-1, keepdims=True)

    def kl(p, q):
        return (p * np.log(p / q)).sum(-1)

    s, t = softmax(student), softmax(teacher)
    m = beta * t + (1 - beta) * s
    return {"forward": kl(t, s), "reverse": kl(s, t), "jsd": beta * kl(t, m) + (1 - beta) * kl(s, m)}[kind]


@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_divergences_are_their_formulas(kind, temperature):
    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((2, 30, 12)).astype(np.float32) * 6
    compiled = jax.jit(functools.partial(divergences, kind=kind, temperature=temperature, beta=0.3))
    found = compiled(student, teacher)
    np.testing.assert_allclose(found, expected(student, teacher, kind, temperature, 0.3), rtol=1e-4, atol=1e-6)
    assert np.abs(compiled(student, student)).max() < 1e-6


def test_forward_divergence_is_torch_s():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    student, teacher = (torch.tensor(rng.standard_normal((8, 20)), dtype=torch.float32) for _ in range(2))
    theirs = torch.nn.functional.kl_div(
        torch.log_softmax(student / 1.5, -1), torch.softmax(teacher / 1.5, -1), reduction="batchmean"
    )
    ours = divergences(jnp.asarray(student.numpy()), jnp.asarray(teacher.numpy()), "forward", 1.5).mean()
    assert float(ours) == pytest.approx(theirs.item(), abs=1e-6)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_stored_words_are_compared_with_all_others_as_one(kind):
    rng = np.random.default_rng(3)
    student, teacher = rng.standard_normal((2, 30, 12)).astype(np.float32) * 3
    whole = expected(student, teacher, kind, 1.5, 0.3)
    less = np.zeros(30)
    stored = jax.jit(lambda *inputs: stored_divergences(*inputs, kind, 1.5, 0.3))
    for k in (1, 4, 11, 12):
        ids, log_probs = distillation.likeliest(jnp.asarray(teacher), k, 12, 1.5)
        found = stored(jnp.asarray(student), ids, log_probs)
        order = np.argsort(-teacher, axis=-1)

        def merged(logits, order=order, k=k):
            e = np.exp(np.take_along_axis(logits, order, -1).astype(np.float64) / 1.5)
            p = e / e.sum(-1, keepdims=True)
            return 1.5 * np.log(np.concatenate([p[:, :k], np.maximum(p[:, k:].sum(-1, keepdims=True), 1e-7)], -1))

        np.testing.assert_allclose(
            found, expected(merged(student), merged(teacher), kind, 1.5, 0.3), rtol=1e-3, atol=2e-5
        )
        assert np.all(np.asarray(found) >= less - 1e-4)  # more words tell more apart
        less = np.asarray(found)
    np.testing.assert_allclose(less, whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("kind", "words"), [("padded", 50), ("smaller vocabulary", 48)])
def test_a_stored_teacher_gives_the_same_loss_as_one_that_is_asked(kind, words):
    teacher, batch = TEACHERS[kind], make_batch()
    params, known = drawn(STUDENT, 0), drawn(teacher, 1)
    asked = make_distillation_loss(STUDENT, lambda p: (teacher, p[TEACHER]), temperature=1.5)
    likeliest = jax.jit(lambda known: distillation.teacher_likeliest(teacher, known, batch, words, words, 1.5))
    ids, log_probs = likeliest(known)
    stored = make_distillation_loss(STUDENT, None, temperature=1.5, words=words)
    both = {**batch, "teacher_ids": ids, "teacher_log_probs": log_probs}
    wanted = jax.jit(jax.grad(lambda p: asked({**p, TEACHER: known}, batch, None)[0]))(params)
    found = jax.jit(jax.grad(lambda p: stored(p, both, None)[0]))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)


def make_batch():
    rng = np.random.default_rng(2)
    segments = np.array([[1] * 7 + [2] * 7 + [0] * 2, [1] * 16])
    positions = np.array([[*range(7), *range(7), 0, 0], [*range(16)]])
    tokens, targets = rng.integers(0, 48, (2, 2, 16))
    return {
        "tokens": tokens, "targets": targets, "positions": positions, "segment_ids": segments,
        "loss_weights": ((segments > 0) & (rng.random((2, 16)) > 0.3)).astype(np.float32),
    }  # fmt: skip


@pytest.mark.parametrize("kind", TEACHERS)
def test_the_loss_of_a_student(kind):
    teacher, batch = TEACHERS[kind], make_batch()
    params, known = drawn(STUDENT, 0), drawn(teacher, 1)
    loss_fn = make_distillation_loss(STUDENT, lambda p: (teacher, p[TEACHER]), alpha=0.25, temperature=1.5)
    numerator, count, metrics = jax.jit(loss_fn)({**params, TEACHER: known}, batch, None)
    arrays = [batch[name] for name in ("tokens", "positions", "segment_ids")]
    pairs = (STUDENT, params), (teacher, known)
    logits = [np.asarray(jax.jit(model.apply)(values, *arrays)[0], np.float64) for model, values in pairs]
    apart = expected(*logits, "forward", 1.5, 0.5)
    weights = batch["loss_weights"]
    nll = jax.jit(make_language_model_loss(STUDENT))(params, batch, None)[0]
    np.testing.assert_allclose(metrics["nll"].total, nll, rtol=1e-5)
    np.testing.assert_allclose(metrics["divergence"].total, (weights * apart).sum(), rtol=1e-4)
    np.testing.assert_allclose(numerator, 0.25 * nll + 0.75 * 2.25 * (weights * apart).sum(), rtol=1e-4)
    assert float(count) == weights.sum()


# 7: three pieces of 6, the last one filled up
@pytest.mark.parametrize("columns", [pytest.param(4, marks=pytest.mark.slow), 7])
def test_pieces_of_the_rows_change_nothing(monkeypatch, columns):
    teacher, batch = TEACHERS["dense"], make_batch()
    params = {**STUDENT.init(jax.random.key(0)), TEACHER: teacher.init(jax.random.key(1))}
    loss_fn = make_distillation_loss(STUDENT, lambda p: (teacher, p[TEACHER]), divergence="jsd")
    loss = jax.value_and_grad(lambda p: loss_fn(p, batch, None)[0])
    whole = loss(params)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 4 * 2 * 50 * columns)
    in_pieces = loss(params)
    for ours, expected in zip(jax.tree.leaves(in_pieces), jax.tree.leaves(whole), strict=True):
        rounding = 2**-23 * np.abs(expected).max()  # of a term of these sums, which are made in another order
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=2 * rounding)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(whole[1][TEACHER]))

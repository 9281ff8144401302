"""Losses of classifiers against torch, and on packed rows against each text by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minimind_jax.losses.classification import class_losses, make_classification_loss
from minimind_jax.model.config import ComputeConfig, ModelConfig
from minimind_jax.model.heads import init_head
from minimind_jax.model.transformer import LanguageModel

LOGITS = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32) * 4
WEIGHTS = np.array([1, 2, 0.5, 1, 3], np.float32)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_one_label_is_torch_s_cross_entropy(smoothing):
    torch = pytest.importorskip("torch")
    classes = np.array([0, 4, 2, 2, 1, 3])
    theirs = torch.nn.functional.cross_entropy(
        torch.tensor(LOGITS), torch.tensor(classes), torch.tensor(WEIGHTS), label_smoothing=smoothing
    )
    ours = class_losses(jnp.asarray(LOGITS), classes[:, None].astype(np.float32), WEIGHTS, False, smoothing)
    assert float(ours.sum() / WEIGHTS[classes].sum()) == pytest.approx(theirs.item(), rel=1e-6)


def test_several_labels_are_torch_s_binary_cross_entropy():
    torch = pytest.importorskip("torch")
    values = (np.random.default_rng(1).random((6, 5)) > 0.6).astype(np.float32)
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(LOGITS), torch.tensor(values), pos_weight=torch.tensor(WEIGHTS)
    )
    ours = class_losses(jnp.asarray(LOGITS), values, WEIGHTS, True)
    assert float(ours.mean()) == pytest.approx(theirs.item(), rel=1e-6)


def test_packed_texts_are_those_by_themselves():
    config = ModelConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    model = LanguageModel(config, ComputeConfig(dtype="float32", scan_unroll=1))
    params = {**jax.jit(model.init)(jax.random.key(0)), **init_head(jax.random.key(1), 32, 5, std=0.5)}
    rng, lengths, labels, T = np.random.default_rng(2), [3, 1, 6, 2], [4, 0, 2, 1], 14
    batch = {name: np.zeros((1, T), np.int32) for name in ("tokens", "positions", "segment_ids")}
    batch["values"] = np.zeros((1, T, 1), np.float32)
    place, texts = 0, []
    for segment, (length, label) in enumerate(zip(lengths, labels, strict=True)):
        ids, here = rng.integers(1, 50, length), slice(place, place + length)
        batch["tokens"][0, here], batch["positions"][0, here] = ids, np.arange(length)
        batch["segment_ids"][0, here], batch["values"][0, segment] = segment + 1, label
        place += length
        texts.append(ids)
    numerator, weight, metrics = jax.jit(make_classification_loss(model, jnp.asarray(WEIGHTS)))(params, batch, None)
    wanted, right, apply = 0.0, 0.0, jax.jit(model.apply)
    for ids, label in zip(texts, labels, strict=True):
        body = {name: tree for name, tree in params.items() if name != "score"}
        logits = np.asarray(apply(body, ids[None])[1].hidden_BTD[0, -1] @ params["score"]["kernel"], np.float64)
        wanted -= WEIGHTS[label] * (logits[label] - np.log(np.exp(logits).sum()))
        right += logits.argmax() == label
    np.testing.assert_allclose(numerator, wanted, rtol=1e-5)
    assert float(weight) == WEIGHTS[labels].sum()
    assert [float(value) for value in jax.tree.leaves(metrics["accuracy"])] == [right, 4]

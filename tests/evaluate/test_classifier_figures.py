"""Figures of a classifier against their definitions, and pictures of labels that no font may have."""

import warnings

import numpy as np
import pytest

from minimind_jax.convert.hf import Labels
from minimind_jax.evaluate.classification import confusion_figure, describe, evaluate_logits
from minimind_jax.training.run import write_figure


def drawn(classes=4, texts=60, seed=0):
    rng = np.random.default_rng(seed)
    names = tuple("abcdefgh"[:classes])
    return (
        rng.standard_normal((texts, classes)) * 3,
        [[names[i]] for i in rng.integers(0, classes, texts)],
        Labels(names),
    )


def test_one_label_a_text():
    logits, truth, labels = drawn()
    found = evaluate_logits(logits, truth, labels)
    classes = np.array([labels.names.index(own[0]) for own in truth])
    answers = logits.argmax(axis=1)
    assert found.accuracy == (classes == answers).mean()
    for number, row in enumerate(found.per_class()):
        right = ((classes == number) & (answers == number)).sum()
        assert row["precision"] == pytest.approx(right / max((answers == number).sum(), 1))
        assert row["recall"] == pytest.approx(right / max((classes == number).sum(), 1))
        assert found.confusion()[number].sum() == row["texts"]
    likely = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.confidence, likely.max(axis=1))
    bins = np.minimum((found.confidence * 10).astype(int), 9)
    error = sum(
        (bins == b).mean() * abs(found.confidence[bins == b].mean() - (classes == answers)[bins == b].mean())
        for b in set(bins)
    )
    assert found.calibration_error == pytest.approx(error)


def test_macro_f1_is_scikit_learn_s():
    metrics = pytest.importorskip("sklearn.metrics")
    logits, truth, labels = drawn(classes=6)
    truth = [own if own[0] != "f" else ["a"] for own in truth]  # a class that is only answered
    found = evaluate_logits(logits, truth, labels)
    theirs = metrics.f1_score(
        [own[0] for own in truth],
        [labels.names[i] for i in logits.argmax(axis=1)],
        labels=list("abcde"),
        average="macro",
        zero_division=0,
    )
    assert found.macro_f1 == pytest.approx(theirs)


def test_a_class_of_which_no_text_is_held_out_has_no_figures_and_no_part_in_the_mean():
    """One label a text and several; whether the class is answered or not."""
    logits = np.array([[5.0, 0, -5], [0, 5, -5], [-5, 0, 5]])
    for several in (False, True):
        found = evaluate_logits(logits, [["a"], ["b"], ["a"]], Labels(("a", "b", "none"), several))
        rows = {row["label"]: row for row in found.per_class()}
        assert rows["none"] == {"label": "none", "texts": 0, "precision": None, "recall": None, "f1": None}
        assert found.macro_f1 == pytest.approx((rows["a"]["f1"] + rows["b"]["f1"]) / 2)
        first, *_, last = describe(found).splitlines()
        assert "over the 2 of 3 classes with held-out texts" in first
        assert last == "| none | none held out |  |  |  |"


def test_several_labels_a_text():
    logits = np.array([[2.0, -1.0], [-3.0, -2.0], [1.0, 4.0]])
    found = evaluate_logits(logits, [["a"], ["b"], ["a", "b"]], Labels(("a", "b"), several=True))
    assert found.accuracy == pytest.approx(2 / 3)
    assert [row["recall"] for row in found.per_class()] == [1.0, 0.5]


@pytest.mark.parametrize(
    "names", [("好", "坏", "一般"), ("$x^$", "US$ 5_{", "\\frac{"), ("a\nb|c", "d\x00", "e" * 300), ("ดี", "अच्छा", "🙂")]
)
def test_labels_of_any_alphabet_are_drawn_without_a_warning(names, tmp_path):
    """Dollars are no formula, line ends no rows; labels that no font has become numbers."""
    logits, truth, _ = drawn(classes=3)
    truth = [[names["abc".index(own[0])]] for own in truth]
    found = evaluate_logits(logits, truth, Labels(names))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_figure(tmp_path / "confusion.png", confusion_figure(found), dpi=110)
    assert (tmp_path / "confusion.png").stat().st_size > 5000
    table = describe(found).splitlines()
    assert len(table) == 4 + len(names)
    for name in names:
        shown = name.replace("\\", "\\\\").replace("\n", " ").replace("|", "\\|").strip("\x00")
        assert any(f"| {shown} |" in row for row in table)


@pytest.mark.parametrize("texts", [99, 100])
def test_the_confusion_matrix_shows_counts_and_calibration_only_of_many_texts(texts):
    names = ("a", "b", "c")
    truth = [[names[n % 2]] for n in range(texts)]
    logits = np.eye(3)[[2 if n == 0 else n % 2 for n in range(texts)]]  # one "a" is taken for "c"
    found = evaluate_logits(logits, truth, Labels(names))
    confusion, *others = confusion_figure(found).axes
    counts = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in confusion.texts}
    matrix = found.confusion()
    assert counts == {(i, j): str(matrix[i, j]) for i in range(3) for j in range(3) if matrix[i, j]}
    assert counts[0, 2] == "1"
    assert [axes.get_xlabel() for axes in others if axes.get_xlabel()] == ["confidence"] * (texts >= 100)

"""How good a classifier is on labelled texts or pictures: accuracy, F1, calibration, and who is taken for whom."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from minimind_jax.convert.hf import Labels
from minimind_jax.texts import cell, one_line, table

BINS = 10  # of confidence
FONTS = (  # of pictures: matplotlib's own, and those that have Chinese
    "DejaVu Sans", "Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "PingFang SC",
    "Microsoft YaHei", "SimHei", "Arial Unicode MS",
)  # fmt: skip
LONGEST = 40  # characters of a label in a picture
SHOWN = 40  # classes that a picture of the confusion matrix can name
CALIBRATED = 100  # texts from which on a curve of confidence against accuracy is more than chance


@dataclasses.dataclass(frozen=True)
class ClassificationResult:
    """Of n texts, or what `noun` says, and C classes.

    truth, found: (n, C) bool. confidence (n,): probability of the class found, or with several labels the mean, over
    classes, of that of the answer given.
    """

    labels: Labels
    truth: np.ndarray
    found: np.ndarray
    confidence: np.ndarray
    noun: str = "texts"

    @property
    def accuracy(self) -> float:
        """Share of the texts whose label, or set of labels, is right."""
        return float((self.truth == self.found).all(axis=1).mean())

    def per_class(self) -> list[dict[str, Any]]:
        """label, texts (which have it), precision, recall, f1 of each class: 0 where they are not defined, None of a
        class that no text has, of which nothing is known."""
        both, found, truth = ((a).sum(axis=0) for a in (self.truth & self.found, self.found, self.truth))
        precision, recall = both / np.maximum(found, 1), both / np.maximum(truth, 1)
        figures = {"precision": precision, "recall": recall, "f1": 2 * both / np.maximum(found + truth, 1)}
        return [
            {"label": label, "texts": int(n), **{name: float(f[i]) if n else None for name, f in figures.items()}}
            for i, (label, n) in enumerate(zip(self.labels.names, truth, strict=True))
        ]

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the classes that some text has (scikit-learn's, with these as `labels`)."""
        return float(np.mean([row["f1"] for row in self.per_class() if row["texts"]] or [0.0]))

    def calibration(self) -> list[dict[str, float]]:
        """For bins of confidence: texts, mean confidence, accuracy."""
        right = (self.truth == self.found).all(axis=1)
        bins = np.minimum((self.confidence * BINS).astype(int), BINS - 1)
        return [
            {
                "texts": int((bins == b).sum()),
                "confidence": float(self.confidence[bins == b].mean()),
                "accuracy": float(right[bins == b].mean()),
            }
            for b in range(BINS)
            if (bins == b).any()
        ]

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: mean distance of confidence and accuracy over the bins (arXiv 1706.04599)."""
        rows = self.calibration()
        return sum(row["texts"] * abs(row["confidence"] - row["accuracy"]) for row in rows) / len(self.truth)

    def confusion(self) -> np.ndarray:
        """(C, C) texts of class i taken for class j; of texts with one label."""
        matrix = np.zeros((len(self.labels.names),) * 2, np.int64)
        np.add.at(matrix, (self.truth.argmax(axis=1), self.found.argmax(axis=1)), 1)
        return matrix

    def summary(self) -> dict[str, Any]:
        return {
            "texts": len(self.truth),
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "calibration_error": self.calibration_error,
            "classes": self.per_class(),
            "calibration": self.calibration(),
        }


def classify_logits(logits: np.ndarray, several: bool) -> tuple[np.ndarray, np.ndarray]:
    """(found (n, C) bool, probabilities (n, C)) of logits: the likeliest class, or every class above one half."""
    logits = logits.astype(np.float64)
    if several:
        probabilities = 1 / (1 + np.exp(-np.clip(logits, -700, 700)))
        return probabilities > 0.5, probabilities
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    found = np.arange(logits.shape[1]) == logits.argmax(axis=1)[:, None]
    return found, shifted / shifted.sum(axis=1, keepdims=True)


def evaluate_logits(
    logits: np.ndarray, truth: Sequence[Sequence[str]], labels: Labels, noun: str = "texts"
) -> ClassificationResult:
    """logits (n, C) of texts, or what `noun` says, whose true labels are `truth`."""
    found, probabilities = classify_logits(logits, labels.several)
    is_true = np.array([[name in own for name in labels.names] for own in truth], bool)
    given = np.where(found, probabilities, 1 - probabilities)
    confidence = given.mean(axis=1) if labels.several else probabilities.max(axis=1)
    return ClassificationResult(labels, is_true, found, confidence, noun)


def confusion_figure(result: ClassificationResult):
    """The confusion matrix: counts, coloured by their share of the true class. From CALIBRATED texts on the reliability
    curve stands beside it."""
    from matplotlib.figure import Figure

    is_calibrated = len(result.truth) >= CALIBRATED
    figure = Figure(figsize=(13 if is_calibrated else 9, 8), layout="constrained")
    if is_calibrated:
        confusion, reliability = figure.subplots(1, 2, width_ratios=(2, 1))
        _draw_reliability(result, reliability)
    else:
        confusion = figure.subplots()
    matrix, (names, fonts) = result.confusion(), _drawable(result.labels.names)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = confusion.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, ax=confusion, shrink=0.6, label="share of the true class")
    confusion.set(xlabel="answer", ylabel="truth")
    if len(names) > SHOWN:
        return figure
    confusion.set_xticks(range(len(names)), names, rotation=90, fontsize=7, **fonts)
    confusion.set_yticks(range(len(names)), names, fontsize=7, **fonts)
    size = max(4, min(12, 150 / len(names)))
    for row, column in np.argwhere(matrix):
        colour = "white" if shares[row, column] > 0.5 else "black"
        count = f"{matrix[row, column]:,}"
        confusion.text(column, row, count, ha="center", va="center", fontsize=size, color=colour)
    return figure


def _draw_reliability(result: ClassificationResult, axes) -> None:
    rows = result.calibration()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    axes.plot([row["confidence"] for row in rows], [row["accuracy"] for row in rows], "o-")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.grid(alpha=0.3)


def _drawable(names: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Names as a picture can show them, and the font to take: numbers where no font here has all their characters."""
    from matplotlib import font_manager

    shown = [name if len(name) <= LONGEST else name[:LONGEST] + "..." for name in map(one_line, names)]
    there = {font.name for font in font_manager.fontManager.ttflist}
    for family in FONTS:
        if family in there:
            font = font_manager.get_font(font_manager.findfont(family))
            if all(font.get_char_index(ord(character)) for character in set("".join(shown))):
                return shown, {"fontfamily": family, "parse_math": False}
    return [str(number) for number in range(len(names))], {}


def describe(result: ClassificationResult) -> str:
    """Markdown: the figures, and the classes from the worst on."""
    rows = result.per_class()
    known = sorted((row for row in rows if row["texts"]), key=lambda row: row["f1"])
    unknown = [row for row in rows if not row["texts"]]
    over = f" over the {len(known)} of {len(rows)} classes with held-out {result.noun}" if unknown else ""
    columns, lines = ("class", result.noun, "precision", "recall", "F1"), []
    for row in [*known, *unknown]:
        figures = [f"{row[name]:.3f}" for name in ("precision", "recall", "f1")] if row["texts"] else ["", "", ""]
        lines.append([cell(row["label"]), row["texts"] or "none held out", *figures])
    return (
        f"{len(result.truth):,} {result.noun}: accuracy {result.accuracy:.4f}, macro F1 {result.macro_f1:.4f}{over}, "
        f"expected calibration error {result.calibration_error:.4f}\n\n{table(columns, lines, numbers=columns[1:])}"
    )

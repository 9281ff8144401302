"""A classifier of ours against TF-IDF and logistic regression on the same records, trained in the same run.

    python scripts/bench_classify.py --train tickets.jsonl --test held_out.jsonl --init_from runs/pretrain
    python scripts/bench_classify.py ... -- --training.epochs 20 --lora.rank 16

The baseline is scikit-learn's: words and pairs of words, and characters (1 to 4) for texts without spaces, whichever
is better on a tenth of the training records; C likewise. Settings after `--` are those of `minimind classify`.
Prints one JSON line. Needs `pip install scikit-learn`.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench_common as bench
import numpy as np

from minimind_jax.data.jsonl import iter_records
from minimind_jax.data.labels import find_classes, parse_labelled
from minimind_jax.evaluate.classification import evaluate_logits
from minimind_jax.inference.score import Scorer


def read(path: str, classes) -> tuple[list[str], list[str]]:
    records = [parse_labelled(record, classes) for record in iter_records([path])]
    return [record.text for record in records], [record.labels[0] for record in records]


def baseline(train: tuple[list[str], list[str]], test: tuple[list[str], list[str]]) -> dict:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score
    from sklearn.pipeline import make_pipeline

    started = time.perf_counter()
    order = np.random.default_rng(0).permutation(len(train[0]))
    held, kept = np.split(order, [len(order) // 10])
    texts, labels = (np.array(column, object) for column in train)
    kinds = {
        "words": {"ngram_range": (1, 2), "token_pattern": r"(?u)\b\w+\b", "sublinear_tf": True},
        "characters": {"analyzer": "char", "ngram_range": (1, 4), "sublinear_tf": True},
    }

    def make(kind: str, c: float):
        return make_pipeline(TfidfVectorizer(**kinds[kind]), LogisticRegression(C=c, max_iter=2000))

    choices = [(kind, c) for kind in kinds for c in (3.0, 30.0)]
    scores = {
        (kind, c): make(kind, c).fit(texts[kept], labels[kept].astype(str)).score(texts[held], labels[held].astype(str))
        for kind, c in choices
    }
    kind, c = max(scores, key=scores.get)
    model = make(kind, c).fit(texts, labels.astype(str))
    answers = model.predict(test[0])
    return {
        "accuracy": round(float(np.mean(answers == np.array(test[1]))), 4),
        "macro F1": round(float(f1_score(test[1], answers, labels=sorted(set(test[1])), average="macro")), 4),
        "features": kind,
        "C": c,
        "seconds": round(time.perf_counter() - started, 1),
    }


def ours(args: argparse.Namespace, test: tuple[list[str], list[str]], folder: str) -> dict:
    run = Path(folder) / "run"
    command = [sys.executable, "-m", "minimind_jax", "classify", "--config", "classify", "--run", str(run)]
    command += ["--init_from", args.init_from, "--data.train", args.train, *args.settings]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    scorer = Scorer(str(run), max_tokens=256)
    found = evaluate_logits(scorer.texts(test[0]), [[label] for label in test[1]], scorer.labels)
    return {
        "accuracy": round(found.accuracy, 4),
        "macro F1": round(found.macro_f1, 4),
        "calibration error": round(found.calibration_error, 4),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--init_from", required=True)
    parser.add_argument("settings", nargs="*", help="after `--`: settings of `minimind classify`")
    args = parser.parse_args()
    classes = find_classes([args.train], "text", "label")
    train, test = read(args.train, classes), read(args.test, classes)
    with tempfile.TemporaryDirectory() as folder:
        results = {"tf-idf": baseline(train, test), "ours": ours(args, test, folder)}
    shown = {
        "train": Path(args.train).name,
        "labels": len(classes.names),
        "texts": len(train[0]),
        "tested": len(test[0]),
    }
    bench.print_result("classify", {**shown, "settings": args.settings}, **results)


if __name__ == "__main__":
    main()

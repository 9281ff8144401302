"""Longer texts than a model was trained on: perplexity without and with the scalings of the rotary embedding.

    python scripts/long_context.py --run runs/long_context

Trains a small model at 256 tokens on the longer texts of the demo (Python's language reference and docstrings), without
some of the long chapters, and evaluates it on those at 1,024 tokens: as it is, with NTK (`dynamic`) and with YaRN, both
without further training. Prints one JSON line a scaling and draws perplexity over the position in the text.
A run that is there is evaluated and not trained again.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np

from minimind_jax.config.sections import CheckpointConfig, DataConfig, ModelSettings, OptimizerConfig, TrainingConfig
from minimind_jax.config.stages import PretrainConfig, TokenizerConfig
from minimind_jax.config.tools import PerplexityConfig
from minimind_jax.convert.hf import load_hf, save_hf
from minimind_jax.data.documents import encode_text
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.demo import corpus
from minimind_jax.evaluate.perplexity import evaluate_perplexity
from minimind_jax.model.config import RopeScaling
from minimind_jax.stages import start
from minimind_jax.stages.tokenizer import train_tokenizer

TRAINED, LONG = 256, 1024
MIN_CHARACTERS = 800  # shorter texts teach nothing about positions near 256
LONG_CHARACTERS = 5000  # well above 1,024 tokens
SCALINGS = {
    "none": None,
    "NTK (dynamic, factor 1)": RopeScaling("dynamic", 1.0, TRAINED),
    "YaRN (factor 4)": RopeScaling("yarn", LONG / TRAINED, TRAINED, attention_factor=0.1 * np.log(4) + 1),
}


def write_texts(folder: Path) -> tuple[Path, Path]:
    """Training text, and the held-out chapters: every third long one."""
    texts = [*corpus.topics(), *corpus.docstrings()]
    held_out = [text for text in texts if len(text) > LONG_CHARACTERS][::3]
    train = [text for text in texts if len(text) > MIN_CHARACTERS and text not in held_out]
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "train.jsonl", folder / "held_out.jsonl"
    for file, part in zip(files, (train, held_out), strict=True):
        file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in part), "utf-8")
    return files


def train_model(run: Path, train: Path, epochs: float) -> Path:
    tokenizer = run / "tokenizer"
    if not tokenizer.is_dir():
        train_tokenizer(TokenizerConfig(data=(str(train),), output=str(tokenizer), vocab_size=2048, max_records=0))
    return start(
        PretrainConfig(
            run=str(run / "pretrain"),
            tokenizer=str(tokenizer),
            export_dtype="float32",
            model=ModelSettings(
                vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2, rope_theta=10_000.0,
            ),
            data=DataConfig(train=(str(train),), val_fraction=0.01, seq_len=TRAINED),
            training=TrainingConfig(epochs=epochs, batch_tokens=2048, eval_every=0),
            optimizer=OptimizerConfig(
                name="muon", learning_rate=6e-3, muon_learning_rate=1.5e-2, schedule="linear", final_fraction=0.0,
                warmup_steps=20, b2=0.95,
            ),
            checkpoint=CheckpointConfig(every=100, keep=1),
        )
    )  # fmt: skip


def long_enough(file: Path, tokenizer: Tokenizer) -> None:
    """Leaves out texts of fewer than LONG tokens, so that every piece but the last of a text is full."""
    lines = file.read_text("utf-8").splitlines(keepends=True)
    kept = [line for line in lines if len(encode_text(tokenizer, json.loads(line)["text"]).ids) >= LONG]
    file.write_text("".join(kept), "utf-8")


def with_scaling(run: Path, scaling: RopeScaling | None, folder: Path) -> Path:
    """The folder of the run's model with another scaling of its rotary embedding."""
    config, params = load_hf(run / "model")
    scaled = dataclasses.replace(config, rope_scaling=scaling)
    return save_hf(folder, scaled, params, Tokenizer.load(run), "float32")


def draw(curves: dict[str, np.ndarray], file: Path, window: int = 64) -> None:
    """Perplexity of each stretch of `window` positions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, nll_T in curves.items():
        positions = np.arange(window // 2, LONG, window)
        axes.plot(positions, np.exp(nll_T), marker="o", markersize=3, label=name)
    axes.axvline(TRAINED, color="grey", linestyle=":", label=f"trained length, {TRAINED}")
    axes.set(xlabel="position in the text, tokens", ylabel="perplexity")
    axes.legend()
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/long_context"))
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--picture", type=Path, help="PNG to draw; default RUN/long_context.png")
    args = parser.parse_args()

    train, held_out = write_texts(args.run / "data")
    model = train_model(args.run, train, args.epochs)
    long_enough(held_out, Tokenizer.load(model))
    curves = {}
    for name, scaling in SCALINGS.items():
        scaled = with_scaling(model, scaling, args.run / "scaled")
        config = PerplexityConfig(model=str(scaled), files=(str(held_out),), seq_len=LONG, kind="text")
        found = evaluate_perplexity(config)
        windows = found.nll_by_position_T.reshape(-1, 64).sum(1), found.tokens_by_position_T.reshape(-1, 64).sum(1)
        curves[name] = windows[0] / windows[1]
        beyond = found.nll_by_position_T[TRAINED:].sum() / found.tokens_by_position_T[TRAINED:].sum()
        result = {"scaling": name, "tokens": found.tokens, "perplexity": found.perplexity}
        print(json.dumps({**result, f"perplexity_beyond_{TRAINED}": float(np.exp(beyond))}), flush=True)
    draw(curves, args.picture or args.run / "long_context.png")


if __name__ == "__main__":
    main()

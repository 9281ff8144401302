"""`minimind demo`: a small model learns from real text that every machine can get, answers, and is exported.

The text is collected by `demo.corpus`, the training is the pipeline of configs/quickstart.yaml, and what is printed at
the end is measured here: bits per byte, answers before and after fine-tuning, the share of the dialogues' questions
that the model answers word for word, and that the exported folder computes what was trained.
"""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.config.tools import DemoConfig
from minimind_jax.convert.hf import load_hf
from minimind_jax.convert.load import from_hf
from minimind_jax.data.documents import encode_prompt
from minimind_jax.demo import corpus
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.load import load_engine
from minimind_jax.inference.request import Request
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.pipeline.read import load_pipeline
from minimind_jax.pipeline.run import run_pipeline
from minimind_jax.shell import command
from minimind_jax.training.checkpoint import load_params
from minimind_jax.training.run import RunFolder, write_text
from minimind_jax.training.tracking import read_metrics

FOLDER = Path("runs/demo")
SAMPLE_QUESTIONS = ("Hello", "What is a computer?", "Tell me a joke", "你好吗?", "你是谁?", "你喜欢什么书?")
LARGEST_DIFFERENCE = 1e-4  # of a logit, between the trained and the exported model, both float32
MINE = ("--pretrain.data.train", "text.jsonl", "--sft.data.train", "chats.jsonl")


def run(config: DemoConfig) -> int:
    """Collects, trains, measures and exports in runs/demo; 0, or 1 when the export is not what was trained."""
    started = time.perf_counter()
    print("Collecting text: Python's language reference, docstrings, dialogues")
    texts, chats = corpus.write_data(FOLDER / "data")
    for path in (texts, chats):
        print(f"  {path}: {path.stat().st_size / 1e6:.1f} MB")
    data = ["--pretrain.data.train", str(texts), "--sft.data.train", str(chats)]
    run_pipeline(load_pipeline(["--config", "quickstart", "--name", "demo", *data, *config.arguments]))

    exported = FOLDER / "model"
    from_hf(FOLDER / "sft" / "model", exported, "float32")
    pretrained, tuned = load_engine(str(FOLDER / "pretrain")), load_engine(str(exported))
    difference = export_difference(FOLDER / "sft", exported, tuned)
    before, after = answers(pretrained, SAMPLE_QUESTIONS), answers(tuned, SAMPLE_QUESTIONS)
    samples = list(zip(SAMPLE_QUESTIONS, before, after, strict=True))
    print("\nAsking every question of the dialogues")
    recalls = {language.capitalize(): recall(tuned, language) for language in corpus.LANGUAGES}
    told = {"All": [*itertools.chain(*recalls.values())], **recalls}
    shares = [f"{name}: {sum(found)} of {len(found)} ({sum(found) / len(found):.1%})" for name, found in told.items()]
    verdict = "the same" if difference <= LARGEST_DIFFERENCE else "NOT THE SAME"
    facts = [
        bits_per_byte(FOLDER / "pretrain"),
        *(f"questions answered word for word by greedy decoding, {share}" for share in shares),
        f"{exported}, loaded back: {verdict} as the trained model (largest difference of a logit {difference:.1e})",
    ]
    report = report_text(facts, samples, time.perf_counter() - started)
    write_text(FOLDER / "report.md", report)
    print("\n" + report)
    return 0 if difference <= LARGEST_DIFFERENCE else 1


# Measuring ------------------------------------------------------------------------------------------------------------


def prompt_ids(engine: Engine, turns: Sequence[str]) -> list[int]:
    return encode_prompt(engine.tokenizer, corpus.messages(turns))


def greedy(engine: Engine, prompts: Sequence[Sequence[int]], longest: Sequence[int]) -> list[str]:
    """Greedy answers of at most so many tokens."""
    sampling = SamplingConfig(temperature=0.0)
    requests = [
        Request(tuple(prompt), dataclasses.replace(sampling, max_new_tokens=count))
        for prompt, count in zip(prompts, longest, strict=True)
    ]
    return [answer.text.strip() for answer in engine.answers(requests)]


def answers(engine: Engine, questions: Sequence[str]) -> list[str]:
    prompts = [prompt_ids(engine, [question]) for question in questions]
    return greedy(engine, prompts, [48] * len(prompts))


def recall(engine: Engine, language: str) -> list[bool]:
    """Asks every question of a language's dialogues, with the turns before it: whether each is answered word for word
    with one of its answers."""
    expected = corpus.questions(corpus.dialogues(language))
    longest = [max(len(engine.tokenizer.encode(answer)) for answer in found) + 1 for found in expected.values()]
    made = greedy(engine, [prompt_ids(engine, question) for question in expected], longest)
    return [answer in found for answer, found in zip(made, expected.values(), strict=True)]


def export_difference(run: Path, exported: Path, engine: Engine) -> float:
    """Largest difference of a logit between the run's last checkpoint and the exported folder, loaded from disk."""
    config, params = load_hf(exported)
    model, folder = LanguageModel(config), RunFolder(run)
    tokens_BT = np.array([prompt_ids(engine, [question])[:8] for question in SAMPLE_QUESTIONS])
    trained = load_params(folder.checkpoints / str(folder.checkpoint_steps()[-1]), model.abstract_params())
    logits = [np.asarray(jax.jit(model.apply)(tree, tokens_BT)[0]) for tree in (trained, params)]
    return float(np.abs(logits[0] - logits[1]).max())


def bits_per_byte(run: Path) -> str:
    """Validation of pretraining at its start and its end."""
    rows = [row for row in read_metrics(RunFolder(run).metrics_file) if "val_bits_per_byte" in row]
    (start, first), (end, last) = ((row["step"], row["val_bits_per_byte"]) for row in (rows[0], rows[-1]))
    told = f"{first:.3f} at step {start}, {last:.3f} at step {end} ({last / first:.0%} of it)"
    return f"pretraining, validation bits per byte: {told}"


# Telling --------------------------------------------------------------------------------------------------------------


def report_text(facts: Sequence[str], samples: Sequence[tuple[str, str, str]], seconds: float) -> str:
    """The demo's report: what was measured, answers before and after, and what to type next."""
    lines = "\n".join(
        f"- {question}\n  - before fine-tuning: {before[:120]!r}\n  - after: {after[:120]!r}"
        for question, before, after in samples
    )
    return f"""# Demo

{"".join(f"- {fact}{chr(10)}" for fact in facts)}- this command took {seconds / 60:.1f} minutes

## Answers

{lines}

## Next

Talk with it:

    {command("chat", "--model", FOLDER / "model", "--temperature", 0)}

or in a browser, which `make chat` does as well:

    {command("serve", "--model", FOLDER / "model", "--web", "--open")}

Train on your own files (the records are described in docs/data.md):

    {command("pipeline", "--config", "quickstart", "--name", "mine", *MINE)}

The stages' own reports, with curves: {FOLDER}/pretrain/report.md and {FOLDER}/sft/report.md
"""

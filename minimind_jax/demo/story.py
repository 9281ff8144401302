"""`minimind demo`: a small model learns from real text that every machine can get, answers, and is exported.

The text is collected by `demo.corpus`, the training is the pipeline of configs/quickstart.yaml, and what is printed at
the end is measured here: bits per byte, answers before and after fine-tuning, the share of the dialogues' questions
that the model answers word for word, and that the exported folder computes what was trained.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.config.tools import DemoConfig
from minimind_jax.convert.hf import load_hf
from minimind_jax.convert.load import from_hf
from minimind_jax.data.documents import encode_prompt
from minimind_jax.demo import corpus
from minimind_jax.inference.buckets import bucket
from minimind_jax.inference.generate import Generator
from minimind_jax.inference.load import load_generator
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
BATCH = 64
MINE = ("--pretrain.data.train", "text.jsonl", "--sft.data.train", "chats.jsonl")


class Recall(NamedTuple):
    """Questions of a language, and how many were answered word for word with one of their answers."""

    language: str
    questions: int
    exact: int

    def __str__(self) -> str:
        return f"{self.language}: {self.exact} of {self.questions} ({self.exact / self.questions:.1%})"


def run(config: DemoConfig) -> int:
    """Collects, trains, measures and exports in runs/demo; 0, or 1 when the export is not what was trained."""
    started = time.perf_counter()
    print("Collecting text: Python's language reference, docstrings, dialogues")
    files = collect(FOLDER / "data")
    for path in files.values():
        print(f"  {path}: {path.stat().st_size / 1e6:.1f} MB")
    texts, chats = map(str, files.values())
    data = ["--pretrain.data.train", texts, "--sft.data.train", chats]
    run_pipeline(load_pipeline(["--config", "quickstart", "--name", "demo", *data, *config.arguments]))

    exported = FOLDER / "model"
    from_hf(FOLDER / "sft" / "model", exported, "float32")
    difference = export_difference(FOLDER / "sft", exported)
    pretrained, tuned = load_generator(str(FOLDER / "pretrain")), load_generator(str(exported))
    before, after = answers(pretrained, SAMPLE_QUESTIONS), answers(tuned, SAMPLE_QUESTIONS)
    samples = list(zip(SAMPLE_QUESTIONS, before, after, strict=True))
    print("\nAsking every question of the dialogues")
    recalls = [recall(tuned, language) for language in corpus.LANGUAGES]
    facts = [*bits_per_byte(FOLDER / "pretrain"), *recall_lines(recalls), export_line(exported, difference)]
    report = report_text(facts, samples, time.perf_counter() - started)
    write_text(FOLDER / "report.md", report)
    print("\n" + report)
    return 0 if difference <= LARGEST_DIFFERENCE else 1


def collect(folder: Path) -> dict[str, Path]:
    """The data files, written unless they are there."""
    files = {name: folder / f"{name}.jsonl" for name in ("pretrain", "sft")}
    return files if all(file.is_file() for file in files.values()) else corpus.write_data(folder)


# Measuring ------------------------------------------------------------------------------------------------------------


def prompt_ids(generator: Generator, turns: Sequence[str]) -> list[int]:
    return encode_prompt(generator.tokenizer, corpus.messages(turns))


def greedy(generator: Generator, prompts: Sequence[Sequence[int]], longest: int) -> list[str]:
    """Greedy answers of at most `longest` tokens."""
    sampling = SamplingConfig(max_new_tokens=longest, temperature=0.0)
    return [completion.text.strip() for completion in generator.generate(prompts, sampling)]


def answers(generator: Generator, questions: Sequence[str]) -> list[str]:
    return greedy(generator, [prompt_ids(generator, [question]) for question in questions], 48)


def recall(generator: Generator, language: str) -> Recall:
    """Asks every question of a language's dialogues, with the turns before it; compares answers word for word."""
    expected = corpus.questions(corpus.dialogues(language))
    prompts = {question: prompt_ids(generator, question) for question in expected}
    longest = {q: max(len(generator.tokenizer.encode(a)) for a in found) for q, found in expected.items()}
    exact = 0
    for batch in batches_of_a_size(list(expected), lambda q: len(prompts[q]), longest.get):
        made = greedy(generator, [prompts[q] for q in batch], max(longest[q] for q in batch) + 1)
        exact += sum(answer in expected[question] for question, answer in zip(batch, made, strict=True))
    return Recall(language.capitalize(), len(expected), exact)


def batches_of_a_size(questions: list, prompt_length: Callable, answer_length: Callable) -> Iterator[list]:
    """Batches of prompts that are padded to the same length, with answers about as long: little work is wasted."""

    def size(question):
        return bucket(prompt_length(question), smallest=64, multiple=1024)

    for _, group in itertools.groupby(sorted(questions, key=size), key=size):
        group = sorted(group, key=answer_length)
        for start in range(0, len(group), BATCH):
            yield group[start : start + BATCH]


def export_difference(folder: Path, exported: Path) -> float:
    """Largest difference of a logit between the run's last checkpoint and the exported folder, loaded from disk."""
    config, params = load_hf(exported)
    model = LanguageModel(config)
    generator = load_generator(str(exported), "float32")
    tokens_BT = np.array([prompt_ids(generator, [question])[:8] for question in SAMPLE_QUESTIONS])
    run = RunFolder(folder)
    trained = load_params(run.checkpoints / str(run.checkpoint_steps()[-1]), model.abstract_params())
    logits = [np.asarray(jax.jit(model.apply)(tree, tokens_BT)[0]) for tree in (trained, params)]
    return float(np.abs(logits[0] - logits[1]).max())


def bits_per_byte(run: Path) -> list[str]:
    """Validation of pretraining at its start and its end."""
    rows = [row for row in read_metrics(RunFolder(run).metrics_file) if "val_bits_per_byte" in row]
    first, last = rows[0], rows[-1]
    share = last["val_bits_per_byte"] / first["val_bits_per_byte"]
    return [
        f"pretraining, validation bits per byte: {first['val_bits_per_byte']:.3f} at step {first['step']}, "
        f"{last['val_bits_per_byte']:.3f} at step {last['step']} ({share:.0%} of it)"
    ]


# Telling --------------------------------------------------------------------------------------------------------------


def recall_lines(recalls: Sequence[Recall]) -> list[str]:
    total = Recall("All", sum(r.questions for r in recalls), sum(r.exact for r in recalls))
    return [f"questions answered word for word by greedy decoding, {line}" for line in (total, *recalls)]


def export_line(exported: Path, difference: float) -> str:
    verdict = "the same" if difference <= LARGEST_DIFFERENCE else "NOT THE SAME"
    return f"{exported}, loaded back: {verdict} as the trained model (largest difference of a logit {difference:.1e})"


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

Train on your own files (the records are described in docs/data.md):

    {command("pipeline", "--config", "quickstart", "--name", "mine", *MINE)}

The stages' own reports, with curves: {FOLDER}/pretrain/report.md and {FOLDER}/sft/report.md
"""

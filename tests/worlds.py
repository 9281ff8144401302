"""A tiny world to train in: texts, dialogues, a tokenizer, and settings of runs of a second."""

import csv
import dataclasses
import json
import random
from pathlib import Path

import pytest

from minimind_jax.config.sections import (
    CheckpointConfig,
    LoRAConfig,
    ModelSettings,
    OptimizerConfig,
)
from minimind_jax.config.stages import PretrainConfig, SFTConfig
from minimind_jax.data.tokenizer import train_bpe
from minimind_jax.model.config import ComputeConfig

ADAPTERS = LoRAConfig(rank=4, alpha=8)
WORDS = "the cat sat on a mat while dogs run over green hills and birds sing 你好 世界 很 高兴".split()


def write_lines(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return str(path)


def sentence(rng: random.Random, longest: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(3, longest)))


@dataclasses.dataclass(frozen=True)
class World:
    """folder: holds text.jsonl, chat.jsonl, tokenizer/ and the caches."""

    folder: Path

    def pretrain(self, run: Path, **changes) -> PretrainConfig:
        return self._config(PretrainConfig, run, "text.jsonl", **changes)

    def sft(self, run: Path, **changes) -> SFTConfig:
        return self._config(SFTConfig, run, "chat.jsonl", **{"init_from": "", **changes})

    def _config(self, cls, run, file, training=None, data=None, **changes):
        """`training` and `data` are changes of fields; `changes` of the rest."""
        data = {
            "train": (str(self.folder / file),),
            "val_fraction": 0.05,
            "seq_len": 32,
            "cache_dir": str(self.folder / "cache"),
            "tokenizer_workers": 1,
            **(data or {}),
        }
        training = {
            "steps": 24,
            "batch_tokens": 256,
            "log_every": 1,
            "eval_every": 5,
            "eval_rows": 8,
            **(training or {}),
        }
        settings = {
            "run": str(run),
            "tokenizer": str(self.folder / "tokenizer"),
            "export_dtype": "float32",
            "model": ModelSettings(
                vocab_size=304,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=256,
            ),
            "compute": ComputeConfig(scan_unroll=1),  # a layer is compiled once
            "data": dataclasses.replace(cls().data, **data),
            "training": dataclasses.replace(cls().training, **training),
            "optimizer": OptimizerConfig(learning_rate=3e-3),
            "checkpoint": CheckpointConfig(every=3),
            **changes,
        }
        return cls(**settings)


@pytest.fixture(scope="session")
def world(compilation_cache, tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    rng = random.Random(1)
    texts = [{"text": sentence(rng, 40)} for _ in range(120)]
    chats = [
        {
            "conversations": [
                {"role": "user", "content": sentence(rng, 5)},
                {"role": "assistant", "content": sentence(rng, 8)},
            ]
        }
        for _ in range(120)
    ]
    for name, records in (("text.jsonl", texts), ("chat.jsonl", chats)):
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / name).write_text("".join(lines), "utf-8")
    train_bpe([record["text"] for record in texts], folder / "tokenizer", 304)
    return World(folder)


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory):
    """The runs of a session compile once. A cache that the environment names is used as it is."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(scope="session")
def files(world):
    """Pairs whose better answer says `birds`, and texts labelled by their first word."""
    rng = random.Random(2)
    words = "the cat sat on a mat while dogs run over green hills".split()

    def say(count):
        return " ".join(rng.choice(words) for _ in range(count))

    def pair():
        prompt = {"role": "user", "content": say(4)}
        answers = [{"role": "assistant", "content": f"{start} {say(rng.randint(1, 5))}"} for start in ("birds", "dogs")]
        return {name: [prompt, answer] for name, answer in zip(("chosen", "rejected"), answers, strict=True)}

    def labelled():
        label = rng.choice(["cat", "dogs", "birds"])
        return {"text": f"{label} {say(rng.randint(1, 9))}", "label": label}

    folder = world.folder
    texts = [labelled() for _ in range(150)]
    with open(folder / "labels.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(texts)
    names = {"cat", "dogs", "birds"}
    several = [{"text": t["text"], "label": sorted(names & {t["label"], t["text"].split()[-1]})} for t in texts]
    return {
        "pairs": write_lines(folder / "pairs.jsonl", [pair() for _ in range(60)]),
        "labels": write_lines(folder / "labels.jsonl", texts),
        "csv": str(folder / "labels.csv"),
        "several": write_lines(folder / "several.jsonl", several),
    }


@pytest.fixture(scope="session")
def base(world, tmp_path_factory):
    """A pretrained model to start from."""
    from minimind_jax.stages import start

    return str(start(world.pretrain(tmp_path_factory.mktemp("base") / "base", checkpoint=CheckpointConfig(0))))


@pytest.fixture
def make(world, files, base):
    def make(cls, run, train, **changes):
        rate = OptimizerConfig(learning_rate=changes.pop("rate", 3e-3))
        own = {
            "data": {"train": (files.get(train, train),), "seq_len": 64, "val_fraction": 0.2},
            "training": {"steps": 24, "eval_every": 8, "eval_rows": 0, "batch_tokens": 256},
        }
        for section in own:
            own[section].update(changes.pop(section, {}))
        changes = {"init_from": base, "optimizer": rate, "tokenizer": "", **changes}
        return world._config(cls, run, "chat.jsonl", **own, **changes)

    return make


@pytest.fixture
def lora(make, tmp_path):
    return make(SFTConfig, tmp_path / "lora", "sft", lora=ADAPTERS, data={"train": ()}, rate=1e-2)

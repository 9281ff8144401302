"""Small models to generate with: the golden ones, and one with a tokenizer."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from minimind_jax.convert.hf import save_hf
from minimind_jax.convert.hf_config import to_hf_config
from minimind_jax.data.tokenizer import Tokenizer, train_bpe
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.load import load_model
from minimind_jax.model.config import ModelConfig, TowerConfig, Vision
from minimind_jax.model.transformer import LanguageModel

TEXTS = [
    "The cat sat on the mat, and the dog sat on the log.",
    "你好，世界。今天天气很好，我们去公园散步吧。",
    "User: what is a cat? Assistant: a cat is a small animal. 🐱🐶",
]


def golden_config(fixtures_dir, name) -> ModelConfig:
    values = json.loads((fixtures_dir / f"{name}.json").read_text())
    values.pop("use_moe", None)
    return ModelConfig(**values)


@pytest.fixture(scope="session")
def golden_folder(fixtures_dir, tmp_path_factory):
    """golden_folder(name): a Hugging Face folder of a golden model after its five steps, without a tokenizer."""

    def make(name):
        folder = tmp_path_factory.mktemp(name)
        config = to_hf_config(golden_config(fixtures_dir, name), "float32")
        (folder / "config.json").write_text(json.dumps(config))
        numbers = np.load(fixtures_dir / f"{name}.npz")
        tensors = {key.removeprefix("after5/"): numbers[key] for key in numbers if key.startswith("after5/")}
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make


@pytest.fixture(scope="session")
def golden(golden_folder):
    """golden(name): an Engine of a golden model on token ids."""
    return lambda name: Engine(*load_model(golden_folder(name)))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_bpe(TEXTS * 3, tmp_path_factory.mktemp("tokenizer"), vocab_size=340)


@pytest.fixture(scope="session")
def model_folder(tokenizer, tmp_path_factory):
    """A Hugging Face folder of a random model whose answers are varied text."""
    config = ModelConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=640,
        initializer_range=0.3,
    )
    params = LanguageModel(config).init(jax.random.key(3))
    return save_hf(tmp_path_factory.mktemp("model"), config, params, tokenizer, "float32")


@pytest.fixture(scope="session")
def seeing_folder(tokenizer, tmp_path_factory):
    """The same, of a model that sees: 4 tokens a picture of 8 x 8 pixels."""
    config = ModelConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=640, initializer_range=0.3,
        vision=Vision(TowerConfig(16, 24, 1, 2, 8, 4), tokenizer.vocabulary()["<|image_pad|>"]),
    )  # fmt: skip
    params = LanguageModel(config).init(jax.random.key(3))
    return save_hf(tmp_path_factory.mktemp("seeing"), config, params, tokenizer, "float32")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of pictures 1.png to 5.png of that shade."""
    image, folder = pytest.importorskip("PIL.Image", reason="pictures need Pillow"), tmp_path_factory.mktemp("photos")
    for shade in range(1, 6):
        image.new("RGB", (10, 12), (40 * shade,) * 3).save(folder / f"{shade}.png")
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A tokenizer with the tags of ours, and grammars for its words."""
    from bound_answers import ours  # with packages that the other tests do without

    from minimind_jax.inference.constrain import Grammars

    tokenizer = ours(tmp_path_factory.mktemp("tokenizer"))
    grammars = Grammars(tokenizer)
    yield tokenizer, grammars
    grammars.close()

"""Tiny models and a tiny tokenizer for the tests of conversion."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minimind_jax.config.sections import CheckpointConfig, LoRAConfig, OptimizerConfig
from minimind_jax.convert.hf import save_hf
from minimind_jax.data.tokenizer import train_bpe
from minimind_jax.model.config import ModelConfig, RopeScaling
from minimind_jax.model.lora import init_adapters, join
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.stages import start

_SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Wide enough that logits differ clearly and a wrong tensor shows.
    "initializer_range": 0.2,
}
_MOE = {"num_experts": 4, "moe_intermediate_size": 24}

MODELS = {
    "dense": ModelConfig(**_SIZES),
    "dense_untied": ModelConfig(**_SIZES, tie_word_embeddings=False),
    "dense_head_dim": ModelConfig(**_SIZES, head_dim=12, rope_theta=5e4, rms_norm_eps=1e-5),
    "dense_yarn": ModelConfig(**_SIZES, rope_scaling=RopeScaling("yarn", 4.0, 32, attention_factor=1.0)),
    "dense_linear": ModelConfig(**_SIZES, rope_scaling=RopeScaling("linear", 4.0, 32)),
    "dense_dynamic": ModelConfig(**_SIZES, rope_scaling=RopeScaling("dynamic", 4.0, 32)),
    "moe_k1": ModelConfig(**_SIZES, **_MOE, num_experts_per_tok=1),
    "moe_k2": ModelConfig(**_SIZES, **_MOE, num_experts_per_tok=2),
    "moe_k2_unnormalised_untied": ModelConfig(
        **_SIZES, **_MOE, num_experts_per_tok=2, norm_topk_prob=False, tie_word_embeddings=False
    ),
    "moe_yarn": ModelConfig(
        **_SIZES, **_MOE, num_experts_per_tok=2, rope_scaling=RopeScaling("yarn", 4.0, 32, attention_factor=1.14)
    ),
}


def random_params(config: ModelConfig, seed: int = 0):
    """Random float32 parameters, the norms' not all one, so that none can be left out unnoticed."""
    rng = np.random.default_rng(seed)
    mean = {"scale": 1.0}

    def draw(path, leaf):
        values = config.initializer_range * rng.standard_normal(leaf.shape)
        return jnp.asarray(mean.get(path[-1].key, 0.0) + values, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, LanguageModel(config).abstract_params())


# Two a token are in the unnormalised and the scaled ones, too.
@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if name == "moe_k2" else name for name in MODELS])
def model(request):
    """(name, ModelConfig, Params) of every kind of model in turn."""
    config = MODELS[request.param]
    return request.param, config, random_params(config)


@pytest.fixture
def make_model():
    """A function from a name in MODELS, and fields that differ, to (ModelConfig, Params)."""

    def make(name, **changes):
        config = dataclasses.replace(MODELS[name], **changes)
        return config, random_params(config)

    return make


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A byte-level BPE of at most 400 tokens."""
    texts = ["The quick brown fox jumps over the lazy dog.", "Wer reitet so spät durch Nacht und Wind?", "你好，世界！"]
    return train_bpe(texts * 20, tmp_path_factory.mktemp("tokenizer"), vocab_size=400)


@pytest.fixture
def saved(make_model, tokenizer, tmp_path):
    """A function that writes one of MODELS as a Hugging Face folder."""

    def save(name, words=tokenizer, dtype="float32", **changes):
        config, params = make_model(name, **changes)
        return save_hf(tmp_path / name, config, params, words, dtype)

    return save


@pytest.fixture(scope="session")
def chat_runs(world, tmp_path_factory):
    """Chat models trained here: dense, a mixture, and a dense one's adapters, of which the layers' ranks differ."""
    folder = tmp_path_factory.mktemp("runs")
    changes = {"training": {"steps": 30, "eval_every": 0}, "checkpoint": CheckpointConfig(every=15)}
    dense = world.sft(folder / "dense", **changes)
    mixture = dataclasses.replace(dense.model, **_MOE, num_experts_per_tok=2)
    moe = dataclasses.replace(dense, run=str(folder / "moe"), model=mixture)
    start(dense)
    start(moe)
    lora = LoRAConfig(rank=4, alpha=8, targets=("all-linear",), ranks=("layers.0=2",))
    optimizer, model = OptimizerConfig(learning_rate=5e-2), type(dense.model)()
    base = {"init_from": str(folder / "dense"), "tokenizer": "", "model": model}
    start(world.sft(folder / "adapter", lora=lora, optimizer=optimizer, **base, **changes))
    return folder


def with_adapters(params, table, rslora=False):
    """The parameters with adapters of these ranks that do something."""
    adapters = init_adapters(jax.random.key(0), params, table, 8.0, rslora)
    own = np.random.default_rng(1)

    def draw(path, leaf):
        if path[-1].key != "lora_b":
            return leaf
        ranks = np.array(table[path[-2].key])
        return 0.1 * own.standard_normal(leaf.shape) * (np.arange(leaf.shape[1]) < ranks[:, None])[..., None]

    return join(params, jax.tree_util.tree_map_with_path(draw, adapters))

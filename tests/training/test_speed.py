"""FLOPs of tokens and images, and the share of the devices' peak that they come to."""

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from minimind_jax.config.sections import DataConfig, ImagesConfig, ModelSettings
from minimind_jax.config.stages import SFTConfig, VisionConfig, VLMSFTConfig
from minimind_jax.model.config import ComputeConfig, ModelConfig, TowerConfig, Vision
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.training import speed
from minimind_jax.training.speed import Speed, flops_per_image, flops_per_token


def test_flops_of_a_token_are_six_times_the_matrices_and_attention():
    dense = ModelSettings().resolve()
    matrices = 8 * (768 * 768 * 2 + 2 * 768 * 384 + 3 * 768 * 2432) + 768 * 6400
    assert flops_per_token(dense, 512) == 6 * matrices + 6 * 8 * 768 * 512
    assert flops_per_token(dense, 512, has_words=False) == flops_per_token(dense, 512) - 6 * 768 * 6400
    moe = ModelSettings(preset="minimind-3-moe").resolve()
    assert flops_per_token(moe, 512) == flops_per_token(dense, 512) + 6 * 8 * 768 * 4


VISION = Vision(TowerConfig(16, 24, 2, 2, 8, 4), 12)  # 4 tokens an image
MODEL = LanguageModel(
    ModelConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, vision=VISION,
    ),
    ComputeConfig(),
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA RTX A6000", 155e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA Tesla V100", None),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
    ],
)
def test_a_device_whose_name_begins_as_another_s_has_no_peak_of_its(monkeypatch, kind, peak):
    devices = [SimpleNamespace(device_kind=kind, platform="gpu")] * 2
    monkeypatch.setattr(speed.jax, "devices", lambda: devices)
    assert speed.peak_flops(ComputeConfig()) == (peak and 2 * peak)
    assert speed.peak_flops(ComputeConfig(dtype="float32")) is None


@pytest.mark.parametrize(
    ("train", "cached", "share", "passes"),
    [
        ("tower", False, 1, 3),
        ("all", False, 1, 1),
        ("ends", False, 1 / 2, 1),
        ("projector", True, 0, 0),
        (None, 0, 1, 0),
    ],
)
def test_images_and_layers_that_are_frozen_count_as_what_they_are(monkeypatch, train, cached, share, passes):
    monkeypatch.setattr(speed, "peak_flops", lambda compute: 1e6)
    monkeypatch.setattr(speed.time, "perf_counter", itertools.count().__next__)
    config = SFTConfig(data=DataConfig(seq_len=32))
    if train:
        config = VLMSFTConfig(vision=VisionConfig(train=train), data=ImagesConfig(seq_len=32, cache_features=cached))
    segments, tokens = np.ones((2, 32)), np.zeros((2, 32))
    segments[1, 20:], tokens[:, 4:8], tokens[0, 8:12] = 0, 12, 12
    found = Speed(MODEL, config, 0.0)
    for _ in range(3):
        found.add(found.size_of({"segment_ids": segments, "tokens": tokens}))
    numbers = found.read()
    flops = 52 * flops_per_token(MODEL.config, 32, share) + 3 * flops_per_image(VISION, 16, passes)
    seconds = 2 * 52 / numbers["tokens_per_second"]
    assert numbers["mfu"] == pytest.approx(2 * flops / seconds / 1e6, abs=1e-4)


def test_layers_of_a_tower_that_no_projector_reads_count_nothing():
    last, one_before = (flops_per_image(dataclasses.replace(VISION, feature_layer=n), 16, 1) for n in (-1, -2))
    layer = 4 * (2 * (4 * 16**2 + 2 * 16 * 24) + 4 * 4 * 16)
    assert last - one_before == layer

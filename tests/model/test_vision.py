"""Images in the places of their markers: against a loop over tokens, and what the tower does not look at."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from minimind_jax.model import vision as module
from minimind_jax.model.config import ModelConfig, TowerConfig, Vision
from minimind_jax.model.transformer import LanguageModel

MARKER = 5
TOWER = TowerConfig(16, 24, 2, 2, 20, 6)  # 3 x 3 patches, and two pixels that no patch has
CONFIG = ModelConfig(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.2, vision=Vision(TOWER, MARKER),
)  # fmt: skip
T, IMAGES = 24, 2


@functools.cache
def model_and_params(**changes):
    config = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, **changes))
    model = LanguageModel(config)
    return model, jax.jit(model.init)(jax.random.key(0))


def rows(*runs):
    """Token rows with markers in [start, stop) of each run of a row."""
    tokens = np.random.default_rng(0).integers(6, 40, (len(runs), T))
    for row, spans in zip(tokens, runs, strict=True):
        for start, stop in spans:
            row[start:stop] = MARKER
    return tokens


def batch_of(tokens, seed=1):
    pixels = np.random.default_rng(seed).integers(0, 256, (len(tokens), IMAGES, 20, 20, 3)).astype(np.uint8)
    return {"tokens": tokens, "lengths": np.full(len(tokens), T), "pixels": pixels}


def spliced_slowly(words, tokens, images):
    """Token by token: the n-th marker of a row takes the n-th image token, if there is one."""
    out = np.array(words)
    for row, seen in zip(range(len(tokens)), images, strict=True):
        left = iter(seen)
        for place in np.flatnonzero(tokens[row] == MARKER):
            token = next(left, None)
            if token is not None:
                out[row, place] = token
    return out


def test_each_marker_takes_the_next_image_token_of_its_row():
    n = CONFIG.vision.image_tokens
    one, two, adjacent, cut = [(2, 2 + n)], [(1, 1 + n), (12, 12 + n)], [(3, 3 + 2 * n)], [(0, n), (T - 4, T)]
    tokens = rows(one, two, adjacent, cut, [], [(0, T)])  # none; and more markers than two images have tokens
    rng = np.random.default_rng(3)
    words, images = rng.standard_normal((6, T, 32)), rng.standard_normal((6, IMAGES * n, 32))
    found = jax.jit(module.splice)(words, tokens == MARKER, images)
    np.testing.assert_array_equal(found, spliced_slowly(words.astype(np.float32), tokens, images.astype(np.float32)))


@pytest.mark.parametrize(("projector", "shuffle", "tokens_an_image"), [("llava", 1, 9), ("minimind_v", 3, 1)])
def test_rows_read_what_the_tower_says_of_each_image(projector, shuffle, tokens_an_image):
    model, params = model_and_params(projector=projector, pixel_shuffle=shuffle)
    n = model.config.vision.image_tokens
    assert n == tokens_an_image
    tokens = rows([(2, 2 + 2 * n)], [], [(1, 1 + n)])
    batch = batch_of(tokens)
    pixels = batch.pop("pixels")
    features = jax.jit(model.features)(params, pixels.reshape(-1, 20, 20, 3)).reshape(3, IMAGES, 9, 16)
    images = jax.jit(model.project)(params, features).reshape(3, IMAGES * n, 32)
    words = spliced_slowly(jax.jit(model.embed)(params, tokens), tokens, images)
    expected = jax.jit(model.read_rows)(params, words, lengths_B=batch["lengths"]).hidden_BTD
    for images in ({"pixels": pixels}, {"features": features}):
        found = jax.jit(model.read_batch)(params, {**batch, **images}).hidden_BTD
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_tower_looks_only_at_images_that_stand_in_a_row(monkeypatch):
    model, params = model_and_params()
    n, looked = model.config.vision.image_tokens, []
    look = module.features

    def counted(vision, tower, pixels, *rest):
        jax.debug.callback(lambda: looked.append(len(pixels)))
        return look(vision, tower, pixels, *rest)

    monkeypatch.setattr(module, "features", counted)
    monkeypatch.setattr(module, "IMAGES_AT_ONCE", 2)
    read = jax.jit(model.read_batch)
    for spans, blocks in (([[], [], []], 0), ([[], [(1, 1 + n)], []], 1), ([[(0, 2 * n)], [], [(1, 1 + n)]], 2)):
        read(params, batch_of(rows(*spans))).hidden_BTD.block_until_ready()
        jax.effects_barrier()
        assert len(looked) == blocks, spans
        looked.clear()


def test_a_batch_of_texts_is_read_as_by_the_model_without_eyes():
    model, params = model_and_params()
    texts = {name: array for name, array in batch_of(rows([], [])).items() if name != "pixels"}
    blind = LanguageModel(dataclasses.replace(CONFIG, vision=None))
    found, expected = (jax.jit(each.read_batch)(params, texts).hidden_BTD for each in (model, blind))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_shuffle": 2}, "pixel_shuffle 2 does not divide the 3 patches"),
        ({"projector": "mlp"}, "projector is 'mlp'; it must be llava or minimind_v"),
        ({"feature_layer": -3}, "feature_layer is -3; it must be between -2 and -1"),
        ({"tower": {"num_attention_heads": 3}}, "hidden_size 16 does not divide by its num_attention_heads 3"),
        ({"tower": {"image_size": 4}}, "image_size 4 is below its patch_size 6"),
        ({"tower": {"image_std": (0.5, 0.0, 0.5)}}, "image_std"),
        ({"marker_id": 40}, "the image's marker 40 is no token: vocab_size is 40"),
    ],
)
def test_what_no_model_can_have_is_told(changes, message):
    tower = changes.pop("tower", {})
    with pytest.raises(ValueError, match=message):
        vision = dataclasses.replace(CONFIG.vision, tower=dataclasses.replace(TOWER, **tower), **changes)
        dataclasses.replace(CONFIG, vision=vision)


@pytest.mark.slow
def test_eight_devices_compute_what_one_computes():
    script = Path(__file__).with_name("vision_sharded.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["tower"] > 1e-2, "no gradient reached the tower, so nothing was compared"
    for mesh, differences in report["differences"].items():
        for name, difference in differences.items():
            assert difference < 2e-5, f"{mesh}: {name}"

"""A tiny model that sees, pictures for it, and what an engine of its own says about them."""

import base64
import dataclasses
import io

import jax
import numpy as np
import pytest

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.convert.hf import save_hf
from minimind_jax.data.documents import encode_prompt
from minimind_jax.data.images import open_picture
from minimind_jax.data.tokenizer import train_bpe
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.load import load_engine
from minimind_jax.model.config import ModelConfig, TowerConfig, Vision
from minimind_jax.model.transformer import LanguageModel
from tests.serve.conftest import TEXTS

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")

CONTEXT = 512
MARKER, TOKENS = 12, 4  # <|image_pad|>, and how many an image has
VISION = Vision(TowerConfig(32, 48, 2, 2, 16, 8, resample=2), MARKER)
CONFIG = ModelConfig(
    vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.3, vision=VISION,
)  # fmt: skip


def save_seeing(folder, **changes):
    """A random model whose words depend on what is in its pictures."""
    config = dataclasses.replace(CONFIG, **changes)
    params = LanguageModel(config).init(jax.random.key(3))
    params["vision"] = jax.tree.map(lambda leaf: 2 * leaf, params["vision"])
    return save_hf(folder / "seeing", config, params, train_bpe(TEXTS * 3, folder / "words", vocab_size=360), "float32")


def drawing(seed, width=40, height=30):
    """Blotches, as an image."""
    blotches = np.random.default_rng(seed).integers(0, 256, (3, 4, 3)).astype(np.uint8)
    return Image.fromarray(blotches).resize((width, height))


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def data_url(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


class Reference:
    """An engine of its own over the same folder."""

    def __init__(self, folder):
        self.engine: Engine = load_engine(str(folder), slots=1, context=CONTEXT)

    def read(self, *turns):
        """(ids, pictures) of turns of the user and the assistant, each a list of texts and pictures."""
        marker = self.engine.tokenizer.decode([MARKER], skip_special_tokens=False)
        pictures = [part for turn in turns for part in turn if isinstance(part, bytes)]
        words = ["".join(marker * TOKENS if isinstance(part, bytes) else part for part in turn) for turn in turns]
        roles = ("user", "assistant") * len(turns)
        messages = [{"role": role, "content": text} for role, text in zip(roles, words, strict=False)]
        ids = encode_prompt(self.engine.tokenizer, messages)
        return ids, tuple(open_picture(each, VISION.tower, "picture") for each in pictures)

    def say(self, *turns, tokens=12):
        """What it says greedily."""
        ids, pictures = self.read(*turns)
        assert ids.count(MARKER) == TOKENS * len(pictures)
        sampling = SamplingConfig(max_new_tokens=tokens, temperature=0.0)
        return self.engine.generate([ids], sampling, [pictures])[0].text

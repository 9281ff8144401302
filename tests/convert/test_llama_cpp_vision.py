"""Models that see, in real llama.cpp: the pair of GGUF files answers as the model does."""

import base64
import dataclasses
import functools
import io

import jax
import numpy as np
import pytest

pytest.importorskip("gguf", reason="the gguf package writes the files (the extra of that name)")
pytest.importorskip("xllamacpp", reason="real llama.cpp comes with the oracle extra (xllamacpp)")

from llama_cpp import LlamaCpp

from minimind_jax.convert.gguf import to_gguf
from minimind_jax.convert.hf import save_hf
from minimind_jax.data.images import read_image
from minimind_jax.model.config import ComputeConfig, TowerConfig, Vision
from minimind_jax.model.transformer import LanguageModel
from tests.convert.conftest import MODELS, random_params

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")

pytestmark = pytest.mark.oracle

TOWER = TowerConfig(16, 24, 2, 2, 20, 6)  # 3 x 3 patches, and two pixels that no patch has
COUNT, ROOM = 16, 96
SEES = [(0, "What?"), ("Look here: ", 0, " What?"), (0, 1, "Which?"), ("First ", 1, " and then ", 0, "!")]


def picture(seed, width, height):
    """A PNG file; smooth, as photographs are."""
    rough = np.random.default_rng(seed).integers(0, 256, (3, 4, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def exported(tokenizer, folder, dtype="float32", kind="dense", vision=None):
    """(config, params, a server over the pair of files)."""
    config = dataclasses.replace(MODELS[kind], vision=vision or Vision(TOWER, 12))
    params = random_params(config)
    written = to_gguf(save_hf(folder / "model", config, params, tokenizer, "float32"), folder / "out", dtype)
    return config, params, LlamaCpp(written.files[0], mmproj=written.files[1])


def compare(model, tokenizer, parts, pictures, bound):
    """What llama.cpp answers to `parts`, texts and numbers of pictures, beside what the model makes of the same words.

    Its tokens have to be the likeliest here, as far as `bound`, of log-probabilities, can tell.
    """
    config, params, server = model
    urls = [f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in pictures]
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": urls[part]}}
        for part in parts
    ]
    shown = [pictures[part] for part in parts if not isinstance(part, str)]
    prompt, length, answer, first = server.see([{"role": "user", "content": content}], shown, COUNT)
    said = "".join(part if isinstance(part, str) else "<image>" for part in parts)
    assert prompt == f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ids = tokenizer.encode(prompt.replace("<image>", "<|image_pad|>" * config.vision.image_tokens))
    assert length == len(ids), "llama.cpp puts other tokens around an image"
    pixels = [read_image(data, config.vision.tower, "here") for data in shown]
    pixels += [np.zeros_like(pixels[0])] * (2 - len(pixels))
    tokens = np.zeros((1, ROOM), int)
    tokens[0, : length + COUNT] = [*ids, *answer]
    logits = _program(config)(params, {"tokens": tokens, "lengths": np.array([ROOM]), "pixels": np.stack(pixels)[None]})
    ours = np.asarray(jax.nn.log_softmax(logits))[0, length - 1 : length - 1 + COUNT]
    difference = max(abs(ours[0, token] - logprob) for token, logprob in first.items())
    print(f"\n{parts}: log-probabilities of the first token differ by at most {difference:.1e}")
    assert difference <= bound
    assert len(answer) == COUNT
    assert (ours[np.arange(COUNT), answer] >= ours.max(-1) - 2 * bound).all()


@functools.cache
def _program(config):
    model = LanguageModel(config, ComputeConfig(dtype="float32"))
    return jax.jit(lambda params, batch: model.logits(params, model.read_batch(params, batch).hidden_BTD))


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 3e-3), ("float16", 1e-2)])
def test_pictures_wherever_they_stand(dtype, bound, tokenizer, tmp_path):
    model = exported(tokenizer, tmp_path, dtype)
    pictures = [picture(seed, 20, 20) for seed in (1, 2)]
    for parts in SEES:
        compare(model, tokenizer, parts, pictures, bound)


def test_pictures_of_any_shape_are_stretched_as_here(tokenizer, tmp_path):
    """Only rounding is left between llama.cpp's bicubic filter and Pillow's."""
    model = exported(tokenizer, tmp_path)
    for width, height in ((31, 47), (11, 9), (64, 20), (300, 200)):
        compare(model, tokenizer, ("What? ", 0), [picture(3, width, height)], 0.05)


SMALL = TowerConfig(16, 24, 3, 4, 16, 4, 1e-5, rescale_factor=1 / 128, image_mean=(1, 0.9, 1.1), image_std=(1, 1, 0.8))


@pytest.mark.parametrize(
    ("kind", "vision"),
    [
        ("moe_k2", Vision(SMALL, 12, feature_layer=-2)),
        ("dense_untied", Vision(SMALL, 12, projector_act="gelu_pytorch_tanh")),
    ],
)
def test_other_towers_and_text_models(kind, vision, tokenizer, tmp_path):
    model = exported(tokenizer, tmp_path, kind=kind, vision=vision)
    compare(model, tokenizer, ("What? ", 1, 0), [picture(seed, 16, 16) for seed in (1, 2)], 3e-3)

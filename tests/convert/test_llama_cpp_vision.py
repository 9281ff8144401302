"""Models that see, in real llama.cpp: the pair of GGUF files answers as the model does."""

import base64
import dataclasses
import functools
import io
import random

import jax
import numpy as np
import pytest

pytest.importorskip("gguf", reason="the gguf package writes the files (the extra of that name)")
pytest.importorskip("xllamacpp", reason="real llama.cpp comes with the oracle extra (xllamacpp)")

from llama_cpp import LlamaCpp
from worlds import write_lines

from minimind_jax.cli import main
from minimind_jax.config.generation import SamplingConfig
from minimind_jax.config.sections import OptimizerConfig
from minimind_jax.config.stages import VisionConfig, VLMSFTConfig
from minimind_jax.convert.gguf import adapter_to_gguf, to_gguf
from minimind_jax.convert.hf import load_hf, save_hf
from minimind_jax.convert.peft import rank_table, save_peft
from minimind_jax.data.documents import encode_prompt
from minimind_jax.data.images import read_image
from minimind_jax.data.pictures import marker_of
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.image_prompts import open_images
from minimind_jax.model.config import ComputeConfig, TowerConfig, Vision
from minimind_jax.model.lora import init_adapters, join
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.stages import start
from tests.convert.conftest import MODELS, random_params

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")

pytestmark = pytest.mark.oracle

TOWER = TowerConfig(16, 24, 2, 2, 20, 6)  # 3 x 3 patches, and two pixels that no patch has
COUNT, ROOM = 16, 96
DATA_URL = "data:image/png;base64,"
SEES = [(0, "What?"), ("Look here: ", 0, " What?"), (0, 1, "Which?"), ("First ", 1, " and then ", 0, "!")]


def picture(seed, width, height):
    """A PNG file; smooth, as photographs are."""
    rough = np.random.default_rng(seed).integers(0, 256, (3, 4, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def asking(parts):
    """The message of a user: texts, and the contents of files as data URLs."""

    def part_of(part):
        if isinstance(part, str):
            return {"type": "text", "text": part}
        return {"type": "image_url", "image_url": {"url": DATA_URL + base64.b64encode(part).decode()}}

    return [{"role": "user", "content": list(map(part_of, parts))}]


def content_of(url, place):
    return base64.b64decode(url.removeprefix(DATA_URL))


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
    shown = [pictures[part] for part in parts if not isinstance(part, str)]
    messages = asking(part if isinstance(part, str) else pictures[part] for part in parts)
    prompt, length, answer, first = server.see(messages, shown, COUNT)
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


def test_an_adapter_over_both_files_of_its_base_is_the_merged_model(tokenizer, tmp_path):
    config, params, alone = exported(tokenizer, tmp_path)
    table = rank_table(config, 4, ("all-linear",), {"layers.1": 2})
    drawn = np.random.default_rng(1)
    draw = lambda path, leaf: leaf if path[-1].key == "lora_scale" else 0.1 * drawn.standard_normal(leaf.shape)  # noqa: E731
    adapters = jax.tree_util.tree_map_with_path(draw, init_adapters(jax.random.key(0), params, table, 8.0, False))
    folder = save_peft(tmp_path / "adapter", join(params, adapters), table, base=tmp_path / "model", sees=True)
    adapter = adapter_to_gguf(folder, tmp_path / "adapter.gguf").files[0]
    merged = to_gguf(folder, tmp_path / "merged.gguf").files
    base = [tmp_path / "out" / name for name in ("model.gguf", "mmproj-model.gguf")]
    shown = [picture(1, 20, 20)]
    asked = (asking([*shown, "What?"]), shown, 8)
    over, whole = LlamaCpp(base[0], adapter, base[1]).see(*asked), LlamaCpp(merged[0], mmproj=merged[1]).see(*asked)
    assert over[2] == whole[2]
    assert all(abs(over[3][token] - whole[3][token]) < 1e-3 for token in over[3])
    assert alone.see(*asked)[3] != over[3]


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230), "yellow": (230, 220, 40)}


def square(colour, rng, width=20, height=20):
    """A PNG file of a square of that colour somewhere on grey."""
    image, side = Image.new("RGB", (width, height), (128, 128, 128)), min(width, height) * 3 // 5
    x, y = rng.randrange(width - side), rng.randrange(height - side)
    image.paste(COLOURS[colour], (x, y, x + side, y + side))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """The run of a model that learned to name the colour of a square, in its own words."""
    folder, rng = tmp_path_factory.mktemp("squares"), random.Random(0)
    words = Tokenizer.load(world.folder / "tokenizer")
    for name, vision in (("text", None), ("tower", Vision(TowerConfig(32, 48, 2, 2, 16, 8), 12))):
        config = dataclasses.replace(MODELS["dense"], vocab_size=304, vision=vision, initializer_range=0.1)
        save_hf(folder / name, config, jax.jit(LanguageModel(config).init)(jax.random.key(0)), words, "float32")
    records = []
    for n in range(64):
        colour = list(COLOURS)[n % 4]
        (folder / f"{n}.png").write_bytes(square(colour, rng))
        asked = rng.choice(["<image>which?", "which?<image>"])
        talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": colour}]
        records.append({"conversations": talk, "image": f"{n}.png"})
    config = VLMSFTConfig(
        run=str(folder / "run"), init_from=str(folder / "text"), export_dtype="float32",
        compute=ComputeConfig(scan_unroll=1), optimizer=OptimizerConfig(learning_rate=3e-3),
        vision=VisionConfig(tower=str(folder / "tower"), train="tower"),
    )  # fmt: skip
    training = dataclasses.replace(config.training, batch_tokens=384, steps=60, eval_every=0)
    data = dataclasses.replace(
        config.data, train=(write_lines(folder / "squares.jsonl", records),), seq_len=96, val_fraction=0.0,
        cache_dir=str(folder / "cache"), tokenizer_workers=1,
    )  # fmt: skip
    return start(dataclasses.replace(config, training=training, data=data)).parent


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_trained_model_says_the_same_text_of_pictures(dtype, trained, tmp_path):
    config, params = load_hf(trained / "run" / "model")
    words = Tokenizer.load(trained / "run" / "model")
    engine = Engine(LanguageModel(config), params, words, slots=2, context=128)
    assert main(["convert", "to-gguf", str(trained / "run"), str(tmp_path / "out"), "--dtype", dtype]) == 0
    server = LlamaCpp(tmp_path / "out" / "model.gguf", mmproj=tmp_path / "out" / "mmproj-model.gguf")
    rng = random.Random(1)
    shown = [square(colour, rng, *size) for colour in COLOURS for size in ((16, 16), (60, 33))]
    asked = [[data, "which?"] for data in shown]
    asked += [[shown[0], shown[5], "which?"], ["the ", shown[2], " which? ", shown[7]]]
    answers = []
    for parts in asked:
        messages = asking(parts)
        opened, pictures = open_images(messages, config.vision, marker_of(words, config.vision), content_of)
        sampling = SamplingConfig(max_new_tokens=12, temperature=0.0)
        ours = engine.generate([encode_prompt(words, opened)], sampling, [pictures])[0].text
        said = server.ask(
            "/v1/chat/completions", messages=messages, max_tokens=12, temperature=0,
            chat_template_kwargs={"enable_thinking": False},
        )  # fmt: skip
        assert said["choices"][0]["message"]["content"] == ours
        answers.append(ours)
    assert len(set(answers[: len(shown)])) == len(COLOURS), "the pictures are hardly looked at"

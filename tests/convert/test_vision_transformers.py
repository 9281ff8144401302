"""Models that see in transformers, and its models here: towers, whole models, processors and texts.

scripts/check_transformers_457.sh runs this with 4.57, too.
"""

import dataclasses
import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minimind_jax.convert.hf import Labels, load_hf, read_hf_config, save_hf
from minimind_jax.convert.hf_vision import open_tower
from minimind_jax.convert.torch_checkpoint import to_torch
from minimind_jax.data.images import read_image
from minimind_jax.errors import UserError
from minimind_jax.model import vision as seeing
from minimind_jax.model.config import TowerConfig, Vision
from minimind_jax.model.transformer import LanguageModel
from tests.convert.conftest import MODELS, random_params

torch = pytest.importorskip("torch", reason="the comparison needs torch")
transformers = pytest.importorskip("transformers", reason="the comparison needs transformers")
Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")

MARKER = 12  # <|image_pad|>
TOWER = TowerConfig(16, 24, 2, 2, 20, 6, resample=2)  # 3 x 3 patches, and two pixels that no patch has
N = 9
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 20, 20, 3)).astype(np.uint8)


def seeing_config(**changes):
    return dataclasses.replace(MODELS["dense"], vision=Vision(TOWER, MARKER, **changes))


def normalised(pixels):
    """As transformers' models read pixels: channels first."""
    return torch.tensor(pixels.astype(np.float32) / 255 * 2 - 1).permute(0, 3, 1, 2).contiguous()


def randomise(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def their_tower():
    fields = {name: getattr(TOWER, name) for name in ("hidden_size", "intermediate_size", "image_size", "patch_size")}
    config = transformers.SiglipVisionConfig(num_hidden_layers=2, num_attention_heads=2, **fields)
    return randomise(transformers.SiglipVisionModel(config))


@pytest.fixture(scope="module")
def tower_folder(their_tower, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tower")
    their_tower.save_pretrained(folder)
    transformers.SiglipImageProcessor(size={"height": 20, "width": 20}, resample=2).save_pretrained(folder)
    return folder


def test_the_tower_says_what_transformers_says(their_tower, tower_folder):
    tower = open_tower(tower_folder)
    assert tower.config == TOWER
    with torch.no_grad():
        out = their_tower(normalised(PIXELS), output_hidden_states=True)
    expected = {"llava": out.hidden_states[-1], "minimind_v": out.last_hidden_state}
    for projector, theirs in expected.items():
        vision = Vision(tower.config, MARKER, projector)
        ours = jax.jit(lambda params, vision=vision: seeing.features(vision, params, PIXELS, jnp.float32, "cpu"))
        np.testing.assert_allclose(ours(tower.params()), theirs, atol=1e-4)
    second = Vision(tower.config, MARKER, feature_layer=-2)
    found = jax.jit(lambda params: seeing.features(second, params, PIXELS, jnp.float32, "cpu"))(tower.params())
    np.testing.assert_allclose(found, out.hidden_states[-2], atol=1e-4)


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    config = seeing_config()
    params = random_params(config)
    return config, params, save_hf(tmp_path_factory.mktemp("seeing") / "model", config, params, tokenizer, "float32")


@pytest.fixture(scope="module")
def theirs(exported):
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        exported[2], torch_dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def rows(*runs):
    tokens = np.random.default_rng(1).integers(20, 400, (len(runs), 30))
    for row, starts in zip(tokens, runs, strict=True):
        for start in starts:
            row[start : start + N] = MARKER
    return tokens


def test_the_whole_model_computes_what_transformers_computes(exported, theirs):
    config, params, _ = exported
    model = LanguageModel(config)
    read = jax.jit(lambda params, batch: model.logits(params, model.read_batch(params, batch).hidden_BTD))
    for name, starts in {"one": [3], "two": [1, 15], "adjacent": [4, 4 + N]}.items():
        tokens, pixels = rows(starts), PIXELS[: len(starts)]
        slots = np.concatenate([pixels, np.zeros((2 - len(pixels), 20, 20, 3), np.uint8)])[None]
        ours = read(params, {"tokens": tokens, "lengths": np.array([30]), "pixels": slots})
        with torch.no_grad():
            expected = theirs(input_ids=torch.tensor(tokens), pixel_values=normalised(pixels)).logits
        difference = np.abs(ours - expected.numpy()).max()
        print(f"\ntransformers {transformers.__version__}, {name}: logits differ by at most {difference:.1e}")
        assert difference <= 1e-4, name


def greedy(model, params, ids, pixels, count):
    """Our next `count` tokens; one program for rows of one length."""
    batch = {"tokens": np.array([ids + [0] * count]), "pixels": pixels[None]}
    read = jax.jit(lambda params, batch: model.logits(params, model.read_batch(params, batch).hidden_BTD))
    for end in range(len(ids), len(ids) + count):
        logits = read(params, {**batch, "lengths": np.array([end])})
        batch["tokens"][0, end] = int(jnp.argmax(logits[0, end - 1]))
    return batch["tokens"][0, len(ids) :].tolist()


def test_the_processor_and_the_template_place_images_and_the_text_is_ours(exported, theirs, tokenizer):
    config, params, folder = exported
    processor = transformers.AutoProcessor.from_pretrained(folder)
    pictures = [
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (31, 47, 3)).astype(np.uint8)) for seed in (1, 2)
    ]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert prompt.startswith("<|im_start|>user\n<|image_pad|><|image_pad|>What?<|im_end|>\n<|im_start|>assistant\n")
    inputs = processor(text=prompt, images=pictures, return_tensors="pt")
    ids = tokenizer.encode(prompt.replace("<|image_pad|>", "<|image_pad|>" * N))
    assert inputs["input_ids"][0].tolist() == ids

    files = [io.BytesIO() for _ in pictures]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file, "PNG")
    ours = np.stack([read_image(file.getvalue(), config.vision.tower, "here") for file in files])
    np.testing.assert_allclose(inputs["pixel_values"], normalised(ours), atol=1e-6)

    generated = theirs.generate(**inputs, do_sample=False, max_new_tokens=6, eos_token_id=None)[0, len(ids) :]
    assert greedy(LanguageModel(config), params, ids, ours, 6) == generated.tolist()

    longer = prompt.replace("What?", "What is in these two?")
    inputs = processor(text=[prompt, longer], images=[pictures, pictures], padding=True, return_tensors="pt")
    together = theirs.generate(**inputs, do_sample=False, max_new_tokens=6, eos_token_id=None)
    assert inputs["input_ids"].shape[1] > len(ids) and together[0, -6:].tolist() == generated.tolist()


def test_a_folder_written_by_transformers_comes_back(exported, theirs, tmp_path):
    """Without a processor beside it, of which the settings are then SigLIP's."""
    config, params, _ = exported
    theirs.save_pretrained(tmp_path / "theirs")
    loaded, tensors = load_hf(tmp_path / "theirs")
    tower = dataclasses.replace(TOWER, resample=3)
    assert loaded.vision == dataclasses.replace(config.vision, tower=tower)
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    assert dataclasses.replace(loaded, vision=config.vision, **ids) == config
    jax.tree.map(np.testing.assert_array_equal, tensors, jax.tree.map(np.asarray, params))


@pytest.mark.parametrize("legacy", [False, True])
def test_names_of_earlier_transformers_and_a_head_that_pools_are_read(legacy, exported, tmp_path):
    _, params, folder = exported
    tensors = load_file(folder / "model.safetensors")
    if legacy:  # before 4.52
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        tensors = {re.sub("^language_model", "language_model.model", name): t for name, t in tensors.items()}
        assert "language_model.model.norm.weight" in tensors and "multi_modal_projector.linear_1.bias" in tensors
    tower = "vision_tower.vision_model" if legacy else "model.vision_tower"  # which 5 writes, and 4.57 leaves random
    tensors = {
        re.sub(r"^(model\.)?vision_tower\.vision_model", tower, name): tensor for name, tensor in tensors.items()
    }
    tensors |= {f"{tower}.head.probe": np.ones((1, 1, 16), np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).symlink_to(folder / name)
    loaded, found = load_hf(tmp_path)
    assert loaded == load_hf(folder)[0]
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(np.asarray, params))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy is 'default'"),
        ({"vision_feature_layer": [-1, -2]}, r"vision_feature_layer is \[-1, -2\]"),
        ({"vision_feature_layer": 0}, "feature_layer is -3; it must be between -2 and -1"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias is False"),
        ({"projector_hidden_act": "relu"}, "projector_act is 'relu'; it must be gelu"),
        ({"image_token_index": 4000}, "the image's marker 4000 is no token"),
        ({"text_config": {"model_type": "llama"}}, "text_config: model_type 'llama' is not supported"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "the tower's model_type is 'clip_vision_model'"),
    ],
)
def test_models_that_are_computed_otherwise_are_refused(changes, message, exported, tmp_path):
    values = json.loads((exported[2] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))
    with pytest.raises(UserError, match=message):
        load_hf(tmp_path)


def test_a_layer_counted_from_the_first_is_the_same_one(exported, tmp_path):
    values = json.loads((exported[2] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "vision_feature_layer": 1}))
    assert read_hf_config(tmp_path).vision.feature_layer == -2


def without_eyes(config, params):
    return dataclasses.replace(config, vision=None), {name: tree for name, tree in params.items() if name != "vision"}


def test_a_gguf_file_has_its_half_of_words(exported, tokenizer, tmp_path):
    gguf = pytest.importorskip("gguf", reason="the gguf package writes the files")
    from minimind_jax.convert.gguf import to_gguf

    config, params, folder = exported
    text = save_hf(tmp_path / "text", *without_eyes(config, params), tokenizer, "float32")
    written = [to_gguf(folder, tmp_path / "0.gguf"), to_gguf(text, tmp_path / "1.gguf")]
    readers = [gguf.GGUFReader(each.files[0]) for each in written]
    ours, expected = ({tensor.name: tensor.data.tobytes() for tensor in reader.tensors} for reader in readers)
    assert ours == expected


def test_what_it_cannot_be_written_as_is_told_and_nothing_of_it_stays(exported, tokenizer, tmp_path):
    config, params, folder = exported
    with pytest.raises(UserError, match="is a model that sees, which is written as a Hugging Face folder only"):
        to_torch(folder, tmp_path / "out.pth")
    with pytest.raises(UserError, match="a classifier or reward model that sees cannot be written"):
        save_hf(tmp_path / "scores", config, params, labels=Labels(("a", "b")))
    # A processor that stays behind would make others take a model of texts for one that sees.
    save_hf(tmp_path / "copy", config, params, tokenizer)
    assert len(list((tmp_path / "copy").glob("*processor_config.json"))) == 2
    save_hf(tmp_path / "copy", *without_eyes(config, params), tokenizer)
    assert not list((tmp_path / "copy").glob("*processor_config.json"))

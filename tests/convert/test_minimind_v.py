"""MiniMind-V's checkpoints: its own logits (tests/fixtures/minimind_v.npz, made by its code), and what is none."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from minimind_jax.cli import main
from minimind_jax.convert.hf import load_hf
from minimind_jax.convert.hf_vision import open_tower
from minimind_jax.convert.load import from_hf
from minimind_jax.convert.torch_checkpoint import from_torch
from minimind_jax.errors import UserError
from minimind_jax.model.transformer import LanguageModel

torch = pytest.importorskip("torch", reason="PyTorch files need torch")

EVERY = 8  # of the logits the fixture has


@pytest.fixture(scope="module")
def golden(fixtures_dir):
    return np.load(fixtures_dir / "minimind_v.npz")


def state_of(golden, prefix="state/"):
    return {name.removeprefix(prefix): golden[name] for name in golden.files if name.startswith(prefix)}


@pytest.fixture(scope="module")
def tower(golden, tmp_path_factory):
    """As Google's folders are: of the whole SigLIP, whose sizes are said where they differ from the usual ones."""
    folder = tmp_path_factory.mktemp("siglip")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"model_type": "siglip_vision_model", **sizes, "image_size": 16, "patch_size": 8}
    (folder / "config.json").write_text(
        json.dumps({"model_type": "siglip", "vision_config": vision, "text_config": {}})
    )
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 16, "width": 16}, "resample": 2}))
    tensors = {f"vision_model.{name}": array for name, array in state_of(golden, "tower/").items()}
    others = {"vision_model.head.probe": (1, 1, 16), "text_model.encoder.layers.0.mlp.fc1.bias": (24,)}
    tensors |= {name: np.ones(shape, np.float16) for name, shape in others.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def torch_state(golden):
    return {name: torch.tensor(array) for name, array in state_of(golden).items()}


def logits(folder, golden):
    config, params = load_hf(folder)
    model, pixels = LanguageModel(config), golden["pixels"]
    batch = {"tokens": golden["tokens"], "lengths": np.full(2, golden["tokens"].shape[1]), "pixels": pixels}
    read = jax.jit(lambda params, batch: model.logits(params, model.read_batch(params, batch).hidden_BTD))
    return np.asarray(read(params, batch))[..., ::EVERY]


def test_a_pth_is_read_and_computes_what_minimind_v_computes(golden, tower, tokenizer, tmp_path):
    state = {
        **torch_state(golden),
        "vision_encoder.embeddings.patch_embedding.bias": torch.zeros(16),
    }  # in resume files
    torch.save({"model": state, "epoch": 1}, tmp_path / "sft_vlm.pth")
    files = [str(tmp_path / "sft_vlm.pth"), str(tmp_path / "model")]
    assert main(["convert", "from-torch", *files, "--tokenizer", str(tokenizer.folder), "--vision", str(tower)]) == 0
    np.testing.assert_allclose(logits(tmp_path / "model", golden), golden["logits"], atol=1e-4)
    config = load_hf(tmp_path / "model")[0]
    assert (config.vision.marker_id, config.vision.image_tokens, config.vision.tower.resample) == (12, 4, 2)
    # No class of transformers has this projector: it must be refused there, not computed as another.
    transformers = pytest.importorskip("transformers", reason="the comparison needs transformers")
    with pytest.raises((ValueError, KeyError), match="minimind_jax_vlm"):
        transformers.AutoConfig.from_pretrained(tmp_path / "model")


def write_folder(folder, golden, tokenizer, **changes):
    """As MiniMind-V's convert_vlm.py does."""
    folder.mkdir()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 400}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 1e6}
    own = {"image_ids": [12], "image_hidden_size": 16, "image_token_len": 4, "image_special_token": "<|image_pad|>"}
    values = {"model_type": "minimind-v", "architectures": ["MiniMindVLM"], **sizes, **heads, **own, **changes}
    (folder / "config.json").write_text(json.dumps(values))
    torch.save(torch_state(golden), folder / "pytorch_model.bin")
    tokenizer.save(folder)
    return folder


def test_a_folder_of_minimind_v_is_read(golden, tower, tokenizer, tmp_path):
    source = write_folder(tmp_path / "theirs", golden, tokenizer)
    config = from_hf(source, tmp_path / "model", vision=tower)
    assert load_hf(tmp_path / "model")[0] == config
    np.testing.assert_allclose(logits(tmp_path / "model", golden), golden["logits"], atol=1e-4)
    again = from_hf(tmp_path / "model", tmp_path / "again")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, *(load_hf(tmp_path / name)[1] for name in ("model", "again")))


def test_what_does_not_belong_together_is_refused(golden, tower, tokenizer, tmp_path):
    state = torch_state(golden)
    torch.save(state, tmp_path / "v.pth")
    with pytest.raises(UserError, match=r"v\.pth is MiniMind-V's and comes without its tower: .* --vision FOLDER"):
        from_torch(tmp_path / "v.pth", tmp_path / "model", None)
    older = {name.replace("mlp.0", "vision_proj.0"): tensor for name, tensor in state.items()}
    torch.save(older, tmp_path / "old.pth")
    with pytest.raises(UserError, match="the projector of an older MiniMind-V"):
        from_torch(tmp_path / "old.pth", tmp_path / "model", None, vision=tower)
    text = {name: tensor for name, tensor in state.items() if "vision" not in name}
    torch.save(text, tmp_path / "text.pth")
    with pytest.raises(UserError, match="has no projector; leave it out"):
        from_torch(tmp_path / "text.pth", tmp_path / "model", None, vision=tower)
    wider = {**state, "vision_proj.mlp.0.weight": torch.zeros(24)}
    torch.save(wider, tmp_path / "wide.pth")
    with pytest.raises(UserError, match=r"layer_norm\.weight has shape \(24,\), the configuration says \(16,\)"):
        from_torch(tmp_path / "wide.pth", tmp_path / "model", None, vision=tower)
    folder = write_folder(tmp_path / "more", golden, tokenizer, image_token_len=64)
    with pytest.raises(UserError, match=r"an image is 64 tokens, and the tower .* makes 4; it is another tower"):
        from_hf(folder, tmp_path / "model", vision=tower)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config", {"model_type": "siglip2_vision_model"}, "NaFlex models, of no fixed resolution, are not read"),
        ("config", {"model_type": "clip_vision_model"}, "the tower's model_type is 'clip_vision_model'"),
        ("config", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'; it must be gelu or gelu_pytorch_tanh"),
        ("config", {"num_hidden_layers": 3}, r"missing tensors: .*encoder\.layers\.2"),
        ("config", {"image_size": "16"}, "'16' is no whole number"),
        ("preprocessor_config", {"size": {"height": 224, "width": 224}}, "the tower reads images of 16 x 16"),
        ("preprocessor_config", {"do_center_crop": True}, "cropped"),
        ("preprocessor_config", {"image_processor_type": "CLIPImageProcessor"}, "it must be SiglipImageProcessor"),
        ("preprocessor_config", {"image_mean": [0.5]}, r"image_mean is \[0\.5\]; expected three numbers"),
    ],
)
def test_towers_that_are_not_computed_are_refused(file, changes, message, golden, tower, tmp_path):
    for name in ("config", "preprocessor_config"):
        values = json.loads((tower / f"{name}.json").read_text())
        (values["vision_config"] if name == "config" else values).update(changes if name == file else {})
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").symlink_to(tower / "model.safetensors")
    torch.save(torch_state(golden), tmp_path / "v.pth")
    with pytest.raises(UserError, match=message):
        from_torch(tmp_path / "v.pth", tmp_path / "model", None, vision=tmp_path)


def test_a_tower_that_does_not_say_how_it_reads_pictures_is_told(golden, tower, tmp_path, capfd):
    folder = shutil.copytree(tower, tmp_path / "tower")
    open_tower(folder)
    assert not capfd.readouterr().err
    (folder / "preprocessor_config.json").unlink()
    for _ in range(2):
        assert open_tower(folder).config.resample == 3
    assert capfd.readouterr().err.count("does not say how its tower reads pictures") == 1


def test_a_processor_that_leaves_numbers_as_they_are(golden, tower, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(tower / name)
    nested = {"image_processor": {"size": {"height": 16, "width": 16}, "do_rescale": False, "do_normalize": False}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    found = open_tower(tmp_path).config
    raw = {"rescale_factor": 1.0, "image_mean": (0.0,) * 3, "image_std": (1.0,) * 3, "resample": 3}
    assert found == dataclasses.replace(open_tower(tower).config, **raw)

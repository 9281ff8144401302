"""The second GGUF file of a model that sees: what is in it, and what llama.cpp cannot run."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("gguf", reason="the gguf package writes the files (the extra of that name)")

from test_gguf import read

from minimind_jax.cli import main
from minimind_jax.config.tools import ToGGUFConfig
from minimind_jax.convert.gguf import params_to_gguf, to_gguf
from minimind_jax.convert.hf import load_hf, save_hf
from minimind_jax.errors import UserError
from minimind_jax.model.config import TowerConfig, Vision
from tests.convert.conftest import MODELS, random_params

TOWER = TowerConfig(16, 24, 3, 2, 20, 6, rescale_factor=1 / 100, image_mean=(0.2, 0.3, 0.4))


@pytest.fixture
def seeing(tokenizer, tmp_path):
    """A function from fields of Vision to the folder of a model."""

    def make(tower=TOWER, **fields):
        config = dataclasses.replace(MODELS["dense"], vision=Vision(tower, 12, **fields))
        return save_hf(tmp_path / "eye", config, random_params(config), tokenizer, "float32")

    return make


def test_what_is_in_the_files(seeing, tmp_path):
    folder = seeing()
    params = load_hf(folder)[1]["vision"]
    written = to_gguf(folder, tmp_path / "out", "float16")
    assert [file.name for file in written.files] == ["model.gguf", "mmproj-model.gguf", "Modelfile"]
    text, text_tensors = read(written.files[0])
    assert text["general.architecture"] == "qwen3"
    assert not any(name.startswith(("v.", "mm.")) for name in text_tensors)
    values, tensors = read(written.files[1])
    assert {key: value for key, value in values.items() if not key.startswith("GGUF")} == {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "general.name": "eye",
        "general.size_label": "9.4K",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": True,
        "clip.vision.image_size": 20,
        "clip.vision.patch_size": 6,
        "clip.vision.embedding_length": 16,
        "clip.vision.feed_forward_length": 24,
        "clip.vision.block_count": 3,
        "clip.vision.attention.head_count": 2,
        "clip.vision.attention.layer_norm_epsilon": pytest.approx(1e-6),
        "clip.vision.projection_dim": 32,
        "clip.vision.image_mean": pytest.approx([0.2 * 100 / 255, 0.3 * 100 / 255, 0.4 * 100 / 255]),
        "clip.vision.image_std": pytest.approx([0.5 * 100 / 255] * 3),
        "clip.vision.feature_layer": [3],
        "clip.vision.image_grid_pinpoints": [0, 0],
    }
    patch, up = tensors["v.patch_embd.weight"], tensors["v.blk.2.ffn_up.weight"]
    assert (patch.tensor_type.name, patch.data.shape) == ("F16", (16, 3, 6, 6))
    np.testing.assert_array_equal(up.data, params["tower"]["layers"]["fc1"]["kernel"][2].T.astype(np.float16))
    np.testing.assert_array_equal(tensors["mm.2.bias"].data, params["projector"]["linear_2"]["bias"])
    assert tensors["v.position_embd.weight"].tensor_type.name == "F32"
    assert len(tensors) == 3 + 3 * 16 + 4, "the last norm is left out: no projector of the kind reads it"
    assert any("GELU by its tanh formula" in note for note in written.notes)
    assert not any("bicubic" in note for note in written.notes)
    assert "\nFROM ./model.gguf\nFROM ./mmproj-model.gguf\nTEMPLATE" in written.files[2].read_text("utf-8")


def test_layers_that_the_projector_does_not_read_are_left_out(seeing, tmp_path):
    tower = dataclasses.replace(TOWER, resample=2)
    folder = seeing(tower, feature_layer=-2, projector_act="gelu_pytorch_tanh")
    written = to_gguf(folder, tmp_path / "my.gguf", "q8_0")
    assert written.files[1].name == "mmproj-my.gguf"
    values, tensors = read(written.files[1])
    assert (values["clip.vision.block_count"], values["clip.vision.feature_layer"]) == (2, [2])
    assert not any(name.startswith("v.blk.2.") for name in tensors)
    assert tensors["mm.0.weight"].tensor_type.name == "F16"
    assert any("20 x 20 pixels" in note for note in written.notes)
    assert not any("GELU" in note for note in written.notes)
    everything = read(to_gguf(folder, tmp_path / "whole").files[1])[1]
    assert {tensor.tensor_type.name for tensor in everything.values()} == {"F32"}


@pytest.mark.parametrize(
    ("fields", "told"),
    [({"projector": "minimind_v"}, "a norm in front"), ({"pixel_shuffle": 3}, "pixel_shuffle 3")],
)
def test_what_llama_cpp_cannot_run_is_refused_and_its_words_are_written(fields, told, seeing, tmp_path, capsys):
    folder = seeing(**fields)
    with pytest.raises(UserError, match=rf"{told}.*--text_only"):
        to_gguf(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert main(["convert", "to-gguf", str(folder), str(tmp_path / "out"), "--text_only"]) == 0
    assert "mmproj" not in capsys.readouterr().out
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["Modelfile", "model.gguf"]
    assert "mmproj" not in (tmp_path / "out" / "Modelfile").read_text("utf-8")


def test_the_model_in_memory_becomes_the_same_files(seeing, tokenizer, tmp_path):
    folder = seeing()
    stored = to_gguf(folder, tmp_path / "a.gguf").files
    made = params_to_gguf(tmp_path / "b.gguf", "eye", *load_hf(folder), tokenizer, "float32", None).files
    assert [file.read_bytes() for file in stored[:2]] == [file.read_bytes() for file in made[:2]]


def test_the_eyes_of_an_older_model_are_told(seeing, saved, tmp_path):
    to_gguf(seeing(), tmp_path / "out")
    notes = to_gguf(saved("dense"), tmp_path / "out", text_only=True).notes
    assert any("mmproj-model.gguf is of another model; remove it" in note for note in notes)
    assert any("is a model of texts, with nothing for text_only to leave out" in note for note in notes)
    assert not any("another model" in note for note in to_gguf(seeing(), tmp_path / "out").notes)


def test_an_adapter_is_of_words_anyway():
    with pytest.raises(ValueError, match="leave text_only out"):
        ToGGUFConfig(source="a", output="b", adapter=True, text_only=True)


def test_a_file_in_the_place_of_the_second_is_kept(seeing, tmp_path):
    (tmp_path / "mmproj-model.gguf").write_text("mine")
    with pytest.raises(UserError, match=r"mmproj-model\.gguf is there already and is no GGUF file"):
        to_gguf(seeing(), tmp_path)
    assert not (tmp_path / "model.gguf").exists()

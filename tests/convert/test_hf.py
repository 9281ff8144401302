"""Writing and reading Hugging Face folders: bit-identical tensors, shards, atomic replacement, clear errors."""

import json
import resource

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from minimind_jax.convert.hf import load_hf, save_hf
from minimind_jax.convert.load import from_hf
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.folders import resolve_model_folder
from minimind_jax.model.transformer import LanguageModel

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def read_all(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert left[name].tobytes() == right[name].tobytes(), name


def rewrite_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def test_parameters_and_configuration_come_back_as_they_were(model, tmp_path):
    _, config, params = model
    save_hf(tmp_path / "model", config, params, dtype="float32")
    loaded_config, loaded = load_hf(tmp_path / "model")
    assert loaded_config == config
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_a_classifier_s_length_goes_no_further_than_the_classifier(make_model, tokenizer, tmp_path):
    config, params = make_model("dense")
    tokenizer.save(tmp_path / "words")
    file = tmp_path / "words" / "tokenizer_config.json"
    for said, side, expected in ((16, "left", config.max_position_embeddings), (10**30, "left", 10**30)):
        file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": said, "truncation_side": side}))
        save_hf(tmp_path / "model", config, params, Tokenizer.load(tmp_path / "words"))
        written = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
        assert written["model_max_length"] == expected
        assert written["truncation_side"] == ("right" if said == 16 else "left")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["dense", "dense_untied", "dense_yarn", "moe_k2"])
def test_round_trip_from_a_folder_is_bit_identical(name, dtype, make_model, tokenizer, tmp_path):
    config, params = make_model(name)
    save_hf(tmp_path / "source", config, params, tokenizer, dtype)
    from_hf(tmp_path / "source", tmp_path / "copy")
    source = read_all(tmp_path / "source")
    assert {tensor.dtype for tensor in source.values()} == {np.dtype(DTYPES[dtype])}
    assert_same_bits(source, read_all(tmp_path / "copy"))
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "copy" / file).read_bytes() == (tmp_path / "source" / file).read_bytes()


def test_tensors_have_torch_names_and_layout(make_model, tmp_path):
    config, params = make_model("moe_k1")
    save_hf(tmp_path / "model", config, params, dtype="float32")
    tensors = read_all(tmp_path / "model")
    assert "lm_head.weight" not in tensors
    assert tensors["model.layers.1.self_attn.k_proj.weight"].shape == (16, 32)
    assert tensors["model.layers.1.self_attn.q_norm.weight"].shape == (8,)
    assert tensors["model.layers.1.mlp.gate.weight"].shape == (4, 32)
    np.testing.assert_array_equal(
        tensors["model.layers.1.mlp.experts.3.down_proj.weight"],
        np.asarray(params["layers"]["mlp"]["experts"]["down_proj"]["kernel"])[1, 3].T,
    )
    with safe_open(tmp_path / "model" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_golden_checkpoint_gives_the_golden_logits(fixtures_dir, tmp_path):
    """MiniMind's own weights and arguments, as a folder of its own architecture, give the logits that it computed."""
    for name in ("dense", "moe_k2"):
        folder = tmp_path / name
        folder.mkdir()
        arguments = json.loads((fixtures_dir / f"{name}.json").read_text())
        values = {"model_type": "minimind", "norm_topk_prob": True, **arguments}
        (folder / "config.json").write_text(json.dumps(values))
        (folder / "model.safetensors").write_bytes((fixtures_dir / f"{name}.safetensors").read_bytes())
        config, params = load_hf(folder)
        golden = np.load(fixtures_dir / f"{name}.npz")
        logits, _ = LanguageModel(config).apply(params, golden["input_ids"][0])
        np.testing.assert_allclose(logits, golden["logits"], atol=1e-5 * np.abs(golden["logits"]).max())


@pytest.mark.parametrize("name", ["dense_untied", "moe_k2"])
def test_small_shards_hold_the_same_tensors(name, make_model, tmp_path):
    config, params = make_model(name)
    save_hf(tmp_path / "whole", config, params)
    save_hf(tmp_path / "shards", config, params, max_shard_bytes=20_000)
    files = sorted(tmp_path.glob("shards/*.safetensors"))
    assert len(files) > 2
    assert all(file.name == f"model-{i:05d}-of-{len(files):05d}.safetensors" for i, file in enumerate(files, 1))
    largest = max(tensor.nbytes for tensor in read_all(tmp_path / "whole").values())
    assert all(sum(t.nbytes for t in load_file(file).values()) <= max(20_000, largest) for file in files)
    whole = read_all(tmp_path / "whole")
    assert_same_bits(whole, read_all(tmp_path / "shards"))
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert set(index["weight_map"]) == set(whole)
    jax.tree.map(np.testing.assert_array_equal, load_hf(tmp_path / "shards")[1], load_hf(tmp_path / "whole")[1])


def test_fused_experts_of_transformers_5_are_taken_apart(make_model, tmp_path):
    config, params = make_model("moe_k2")
    save_hf(tmp_path / "model", config, params)
    expected = load_hf(tmp_path / "model")[1]
    tensors = read_all(tmp_path / "model")
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        parts = {
            projection: np.stack([tensors.pop(f"{prefix}.{e}.{projection}.weight") for e in range(4)])
            for projection in ("gate_proj", "up_proj", "down_proj")
        }
        tensors[f"{prefix}.gate_up_proj"] = np.concatenate([parts["gate_proj"], parts["up_proj"]], axis=1)
        tensors[f"{prefix}.down_proj"] = parts["down_proj"]
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    jax.tree.map(np.testing.assert_array_equal, load_hf(tmp_path / "model")[1], expected)


def test_tied_head_in_the_file_must_equal_the_embedding(make_model, tmp_path):
    config, params = make_model("dense")
    save_hf(tmp_path / "model", config, params)
    tensors = read_all(tmp_path / "model")
    head = tensors["model.embed_tokens.weight"].copy()
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model" / "model.safetensors")
    load_hf(tmp_path / "model")
    head[0, 0] += 1
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        load_hf(tmp_path / "model")


def test_tokenizer_files_and_ids_go_with_the_model(make_model, tokenizer, tmp_path):
    config, params = make_model("dense", bos_token_id=None, eos_token_id=7, pad_token_id=None)
    save_hf(tmp_path / "model", config, params, tokenizer)
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    for file in (values, generation):
        assert (file["bos_token_id"], file["eos_token_id"], file["pad_token_id"]) == (1, 2, 0)
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (tokenizer.folder / "tokenizer.json").read_bytes()
    template = (tmp_path / "model" / "chat_template.jinja").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())["chat_template"] == template


def test_generation_settings_of_the_source_are_kept(make_model, tokenizer, tmp_path):
    config, params = make_model("dense")
    save_hf(tmp_path / "source", config, params, tokenizer)
    settings = {"temperature": 0.6, "eos_token_id": [2, 0], "transformers_version": "4.51.0"}
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps(settings))
    from_hf(tmp_path / "source", tmp_path / "copy")
    written = json.loads((tmp_path / "copy" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 0, "temperature": 0.6}


def test_tokenizer_that_transformers_5_saved_is_made_loadable_in_4(make_model, tokenizer, tmp_path):
    save_hf(tmp_path / "source", *make_model("dense"), tokenizer)
    file = tmp_path / "source" / "tokenizer_config.json"
    resaved = {
        "tokenizer_class": "TokenizersBackend",
        "extra_special_tokens": ["<|im_start|>"],
        "bos_token": "<|im_start|>",
    }
    file.write_text(json.dumps({**json.loads(file.read_text()), **resaved}))
    from_hf(tmp_path / "source", tmp_path / "copy")
    written = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<|im_start|>"]
    assert "extra_special_tokens" not in written


def test_the_model_of_a_run_in_another_dtype(make_model, tokenizer, tmp_path):
    config, params = make_model("moe_k1")
    save_hf(tmp_path / "run" / "model", config, params, tokenizer, "float32")
    from_hf(resolve_model_folder(str(tmp_path / "run")), tmp_path / "half", "float16")
    source, half = read_all(tmp_path / "run" / "model"), read_all(tmp_path / "half")
    assert_same_bits({name: tensor.astype(np.float16) for name, tensor in source.items()}, half)


def test_replacing_a_model_leaves_nothing_of_the_old_one(make_model, tmp_path):
    config, params = make_model("dense")
    save_hf(tmp_path / "model", config, params, max_shard_bytes=20_000)
    save_hf(tmp_path / "model", config, params)
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_full_disk_keeps_the_old_model(make_model, tmp_path):
    save_hf(tmp_path / "model", *make_model("dense"))
    before = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    bigger = make_model("dense", num_hidden_layers=6)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A limit on the size of a file fails a write just as a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"could not be written.*older model there is unchanged"):
            save_hf(tmp_path / "model", *bigger)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_is_no_model_is_not_replaced(make_model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a model folder"):
        save_hf(tmp_path, *make_model("dense"))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_values_beyond_float16_are_refused(make_model, tmp_path):
    config, params = make_model("dense")
    params["norm"]["scale"] = params["norm"]["scale"].at[3].set(1e5)
    with pytest.raises(UserError, match=r"model\.norm\.weight has values beyond float16"):
        save_hf(tmp_path / "model", config, params, dtype="float16")
    assert not list(tmp_path.iterdir())


def test_tokenizer_larger_than_the_model_is_refused(make_model, tokenizer, tmp_path):
    with pytest.raises(UserError, match="tokens, more than the model's vocabulary of 100"):
        save_hf(tmp_path / "model", *make_model("dense", vocab_size=100), tokenizer)


def test_unknown_dtype_is_refused(make_model, tmp_path):
    with pytest.raises(UserError, match=r"float64.*float32, bfloat16, float16"):
        save_hf(tmp_path / "model", *make_model("dense"), dtype="float64")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"missing tensors: model\.layers\.1\.mlp\.up_proj"),
        (lambda t: t.update(score=np.ones(3, np.float32)), "unexpected tensors: score"),
        (
            lambda t: t.update({"model.norm.weight": np.ones(31, np.float32)}),
            r"model\.norm\.weight has shape \(31,\), the configuration says \(32,\)",
        ),
        (lambda t: t.update({"model.norm.weight": np.ones(32, np.int8)}), r"model\.norm\.weight is stored as I8"),
    ],
)
def test_wrong_tensors_are_named(change, message, make_model, tmp_path):
    save_hf(tmp_path / "model", *make_model("dense"), dtype="float32")
    tensors = read_all(tmp_path / "model")
    change(tensors)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_hf(tmp_path / "model")


def test_layers_beyond_the_configuration_are_an_error(make_model, tmp_path):
    save_hf(tmp_path / "model", *make_model("dense"))
    rewrite_config(tmp_path / "model", num_hidden_layers=1)
    with pytest.raises(UserError, match=r"unexpected tensors: model\.layers\.1\..* and 7 more"):
        load_hf(tmp_path / "model")


@pytest.mark.parametrize("form", ["safetensors", "torch"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_none_are_an_error(make_model, tmp_path, number, dtype, form):
    """Such a model answered nothing, without a word."""
    folder, name = save_hf(tmp_path / "model", *make_model("dense"), dtype=dtype), "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name][2, 3] = number
    save_file(tensors, folder / "model.safetensors")
    if form == "torch":
        torch = pytest.importorskip("torch")
        tensors = {key: torch.tensor(value.astype(np.float32)) for key, value in tensors.items()}
        torch.save(tensors, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=rf"model\.(safetensors|bin): {name} holds numbers that are infinite or none"):
        load_hf(folder)


def test_damaged_and_absent_files_are_named(make_model, tmp_path):
    config, params = make_model("dense")
    folder = save_hf(tmp_path / "model", config, params, max_shard_bytes=20_000)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{shard.name}: not a complete safetensors file"):
        load_hf(folder)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: no such file"):
        load_hf(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors"):
        load_hf(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        load_hf(folder)
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        load_hf(tmp_path)


def test_source_and_output_must_differ(make_model, tokenizer, tmp_path):
    save_hf(tmp_path / "model", *make_model("dense"), tokenizer)
    with pytest.raises(UserError, match="same folder"):
        from_hf(tmp_path / "model", tmp_path / "model" / ".." / "model")

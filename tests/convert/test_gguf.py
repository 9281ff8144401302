"""GGUF files: what is in them, what is refused, what is in the way of them, and the command."""

import json
import resource
import sys
import weakref

import numpy as np
import pytest

pytest.importorskip("gguf", reason="the gguf package writes the files (the extra of that name)")

import gguf
from foreign_words import INST, byte_level, make_tokenizer, split, with_template
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers, pre_tokenizers

from minimind_jax.cli import main
from minimind_jax.convert import gguf_file
from minimind_jax.convert.gguf import params_to_gguf, to_gguf
from minimind_jax.convert.hf import Labels, load_hf, save_hf
from minimind_jax.errors import UserError
from minimind_jax.model.config import TowerConfig
from minimind_jax.model.heads import SCORE


def read(file):
    """(metadata, tensors) of a GGUF file, read by the gguf package."""
    reader = gguf.GGUFReader(file)
    return {key: field.contents() for key, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


# What is in the file --------------------------------------------------------------------------------------------------


def test_metadata_of_a_dense_model(saved, tokenizer, tmp_path):
    values, tensors = read(to_gguf(saved("dense"), tmp_path / "out.gguf").files[0])
    own = {key: value for key, value in values.items() if not key.startswith(("GGUF", "tokenizer"))}
    assert own == {
        "general.architecture": "qwen3",
        "general.type": "model",
        "general.name": "dense",
        "general.size_label": "28K",
        "general.file_type": 0,
        "general.quantization_version": 2,
        "qwen3.block_count": 2,
        "qwen3.context_length": 128,
        "qwen3.embedding_length": 32,
        "qwen3.feed_forward_length": 48,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 8,
        "qwen3.attention.value_length": 8,
        "qwen3.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "qwen3.rope.freq_base": 1e6,
    }
    words = {key.removeprefix("tokenizer."): value for key, value in values.items() if key.startswith("tokenizer")}
    tokens, types = words.pop("ggml.tokens"), words.pop("ggml.token_type")
    merges = json.loads((tokenizer.folder / "tokenizer.json").read_text("utf-8"))["model"]["merges"]
    assert words.pop("ggml.merges") == [" ".join(pair) for pair in merges]
    assert words == {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.padding_token_id": 0,
        "ggml.unknown_token_id": 0,
        "ggml.add_bos_token": False,
        "ggml.add_eos_token": False,
        "chat_template": tokenizer.chat_template,
    }
    assert len(tokens) == len(types) == 400
    kinds = dict(zip(tokens, types, strict=True))
    assert {kinds[t] for t in ("<|im_end|>", "<tts_pad>", "<|buffer3|>")} == {3}
    assert {kinds[t] for t in ("<think>", "</think>", "<tool_call>", "</tool_response>")} == {4}
    assert kinds["Ġ"] == 1
    assert types[tokenizer.vocab_size :] == [5] * (400 - tokenizer.vocab_size)
    assert "output.weight" not in tensors
    assert len(tensors) == 2 + 2 * 11


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 0), ("bfloat16", 2**-8), ("float16", 2**-11), ("q8_0", 0.01)])
def test_tensors_are_those_of_the_model(dtype, bound, saved, tmp_path):
    folder = saved("dense_untied", intermediate_size=64)
    params = load_hf(folder)[1]
    values, tensors = read(to_gguf(folder, tmp_path / "out.gguf", dtype).files[0])
    assert values["general.file_type"] == {"float32": 0, "float16": 1, "q8_0": 7, "bfloat16": 32}[dtype]

    def array(name):
        return gguf.dequantize(tensors[name].data, tensors[name].tensor_type)

    down = params["layers"]["mlp"]["down_proj"]["kernel"][1].T
    assert tensors["blk.1.ffn_down.weight"].tensor_type.name == {"float32": "F32", "float16": "F16"}.get(
        dtype, dtype.replace("bfloat", "bf").upper()
    )
    np.testing.assert_allclose(array("blk.1.ffn_down.weight"), down, atol=bound * np.abs(down).max())
    np.testing.assert_allclose(array("output.weight"), params["lm_head"]["kernel"].T, atol=bound)
    np.testing.assert_array_equal(
        array("blk.0.attn_q_norm.weight"), params["layers"]["attention"]["q_norm"]["scale"][0]
    )


def test_experts_are_stacked_and_the_router_is_exact(saved, tmp_path):
    folder = saved("moe_k2")
    params = load_hf(folder)[1]["layers"]["mlp"]
    written = to_gguf(folder, tmp_path / "out.gguf", "q8_0")
    values, tensors = read(written.files[0])
    assert values["general.architecture"] == "qwen3moe"
    assert [values[f"qwen3moe.expert_{key}"] for key in ("count", "used_count", "feed_forward_length")] == [4, 2, 24]
    np.testing.assert_array_equal(tensors["blk.1.ffn_gate_inp.weight"].data, params["router"]["kernel"][1].T)
    down = tensors["blk.1.ffn_down_exps.weight"]
    assert down.data.shape == (4, 32, 24)
    np.testing.assert_allclose(down.data, params["experts"]["down_proj"]["kernel"][1].transpose(0, 2, 1), atol=1e-3)
    assert any("2 tensors, such as blk.0.ffn_down_exps.weight, are float16" in note for note in written.notes)


def test_what_is_stored_is_the_default_dtype(saved, tmp_path):
    values, tensors = read(to_gguf(saved("dense", dtype="bfloat16"), tmp_path / "out.gguf").files[0])
    assert values["general.file_type"] == 32
    assert tensors["token_embd.weight"].tensor_type.name == "BF16"


def test_the_modelfile_has_the_template_the_stops_and_the_sampling(saved, tmp_path):
    file, recipe = to_gguf(saved("dense"), tmp_path / "out").files
    assert (file.name, recipe.name) == ("model.gguf", "Modelfile")
    text = recipe.read_text("utf-8")
    assert "\nFROM ./model.gguf\n" in text
    assert text.count('"""') == 2
    for line in ('stop "<|im_end|>"', "temperature 0.85", "top_k 50", "num_ctx 128"):
        assert f"\nPARAMETER {line}\n" in text
    for word in (".Tools", ".System", ".Thinking", ".ToolCalls", "<think>\n{{ .Thinking }}\n</think>"):
        assert word in text


def test_the_turns_of_a_foreign_template(saved, tokenizer, tmp_path):
    words = with_template(tokenizer, tmp_path / "words", INST)
    written = to_gguf(saved("dense", words), tmp_path / "out")
    text = written.files[1].read_text("utf-8")
    assert "{{ if .System }}<<{{ .System }}>>\n[U]{{ else }}[U]{{ end }}" in text
    assert "{{ .Content }}{{ if $last }}[/U]>{{ else }}[/U]{{ end }}" in text
    assert "{{ .Content }}{{ if not $last }}<|im_end|>[U]{{ end }}" in text
    assert any("without its tools and thinking" in note for note in written.notes)
    assert read(written.files[0])[0]["tokenizer.chat_template"] == INST


def test_a_template_that_numbers_its_turns_is_not_guessed(saved, tokenizer, tmp_path):
    words = with_template(tokenizer, tmp_path / "words", INST.replace("[U]", "[U{{ loop.index }}]"))
    written = to_gguf(saved("dense", words), tmp_path / "out")
    assert "TEMPLATE" not in written.files[1].read_text("utf-8")
    assert any("has no TEMPLATE" in note for note in written.notes)


# Refused --------------------------------------------------------------------------------------------------------------


def test_models_that_llama_cpp_would_compute_otherwise_are_refused(make_model, tokenizer, saved, tmp_path):
    with pytest.raises(UserError, match="norm_topk_prob is false"):
        to_gguf(saved("moe_k2_unnormalised_untied"), tmp_path / "out.gguf")
    config, params = make_model("dense")
    params[SCORE] = {"kernel": np.ones((32, 1), np.float32)}
    save_hf(tmp_path / "judge", config, params, tokenizer, labels=Labels(("reward",)))
    with pytest.raises(UserError, match=r"reward model or classifier.*reranker"):
        to_gguf(tmp_path / "judge", tmp_path / "out.gguf")
    pictures = TowerConfig(16, 24, 1, 2, 12, 6)  # a classifier of them, out of a checkpoint
    with pytest.raises(UserError, match="sorter is a reward model or classifier"):
        params_to_gguf(tmp_path / "out.gguf", "sorter", pictures, {SCORE: params[SCORE]}, tokenizer, "float32", None)
    assert not list(tmp_path.glob("*.gguf"))


def test_dynamic_scaling_is_cut_to_the_context_where_it_changes_nothing(saved, tmp_path):
    written = to_gguf(saved("dense_dynamic"), tmp_path / "out.gguf")
    values, _ = read(written.files[0])
    assert values["qwen3.context_length"] == 32
    assert not any("scaling" in key for key in values)
    assert any("no dynamic rope scaling" in note for note in written.notes)


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "normalizer", "problem"),
    [
        ([byte_level(True)], True, None, r"ignore_merges"),
        ([split(r"\w+|\W"), byte_level(False)], False, None, r"Split .*\\\\w\+.*would split"),
        ([pre_tokenizers.ByteLevel(add_prefix_space=True)], False, None, "add_prefix_space True"),
        ([pre_tokenizers.Metaspace()], False, None, "Metaspace"),
        ([byte_level(True)], False, normalizers.Lowercase(), "normalizer is Lowercase"),
    ],
)
def test_tokenizers_that_llama_cpp_would_split_differently_are_refused(
    steps, ignore_merges, normalizer, problem, saved, tmp_path
):
    words = make_tokenizer(tmp_path / "words", steps, ignore_merges, normalizer)
    with pytest.raises(UserError, match=problem):
        to_gguf(saved("dense", words), tmp_path / "out.gguf")


# Files that are there -------------------------------------------------------------------------------------------------


def test_a_tokenizer_with_more_words_than_the_model_is_refused(saved, tokenizer, tmp_path):
    folder = saved("dense")
    backend = Backend.from_str(tokenizer._backend.to_str())
    backend.add_tokens([f"<new{i}>" for i in range(60)])
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match="tokens, more than the model's vocabulary of 400"):
        to_gguf(folder, tmp_path / "out.gguf")


def test_a_file_of_another_kind_is_kept(saved, tmp_path):
    folder = saved("dense")
    (tmp_path / "out.gguf").write_text("my notes")
    with pytest.raises(UserError, match=r"out\.gguf is there already and is no GGUF file"):
        to_gguf(folder, tmp_path / "out.gguf")
    (tmp_path / "Modelfile").write_text("FROM mine\n")
    with pytest.raises(UserError, match="Modelfile is there already, not as this program wrote it"):
        to_gguf(folder, tmp_path / "other.gguf")
    assert (tmp_path / "Modelfile").read_text() == "FROM mine\n"
    file, recipe = to_gguf(folder, tmp_path / "new").files
    recipe.write_text(recipe.read_text("utf-8") + "SYSTEM mine\n", "utf-8")
    with pytest.raises(UserError, match="Modelfile is there already, not as this program wrote it"):
        to_gguf(folder, tmp_path / "new", "float16")
    recipe.unlink()
    file.chmod(0o444)
    with pytest.raises(UserError, match="read-only"):
        to_gguf(folder, tmp_path / "new")
    (tmp_path / "c" / "model.gguf").mkdir(parents=True)
    with pytest.raises(UserError, match=r"model\.gguf is a folder"):
        to_gguf(folder, tmp_path / "c")


def test_a_full_disk_keeps_the_old_file(saved, tmp_path):
    written = to_gguf(saved("dense"), tmp_path / "out.gguf")
    before = [file.read_bytes() for file in written.files]
    assert to_gguf(saved("dense", rms_norm_eps=1e-5), tmp_path / "out.gguf").files == written.files  # replaced
    assert [file.read_bytes() for file in written.files] != before
    before = [file.read_bytes() for file in written.files]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A limit on the size of a file fails a write just as a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"out\.gguf: could not be written: .*; the older one there is unchanged"):
            to_gguf(tmp_path / "dense", tmp_path / "out.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.read_bytes() for file in written.files] == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["Modelfile", "dense", "out.gguf"]


def test_one_tensor_at_a_time_is_in_memory(saved, tmp_path, monkeypatch):
    written = []

    def watched(tensor, encode=gguf_file.encoded):
        assert all(array() is None for array in written), "an earlier tensor is still held"
        array = encode(tensor)
        written.append(weakref.ref(array))
        return array

    monkeypatch.setattr(gguf_file, "encoded", watched)
    to_gguf(saved("dense"), tmp_path / "out.gguf")
    assert len(written) == 24


# The command ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_writes_runs_checkpoints_and_adapters(chat_runs, tmp_path, capsys):
    def run(*words):
        status = main(["convert", "to-gguf", *map(str, words)])
        return status, capsys.readouterr()

    status, said = run(chat_runs / "dense", tmp_path / "a" / "chat.gguf", "--dtype", "q8_0")
    assert status == 0
    assert f"wrote {tmp_path}/a/chat.gguf\nwrote {tmp_path}/a/Modelfile" in said.out
    assert "--reasoning off" in said.out
    assert read(tmp_path / "a" / "chat.gguf")[0]["general.name"] == "dense"
    assert run(chat_runs / "dense", tmp_path / "b", "--checkpoint", "15")[0] == 0
    assert run(chat_runs / "dense", tmp_path / "c", "--checkpoint", "newest")[0] == 0
    assert run(chat_runs / "dense", tmp_path / "d")[0] == 0
    early, late, whole = (read(tmp_path / name / "model.gguf")[1] for name in "bcd")
    assert not np.array_equal(early["token_embd.weight"].data, late["token_embd.weight"].data)
    np.testing.assert_array_equal(late["token_embd.weight"].data, whole["token_embd.weight"].data)
    assert run(chat_runs / "adapter", tmp_path / "e", "--adapter")[0] == 0
    values, tensors = read(tmp_path / "e" / "adapter.gguf")
    assert (values["general.type"], values["adapter.type"], values["adapter.lora.alpha"]) == ("adapter", "lora", 8)
    assert tensors["blk.1.attn_q.weight.lora_a"].data.shape == (4, 32)
    assert not (tmp_path / "e" / "Modelfile").exists()
    template = chat_runs / "adapter" / "model" / "chat_template.jinja"
    ours = template.read_text("utf-8")
    template.write_text(INST)
    assert f"--chat-template-file {template}" in run(chat_runs / "adapter", tmp_path / "e", "--adapter")[1].out
    template.write_text(ours, "utf-8")
    status, said = run(chat_runs / "dense", tmp_path / "f", "--adapter")
    assert status == 2
    assert "holds no adapter" in said.err


def test_without_the_package_the_command_says_what_to_install(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "minimind_jax.convert.gguf")
    monkeypatch.delattr("minimind_jax.convert.gguf")
    assert main(["convert", "to-gguf", str(saved("dense")), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "GGUF files need another package" in said
    assert "pip install" in said

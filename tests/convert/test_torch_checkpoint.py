"""MiniMind's .pth files: loaded without running what is in them, architecture from shapes, and written for its code."""

import contextlib
import importlib.util
import json
import os
import pickle
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from minimind_jax.cli import main
from minimind_jax.convert.hf import load_hf, save_hf
from minimind_jax.convert.hf_weights import hf_tensors
from minimind_jax.convert.torch_checkpoint import from_torch, to_torch
from minimind_jax.errors import UserError
from minimind_jax.model.config import RopeScaling
from minimind_jax.model.transformer import LanguageModel

torch = pytest.importorskip("torch", reason="PyTorch files need torch")


def state_dict(config, params, prefix="", head=True):
    """What MiniMind saves: float16, the head of a tied model under its own name."""
    state = {prefix + name: torch.tensor(np.array(array)).half() for name, array in hf_tensors(config, params).items()}
    if head and config.tie_word_embeddings:
        state[f"{prefix}lm_head.weight"] = state[f"{prefix}model.embed_tokens.weight"]
    return state


def assert_same_tensors(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype == torch.float16, name
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("name", ["dense", "dense_untied", "dense_head_dim", "moe_k1"])
def test_there_and_back_is_bit_identical(name, make_model, tokenizer, tmp_path):
    config, params = make_model(name)
    state = state_dict(config, params)
    torch.save(state, tmp_path / "in.pth")
    overrides = {field: getattr(config, field) for field in ("rope_theta", "rms_norm_eps", "max_position_embeddings")}
    from_torch(tmp_path / "in.pth", tmp_path / "model", tokenizer.folder, overrides=overrides)
    loaded = load_hf(tmp_path / "model")[0]
    for field in ("head_dim", "num_attention_heads", "num_key_value_heads", "num_experts", "tie_word_embeddings"):
        assert getattr(loaded, field) == getattr(config, field), field
    assert loaded.rope_theta == config.rope_theta
    to_torch(tmp_path / "model", tmp_path / "out.pth")
    assert_same_tensors(torch.load(tmp_path / "out.pth", weights_only=True), state)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in.pth", "model", "out.pth"]


def test_what_shapes_do_not_tell_is_given_on_the_command_line(make_model, tokenizer, tmp_path):
    torch.save(state_dict(*make_model("moe_k2")), tmp_path / "in.pth")
    flags = "--rms_norm_eps 1e-5 --rope_theta 5e4 --num_experts_per_tok 2 --norm_topk_prob false --max_shard_bytes 2e4"
    command = ["convert", "from-torch", str(tmp_path / "in.pth"), str(tmp_path / "model"), *flags.split()]
    assert main([*command, "--tokenizer", str(tokenizer.folder), "--inference_rope_scaling"]) == 0
    config, _ = load_hf(tmp_path / "model")
    assert (config.rms_norm_eps, config.rope_theta) == (1e-5, 5e4)
    assert (config.num_experts_per_tok, config.norm_topk_prob) == (2, False)
    assert config.rope_scaling == RopeScaling("yarn", 16, 2048, attention_factor=1.0)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1


def test_tied_head_is_stored_once(make_model, tmp_path):
    folder = save_hf(tmp_path / "model", *make_model("dense"))
    to_torch(folder, tmp_path / "out.pth")
    state = torch.load(tmp_path / "out.pth", weights_only=True)
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_files_for_resuming_and_wrapped_names_are_read(prefix, make_model, tmp_path):
    config, params = make_model("moe_k2")
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}]}
    resume = {"model": state_dict(config, params, prefix), "optimizer": optimizer, "epoch": 1, "wandb_id": None}
    torch.save(resume, tmp_path / "resume.pth")
    overrides = {"num_experts_per_tok": 2, "rope_scaling": RopeScaling("yarn", 16, 2048)}
    from_torch(tmp_path / "resume.pth", tmp_path / "model", None, overrides=overrides)
    loaded, tensors = load_hf(tmp_path / "model")
    assert (loaded.num_experts_per_tok, loaded.rope_scaling) == (2, overrides["rope_scaling"])
    for name, array in hf_tensors(loaded, tensors).items():
        np.testing.assert_array_equal(array, np.asarray(hf_tensors(config, params)[name]).astype(np.float16))


class _Attack:
    """A pickle that writes a file when it is loaded by an unsafe loader."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_file_is_not_run(save, make_model, tmp_path):
    state = {**state_dict(*make_model("dense")), "model.extra": _Attack(tmp_path / "owned")}
    save(state, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=r"bad\.pth: refused, because it holds more than tensors") as caught:
        from_torch(tmp_path / "bad.pth", tmp_path / "model", None)
    assert "weights_only" not in str(caught.value)  # PyTorch's own advice is to load it unsafely
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.pth"]
    with contextlib.suppress(RuntimeError):  # a bare pickle is no PyTorch file, which it finds out after running it
        torch.load(tmp_path / "bad.pth", weights_only=False)
    assert (tmp_path / "owned").exists(), "the attack itself does not work, so nothing was tested"


@pytest.mark.parametrize("content", [b"", b"A letter, no weights.\n"])
def test_file_that_is_not_from_torch_is_told(content, tmp_path):
    (tmp_path / "letter.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"letter\.pth: not a PyTorch file") as caught:
        from_torch(tmp_path / "letter.pth", tmp_path / "model", None)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if "q_norm" not in k}, "MiniMind before version 3 has no q_norm"),
        (lambda s: {k: v for k, v in s.items() if "layers.1.mlp.up" not in k}, r"missing tensors: model\.layers\.1"),
        (lambda s: {**s, "value_head.weight": torch.zeros(1, 32)}, r"unexpected tensors: value_head\.weight"),
        (lambda s: {**s, "model.norm.weight": torch.zeros(32, dtype=torch.int8)}, r"model\.norm\.weight is int8"),
        (lambda s: [1, 2], "expected a state dict"),
    ],
)
def test_other_contents_are_refused(change, message, make_model, tmp_path):
    torch.save(change(state_dict(*make_model("dense"))), tmp_path / "bad.pth")
    with pytest.raises(UserError, match=message):
        from_torch(tmp_path / "bad.pth", tmp_path / "model", None)
    assert not (tmp_path / "model").exists()


def test_override_that_shapes_contradict(make_model, tmp_path):
    torch.save(state_dict(*make_model("dense")), tmp_path / "in.pth")
    with pytest.raises(UserError, match=r"has shape \(48, 32\), the configuration says \(64, 32\)"):
        from_torch(tmp_path / "in.pth", tmp_path / "model", None, overrides={"intermediate_size": 64})
    with pytest.raises(UserError, match="num_layers"):
        from_torch(tmp_path / "in.pth", tmp_path / "model", None, overrides={"num_layers": 2})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"max_position_embeddings": -5}, "max_position_embeddings is -5; it must be at least 1"),
        ({"num_experts_per_tok": 2}, "num_experts_per_tok is given, but the model has no experts"),
    ],
)
def test_overrides_that_make_no_sense(overrides, message, make_model, tmp_path):
    torch.save(state_dict(*make_model("dense")), tmp_path / "in.pth")
    with pytest.raises(UserError, match=message):
        from_torch(tmp_path / "in.pth", tmp_path / "model", None, overrides=overrides)


def test_a_place_that_cannot_be_written_is_told(make_model, tmp_path):
    save_hf(tmp_path / "model", *make_model("dense"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/x\.pth: could not be written: "):
        to_torch(tmp_path / "model", tmp_path / "file" / "x.pth")
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.md is there already and is no PyTorch file"):
        to_torch(tmp_path / "model", tmp_path / "notes.md")
    assert (tmp_path / "notes.md").read_text() == "mine"


def test_absent_and_cut_files(make_model, tmp_path):
    with pytest.raises(UserError, match=r"none\.pth: no such file"):
        from_torch(tmp_path / "none.pth", tmp_path / "model", None)
    torch.save(state_dict(*make_model("dense")), tmp_path / "cut.pth")
    content = (tmp_path / "cut.pth").read_bytes()
    for length in (0, 3, len(content) // 2):
        (tmp_path / "cut.pth").write_bytes(content[:length])
        with pytest.raises(UserError, match=r"cut\.pth: "):
            from_torch(tmp_path / "cut.pth", tmp_path / "model", None)


def test_without_torch_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)  # makes `import torch` fail
    with pytest.raises(UserError, match="pip install 'torch>="):
        from_torch(tmp_path / "in.pth", tmp_path / "model", None)


def test_minimind_folder_with_pytorch_model_bin(make_model, tmp_path):
    """The form in which MiniMind saves its own architecture for transformers."""
    config, params = make_model("dense")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
    heads = ("num_attention_heads", "num_key_value_heads", "head_dim", "initializer_range")
    values = {"model_type": "minimind", **{field: getattr(config, field) for field in sizes + heads}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    torch.save(state_dict(config, params), tmp_path / "pytorch_model.bin")
    loaded, tensors = load_hf(tmp_path)
    assert loaded == config
    np.testing.assert_array_equal(
        tensors["embed"]["embedding"], np.asarray(params["embed"]["embedding"]).astype(np.float16)
    )
    state = torch.load(tmp_path / "pytorch_model.bin")
    (tmp_path / "pytorch_model.bin").unlink()
    parts = {name: f"pytorch_model-0000{1 + n % 2}-of-00002.bin" for n, name in enumerate(state)}
    for part in set(parts.values()):
        torch.save({name: state[name] for name in parts if parts[name] == part}, tmp_path / part)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": parts}))
    jax.tree.map(np.testing.assert_array_equal, load_hf(tmp_path)[1], tensors)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(
        UserError, match=r"00002-of-00002\.bin: no such file, but pytorch_model\.bin\.index\.json names it"
    ):
        load_hf(tmp_path)


@pytest.mark.parametrize("name", ["dense", "dense_untied", "dense_head_dim", "moe_k2"])
def test_minimind_loads_the_file_strictly_and_computes_the_same(name, make_model, tmp_path):
    repo = os.environ.get("MINIMIND_REPO")
    if not repo:
        pytest.skip("set MINIMIND_REPO to a checkout of MiniMind to compare with its own code")
    spec = importlib.util.spec_from_file_location("model_minimind", Path(repo) / "model" / "model_minimind.py")
    minimind = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(minimind)

    config, params = make_model(name)
    save_hf(tmp_path / "model", config, params, dtype="float16")
    to_torch(tmp_path / "model", tmp_path / "out.pth")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
    heads = ("num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps")
    rest = ("tie_word_embeddings", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
    arguments = {field: getattr(config, field) for field in sizes + heads + rest}
    if config.is_moe:
        arguments |= {"use_moe": True, "num_experts": config.num_experts}
    theirs = minimind.MiniMindForCausalLM(minimind.MiniMindConfig(**arguments)).eval()
    theirs.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True), strict=True)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 20))
    with torch.no_grad():
        expected = theirs.float()(torch.tensor(tokens)).logits.numpy()
    logits, _ = LanguageModel(config).apply(load_hf(tmp_path / "model")[1], tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-4)

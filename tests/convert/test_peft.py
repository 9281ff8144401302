"""Adapters as folders of peft: read by peft over the exported base, and its own read here."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minimind_jax.convert.hf import load_hf, save_hf
from minimind_jax.convert.load import base_folder, load_merged, merge_lora
from minimind_jax.convert.peft import load_peft, rank_table, save_peft
from minimind_jax.errors import UserError
from minimind_jax.model.config import ComputeConfig
from minimind_jax.model.lora import join, make_adapter
from minimind_jax.model.transformer import LanguageModel
from tests.convert.conftest import with_adapters

TOKENS = np.random.default_rng(0).integers(0, 400, (2, 12))
CASES = {
    "all": (("all-linear",), {}, False),
    "minimind": (("minimind",), {}, False),
    "rslora": (("k_proj", "v_proj", "down_proj"), {}, True),
    "ranks": (("q_proj", "layers.1.mlp.up_proj"), {"layers.0": 3}, False),
}


@pytest.fixture
def base(make_model, tokenizer, tmp_path):
    config, params = make_model("dense")
    save_hf(tmp_path / "base", config, params, tokenizer, dtype="float32")
    return tmp_path / "base"


def adapted(base, case):
    """(config, parameters with drawn adapters, table, rslora)."""
    targets, ranks, rslora = CASES[case]
    config, params = load_hf(base)
    table = rank_table(config, 4, targets, ranks)
    return config, with_adapters(params, table, rslora), table, rslora


def our_logits(config, params, adapter=None):
    model = LanguageModel(config, ComputeConfig(dtype="float32"), adapter)
    return np.asarray(jax.jit(model.apply)(params, TOKENS)[0])


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_comes_back_as_it_was(case, base, tokenizer, tmp_path):
    _, params, table, rslora = adapted(base, case)
    save_peft(tmp_path / "adapter", params, table, base=base, tokenizer=tokenizer, rslora=rslora)
    assert base_folder(tmp_path / "adapter") == base
    config, below = load_hf(base)
    loaded = load_peft(tmp_path / "adapter", config)
    assert loaded.table == {name: ranks for name, ranks in table.items() if any(ranks)}
    assert loaded.rslora == rslora
    both = join(below, loaded.tree)
    assert jax.tree.structure(both) == jax.tree.structure(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), both, params)


@pytest.mark.parametrize("case", CASES)
def test_peft_gives_our_logits(case, base, tmp_path):
    torch, peft, transformers = (pytest.importorskip(name) for name in ("torch", "peft", "transformers"))
    config, params, table, rslora = adapted(base, case)
    save_peft(tmp_path / "adapter", params, table, base=base, rslora=rslora)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    with torch.no_grad():
        theirs = model(torch.tensor(TOKENS)).logits.numpy()
        merged = model.merge_and_unload()(torch.tensor(TOKENS)).logits.numpy()
    ours = our_logits(config, params, make_adapter(table))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_allclose(our_logits(*load_merged(tmp_path / "adapter")), merged, atol=1e-5)
    assert np.abs(ours - our_logits(*load_hf(base))).max() > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "lora_alpha": 16},
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"target_modules": ["v_proj"], "layers_to_transform": [1], "alpha_pattern": {"layers.1.self_attn.v_proj": 3}},
        {"target_modules": "all-linear", "alpha_pattern": {"layers.0": 64, "self_attn": 64, r"layers\.1\..*": 5}},
    ],
    ids=["all", "rslora", "patterns", "patterns of no module"],
)
def test_a_folder_written_by_peft_loads_here(settings, base, tmp_path):
    torch, peft, transformers = (pytest.importorskip(name) for name in ("torch", "peft", "transformers"))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **settings))
    model.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(TOKENS)).logits.numpy()
    config, params = load_merged(tmp_path / "theirs")
    np.testing.assert_allclose(our_logits(config, params), theirs, atol=1e-5)


def test_a_merged_model_is_an_ordinary_folder(base, tokenizer, tmp_path):
    config, params, table, _ = adapted(base, "all")
    save_peft(tmp_path / "adapter", params, table, base=base, tokenizer=tokenizer)
    with pytest.raises(UserError, match="the adapter's or the base model's own folder"):
        merge_lora(tmp_path / "adapter", tmp_path / "adapter")
    merge_lora(tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    ours = our_logits(config, params, make_adapter(table))
    np.testing.assert_allclose(our_logits(*load_hf(tmp_path / "merged")), ours, atol=1e-5)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    with pytest.raises(UserError, match="holds no adapter"):
        merge_lora(tmp_path / "merged", tmp_path / "again")


def test_a_base_that_was_moved_is_named(base, tmp_path):
    _, params, table, _ = adapted(base, "minimind")
    save_peft(tmp_path / "adapter", params, table, base=base)
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"the base model .*base is not there.*--base FOLDER"):
        load_merged(tmp_path / "adapter")
    assert load_merged(tmp_path / "adapter", base=str(tmp_path / "moved"))[0].hidden_size == 32


def test_an_adapter_of_another_model_is_refused(base, make_model, tmp_path):
    _, params, table, _ = adapted(base, "all")
    save_peft(tmp_path / "adapter", params, table, base=base)
    other, _ = make_model("dense_head_dim")
    with pytest.raises(UserError, match="the adapter belongs to another model"):
        load_peft(tmp_path / "adapter", other)
    fewer = load_hf(base)[0]
    fewer = type(fewer)(**{**vars(fewer), "num_hidden_layers": 1})
    with pytest.raises(UserError, match=r"of a base model of 1 layers of width 32; the adapter belongs to .*base"):
        load_peft(tmp_path / "adapter", fewer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "only LORA adapters"),
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"base_model_name_or_path": None}, "does not name the model"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported"),
        ({"use_bdlora": True}, "use_bdlora is not supported"),
        ({"lora_alpha": "abc"}, "lora_alpha is 'abc'; expected a number"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern 'q_proj' is None; expected a number"),
        ({"alpha_pattern": {"q_proj(": 8}}, r"alpha_pattern 'q_proj\(' is not a regular expression"),
        ({"alpha_pattern": [8]}, r"alpha_pattern is \[8\]; expected an object"),
    ],
)
def test_what_is_not_plain_lora_is_refused(change, message, base, tmp_path):
    _, params, table, _ = adapted(base, "minimind")
    folder = save_peft(tmp_path / "adapter", params, table, base=base)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        load_merged(folder)


def test_weights_that_are_missing_or_foreign_are_told(base, tmp_path):
    config, params, table, _ = adapted(base, "minimind")
    folder = save_peft(tmp_path / "adapter", params, table, base=base)
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    for name, message in (("lm_head", "lm_head.lora_A.weight is not supported"), ("c_attn", "fits no projection")):
        save_file({**tensors, f"base_model.model.{name}.lora_A.weight": np.zeros((4, 32), np.float32)}, weights)
        with pytest.raises(UserError, match=message):
            load_peft(folder, config)
    weights.unlink()
    with pytest.raises(UserError, match=r"adapter_model.safetensors: no such file"):
        load_peft(folder, config)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("qproj",), r"'qproj' is no projection of this model; there are down_proj, .* in 2 layers"),
        (("layers.9",), "'layers.9' is no projection"),
        (("q_proj(",), "neither a name nor a regular expression"),
    ],
)
def test_targets_that_do_not_exist_are_told(targets, message, make_model):
    with pytest.raises(UserError, match=message):
        rank_table(make_model("dense")[0], 4, targets, {})


def test_experts_have_no_adapters(make_model):
    config, _ = make_model("moe_k2")
    assert set(rank_table(config, 4, ("all-linear",), {})) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(UserError, match="experts of a mixture have no adapters"):
        rank_table(config, 4, ("up_proj",), {})

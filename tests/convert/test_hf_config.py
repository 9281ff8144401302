"""config.json: every key that some reader needs is written, every form in use is read, the rest is refused by name."""

import dataclasses
import math

import pytest

from minimind_jax.convert.hf_config import from_hf_config, to_hf_config
from minimind_jax.errors import UserError
from minimind_jax.model.config import PRESETS, ModelConfig, RopeScaling

YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 2048}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_come_back(preset):
    config = ModelConfig(**PRESETS[preset])
    assert from_hf_config(to_hf_config(config, "bfloat16")) == config


def test_dense_superset():
    values = to_hf_config(ModelConfig(), "float16")
    assert values == {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 6400,
        "hidden_size": 768,
        "intermediate_size": 2432,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 96,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float16",
        "dtype": "float16",
        "use_cache": True,
    }


def test_moe_adds_both_names_of_the_expert_count():
    config = ModelConfig(num_experts=4, num_experts_per_tok=2, router_gradient="none")
    added = to_hf_config(config, "bfloat16")
    assert {key: added[key] for key in added.keys() - to_hf_config(ModelConfig(), "bfloat16").keys()} == {
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 2432,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 5e-4,
        "output_router_logits": False,
    }
    assert (added["model_type"], added["architectures"]) == ("qwen3_moe", ["Qwen3MoeForCausalLM"])


def test_yarn_is_written_in_both_forms_with_its_attention_factor():
    values = to_hf_config(ModelConfig(rope_scaling=RopeScaling("yarn", 16, 2048)), "bfloat16")
    yarn = {**YARN, "attention_factor": 0.1 * math.log(16) + 1, "beta_fast": 32.0, "beta_slow": 1.0}
    assert values["rope_scaling"] == {"type": "yarn", **yarn}
    assert values["rope_parameters"] == {"rope_theta": 1e6, **yarn}
    assert values["max_position_embeddings"] == 32768


@pytest.mark.parametrize("rope_type", ["linear", "dynamic"])
def test_linear_and_dynamic_keep_the_original_context_where_transformers_looks(rope_type):
    config = ModelConfig(max_position_embeddings=8192, rope_scaling=RopeScaling(rope_type, 4.0, 2048))
    values = to_hf_config(config, "bfloat16")
    assert values["max_position_embeddings"] == 2048
    assert values["rope_parameters"] == {"rope_theta": 1e6, "rope_type": rope_type, "factor": 4.0}
    assert from_hf_config(values) == config


@pytest.mark.parametrize("rope_type", ["linear", "dynamic"])
@pytest.mark.parametrize("context", [100, 8191, 32768])
def test_a_context_that_is_not_the_scaled_original_comes_back(rope_type, context):
    """Both transformers keep a top-level key they do not know without a word, and warn of one in rope_scaling."""
    config = ModelConfig(max_position_embeddings=context, rope_scaling=RopeScaling(rope_type, 2.5, 2048))
    values = to_hf_config(config, "bfloat16")
    assert values["extended_max_position_embeddings"] == context and values["max_position_embeddings"] == 2048
    assert values["rope_scaling"].keys() == {"type", "rope_type", "factor"}
    assert from_hf_config(values) == config


def without(values, *names):
    return {key: value for key, value in values.items() if key not in names}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", **without(YARN, "rope_type")}},
        {"rope_theta": 5e5, "rope_scaling": YARN},
        {"rope_parameters": {"rope_theta": 5e5, **YARN}},
        {"rope_theta": 5e5, "rope_parameters": YARN},
        {"rope_theta": 5e5, "rope_scaling": YARN, "rope_parameters": {"rope_theta": 5e5, **YARN}},
    ],
)
def test_every_form_of_rope_is_read(rope):
    values = without(to_hf_config(ModelConfig(), "bfloat16"), "rope_theta", "rope_scaling", "rope_parameters")
    config = from_hf_config({**values, **rope})
    assert config.rope_theta == 5e5
    # transformers' value where the file gives none
    assert config.rope_scaling == RopeScaling("yarn", 16.0, 2048, attention_factor=0.1 * math.log(16) + 1)


def test_deepseek_s_two_multipliers_of_the_attention_factor_are_read():
    yarn = {**YARN, "mscale": 0.7, "mscale_all_dim": 0.5}
    values = {**to_hf_config(ModelConfig(), "bfloat16"), "rope_scaling": yarn, "rope_parameters": None}
    expected = (0.07 * math.log(16) + 1) / (0.05 * math.log(16) + 1)
    assert from_hf_config(values).rope_scaling.attention_factor == pytest.approx(expected)


def test_absent_keys_mean_what_they_mean_to_transformers():
    kept = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rope_theta")
    values = to_hf_config(ModelConfig(num_experts=4), "bfloat16")
    kept += ("num_attention_heads", "num_key_value_heads")
    dense = from_hf_config({key: values[key] for key in kept} | {"model_type": "qwen3"})
    assert (dense.head_dim, dense.tie_word_embeddings, dense.eos_token_id) == (128, False, None)
    kept += ("num_local_experts", "num_experts_per_tok", "moe_intermediate_size")
    moe = from_hf_config({key: values[key] for key in kept})
    assert (moe.head_dim, moe.num_experts, moe.norm_topk_prob, moe.router_aux_loss_coef) == (96, 4, False, 1e-3)


def test_minimind_architecture():
    """The keys that MiniMind's own class saves, with its defaults."""
    values = {
        "architectures": ["MiniMindForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "model_minimind.MiniMindForCausalLM"},
        "model_type": "minimind",
        **{key: to_hf_config(ModelConfig(), "float16")[key] for key in ("vocab_size", "hidden_size", "head_dim")},
        "intermediate_size": 2432,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "rope_theta": 1e6,
        "rope_scaling": None,
        "flash_attn": True,
        "use_moe": False,
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 2432,
        "norm_topk_prob": True,
    }
    assert from_hf_config(values) == ModelConfig()
    assert from_hf_config({**values, "use_moe": True}) == ModelConfig(num_experts=4)
    extended = from_hf_config({**values, "inference_rope_scaling": True})
    assert extended == ModelConfig(rope_scaling=RopeScaling("yarn", 16, 2048, attention_factor=1.0))


def test_all_of_several_end_tokens_are_kept():
    values = {**to_hf_config(ModelConfig(), "bfloat16"), "eos_token_id": [5, 3]}
    config = from_hf_config(values)
    assert config.eos_token_id == config.end_ids == (5, 3)
    assert to_hf_config(config, "bfloat16") == values
    for one in ([5], 5):
        assert from_hf_config({**values, "eos_token_id": one}) == dataclasses.replace(config, eos_token_id=5)
    with pytest.raises(UserError, match=r"eos_token_id is '</s>'; expected a token's id, or a list of ids"):
        from_hf_config({**values, "eos_token_id": "</s>"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, r"model_type 'llama' is not supported; it must be qwen3, qwen3_moe or minimind"),
        ({"architectures": ["Qwen3ForTokenClassification"]}, "architectures is .*Classification"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size is 64"),
        ({"n_shared_experts": 1}, "n_shared_experts is 1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_type 'llama3' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn"}, "rope_parameters": None}, "rope scaling: factor is missing"),
        ({"rope_scaling": YARN}, "contradict"),
        ({"rope_theta": 1e4}, "contradict"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06; it must be above 0"),
        ({"rope_parameters": {"rope_theta": 1e6, **YARN}}, "contradict"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"rope_theta": None, "rope_parameters": None}, "rope_theta is missing"),
        ({"hidden_size": "wide"}, "wide.json: "),
        ({"num_key_value_heads": 3}, "does not divide"),
        ({"model_type": "qwen3_moe"}, "num_experts is missing"),
        ({"model_type": "qwen3_moe", "num_experts": 4, "num_local_experts": 8}, "must be equal"),
    ],
)
def test_what_is_not_supported_is_named(changes, message):
    values = {**to_hf_config(ModelConfig(), "bfloat16"), **changes}
    with pytest.raises(UserError, match=message) as caught:
        from_hf_config(values, where="wide.json")
    assert str(caught.value).startswith("wide.json: ")


def test_settings_of_training_do_not_change_the_file():
    config = ModelConfig(num_experts=4)
    training_only = dataclasses.replace(config, router_gradient="none", dropout=0.1)
    assert to_hf_config(training_only, "bfloat16") == to_hf_config(config, "bfloat16")

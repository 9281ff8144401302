"""Exported folders in `transformers`, and its folders here. scripts/check_transformers_457.sh runs this with 4.57, too.

Prints the largest difference of logits and the generated text of each model (`pytest -s`).
"""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from minimind_jax.convert.hf import load_hf, save_hf
from minimind_jax.convert.hf_config import to_hf_config
from minimind_jax.convert.load import from_hf
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.sampling import SamplingConfig
from minimind_jax.model.config import ComputeConfig
from minimind_jax.model.transformer import LanguageModel

torch = pytest.importorskip("torch", reason="the comparison needs torch")
transformers = pytest.importorskip("transformers", reason="the comparison needs transformers")

PROMPTS = ("The quick brown", "你好，世界！ Wer reitet so")
NEW_TOKENS = 24
LENGTH = 48  # longer than the original context of the scaled models (32)


def load_with_transformers(folder):
    """transformers' model in float32, after checking that no tensor was missing or left over."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def our_logits(config, params, tokens):
    return jax.jit(LanguageModel(config, ComputeConfig(dtype="float32")).apply)(params, tokens)[0]


def their_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def random_tokens(config):
    return np.random.default_rng(0).integers(0, config.vocab_size, (2, LENGTH))


def test_transformers_loads_it_and_computes_the_same(model, tokenizer, tmp_path):
    name, config, params = model
    save_hf(tmp_path / "model", config, params, tokenizer, dtype="float32")
    theirs = load_with_transformers(tmp_path / "model")
    tokens = random_tokens(config)
    difference = np.abs(our_logits(config, params, tokens) - their_logits(theirs, tokens)).max()
    print(f"\ntransformers {transformers.__version__}, {name}: logits differ by at most {difference:.1e}")
    assert difference <= 1e-4

    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    generator = Engine(LanguageModel(config, ComputeConfig(dtype="float32")), params, tokenizer)
    answers = generator.generate(PROMPTS, SamplingConfig(max_new_tokens=NEW_TOKENS, temperature=0))
    for prompt, ours in zip(PROMPTS, answers, strict=True):
        inputs = their_tokenizer(prompt, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == tokenizer.encode(prompt)
        generated = theirs.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0, ours.prompt_tokens :]
        assert ours.ids == generated.tolist()
        assert ours.text == their_tokenizer.decode(generated, skip_special_tokens=True)
        print(f"greedy text equal: {ours.text!r}")
    assert len({len(tokenizer.encode(prompt)) for prompt in PROMPTS}) > 1
    inputs = their_tokenizer(PROMPTS, padding=True, return_tensors="pt")
    generated = theirs.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[:, inputs["input_ids"].shape[1] :]
    assert their_tokenizer.batch_decode(generated, skip_special_tokens=True) == [ours.text for ours in answers]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["dense_untied", "moe_k2"])
def test_folder_written_by_transformers_comes_back_bit_identical(name, dtype, make_model, tokenizer, tmp_path):
    config, _ = make_model(name)
    values = to_hf_config(config, dtype)
    arguments = {key: value for key, value in values.items() if key not in ("architectures", "model_type", "dtype")}
    kind = "Qwen3Moe" if config.is_moe else "Qwen3"
    their_config = getattr(transformers, f"{kind}Config")(**arguments)
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(their_config).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    tokenizer.save(tmp_path / "theirs")

    assert from_hf(tmp_path / "theirs", tmp_path / "ours") == config
    written = load_file(tmp_path / "ours" / "model.safetensors")
    source = {}
    for shard in (tmp_path / "theirs").glob("*.safetensors"):
        source |= load_file(shard)
    assert written.keys() == source.keys()
    for tensor in written:
        assert written[tensor].dtype == source[tensor].dtype
        assert written[tensor].tobytes() == source[tensor].tobytes(), tensor


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_values_are_read_as_transformers_reads_them(dtype, make_model, tmp_path):
    save_hf(tmp_path / "model", *make_model("moe_k1"), dtype=dtype)
    config, params = load_hf(tmp_path / "model")
    theirs = load_with_transformers(tmp_path / "model")
    tokens = random_tokens(config)
    np.testing.assert_allclose(our_logits(config, params, tokens), their_logits(theirs, tokens), atol=1e-4)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == dtype


def test_shards_load_in_transformers(make_model, tmp_path):
    config, params = make_model("moe_k2")
    save_hf(tmp_path / "model", config, params, dtype="float32", max_shard_bytes=20_000)
    theirs = load_with_transformers(tmp_path / "model")
    tokens = random_tokens(config)
    np.testing.assert_allclose(our_logits(config, params, tokens), their_logits(theirs, tokens), atol=1e-4)

"""Adapters over models that see: in peft over the exported `LlavaForConditionalGeneration`, and peft's own here."""

import dataclasses

import jax
import numpy as np
import pytest

from minimind_jax.convert.hf import load_hf, save_hf
from minimind_jax.convert.load import load_merged, merge_lora
from minimind_jax.convert.peft import rank_table, save_peft
from minimind_jax.errors import UserError
from minimind_jax.model.config import ComputeConfig, TowerConfig, Vision
from minimind_jax.model.lora import make_adapter
from minimind_jax.model.transformer import LanguageModel
from tests.convert.conftest import MODELS, random_params, with_adapters

torch = pytest.importorskip("torch", reason="the comparison needs torch")
peft = pytest.importorskip("peft", reason="the comparison needs peft")
transformers = pytest.importorskip("transformers", reason="the comparison needs transformers")

MARKER, N = 12, 9
CONFIG = dataclasses.replace(MODELS["dense"], vision=Vision(TowerConfig(16, 24, 2, 2, 18, 6), MARKER))
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 18, 18, 3)).astype(np.uint8)
TOKENS = np.random.default_rng(1).integers(20, 400, (1, 30))
TOKENS[0, 2 : 2 + N] = TOKENS[0, 15 : 15 + N] = MARKER


@pytest.fixture
def base(tokenizer, tmp_path):
    return save_hf(tmp_path / "base", CONFIG, random_params(CONFIG), tokenizer, "float32")


def ours(config, params, adapter=None):
    model = LanguageModel(config, ComputeConfig(dtype="float32"), adapter)
    batch = {"tokens": TOKENS, "lengths": np.array([30]), "pixels": PIXELS[None]}
    return np.asarray(jax.jit(lambda p, b: model.logits(p, model.read_batch(p, b).hidden_BTD))(params, batch))


def theirs(model):
    pixels = torch.tensor(PIXELS.astype(np.float32) / 255 * 2 - 1).permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(TOKENS), pixel_values=pixels).logits.numpy()


def load_theirs(folder):
    return transformers.LlavaForConditionalGeneration.from_pretrained(folder, torch_dtype=torch.float32)


def test_peft_gives_our_logits(base, tokenizer, tmp_path):
    config, params = load_hf(base)
    table = rank_table(config, 4, ("all-linear",), {"layers.0": 2})
    params = with_adapters(params, table)
    folder = save_peft(tmp_path / "adapter", params, table, base=base, tokenizer=tokenizer, sees=True)
    model = peft.PeftModel.from_pretrained(load_theirs(base), folder)
    assert not [name for name, _ in model.named_parameters() if "lora" in name and "vision_tower" in name]
    expected = theirs(model)
    np.testing.assert_allclose(ours(config, params, make_adapter(table)), expected, atol=1e-4)
    assert np.abs(ours(*load_hf(base)) - expected).max() > 1e-2
    merge_lora(folder, tmp_path / "merged", dtype="float32")
    np.testing.assert_allclose(theirs(load_theirs(tmp_path / "merged")), expected, atol=1e-4)
    np.testing.assert_allclose(theirs(model.merge_and_unload()), ours(*load_merged(folder)), atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r".*language_model.*\.(q_proj|v_proj)", "lora_alpha": 16},
        {
            "target_modules": ["gate_proj", "o_proj"],
            "alpha_pattern": {"model.language_model.layers.1.mlp.gate_proj": 3, r"layers\.0\.self_attn\.o_proj": 5},
        },
    ],
    ids=["a pattern", "alphas"],
)
def test_a_folder_written_by_peft_loads_here(settings, base, tmp_path):
    torch.manual_seed(0)
    model = peft.get_peft_model(load_theirs(base), peft.LoraConfig(r=4, init_lora_weights=False, **settings))
    model.save_pretrained(tmp_path / "theirs")
    np.testing.assert_allclose(ours(*load_merged(tmp_path / "theirs")), theirs(model), atol=1e-4)


def test_adapters_of_the_tower_are_refused(base, tmp_path):
    model = peft.get_peft_model(load_theirs(base), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "theirs")
    told = r"vision_tower\.vision_model\..*q_proj\.lora_A\.weight is not supported; .*merge_and_unload"
    with pytest.raises(UserError, match=told):
        load_merged(tmp_path / "theirs")

"""Added tokens get rows in the model when asked; a model from scratch has as many words as its tokenizer."""

import dataclasses

import jax
import numpy as np
import pytest
from run_helpers import KEEP_ALL, assembled, assert_resumes_exactly, with_chats
from templates import with_template
from worlds import ADAPTERS

from minimind_jax.config.sections import ModelSettings
from minimind_jax.config.stages import SFTConfig
from minimind_jax.convert.hf import load_hf
from minimind_jax.data.template import CHAT_TEMPLATE
from minimind_jax.errors import UserError
from minimind_jax.folders import resolve_model_folder
from minimind_jax.model.transformer import LanguageModel


@pytest.fixture
def config(make, world, base, tmp_path):
    tokenizer = with_template(
        world.folder / "tokenizer", tmp_path / "tokenizer", CHAT_TEMPLATE, "<|im_end|>", ("<|bird|>", "<|cat|>")
    )
    changes = {"tokenizer": str(tokenizer.folder), "checkpoint": KEEP_ALL, "model": ModelSettings()}
    return with_chats(make(SFTConfig, tmp_path / "run", "sft", data={"train": ()}, **changes), world)


def sized(config, vocab_size, **changes):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size), **changes)


def test_a_model_with_too_few_rows_says_how_to_add_some(config):
    with pytest.raises(UserError, match=r"has 306 tokens.* vocabulary of 304; .*--model\.vocab_size 306, which adds"):
        assembled("sft", config)
    assert assembled("sft", sized(config, 306)).model.config.vocab_size == 306
    with pytest.raises(UserError, match=r"adapters train no embedding: train all weights with it first"):
        assembled("sft", sized(config, 306, lora=ADAPTERS))
    with pytest.raises(UserError, match=r"model\.vocab_size is 300, but the model .* has 304"):
        assembled("sft", sized(config, 300))


def test_a_model_from_scratch_has_as_many_words_as_its_tokenizer(config):
    scratch = dataclasses.replace(config, init_from="", model=dataclasses.replace(config.model, hidden_size=32))
    assert assembled("sft", scratch).model.config.vocab_size == 306
    assert assembled("sft", sized(scratch, 320)).model.config.vocab_size == 320


@pytest.mark.slow
def test_added_tokens_are_trained_resumed_exactly_and_exported(config, base, tmp_path):
    config = sized(config, 306)
    assert_resumes_exactly(config, tmp_path)
    made, params = load_hf(resolve_model_folder(config.run))
    assert (made.vocab_size, params["embed"]["embedding"].shape) == (306, (306, 32))
    old = load_hf(resolve_model_folder(base))[1]["embed"]["embedding"]
    assert np.abs(params["embed"]["embedding"][304:] - old.mean(0)).max() < 0.5 * np.abs(old).max()

    torch = pytest.importorskip("torch", reason="the comparison needs torch")
    transformers = pytest.importorskip("transformers", reason="the comparison needs transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        resolve_model_folder(config.run), torch_dtype=torch.float32
    )
    tokens = np.array([[1, 305, 7, 304, 2]])
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(jax.jit(LanguageModel(made).apply)(params, tokens)[0], expected, atol=1e-4)

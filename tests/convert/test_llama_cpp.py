"""GGUF files of models trained here, and of every kind of model and tokenizer, in real llama.cpp."""

import random

import jax
import numpy as np
import pytest

pytest.importorskip("gguf", reason="the gguf package writes the files (the extra of that name)")
pytest.importorskip("xllamacpp", reason="real llama.cpp comes with the oracle extra (xllamacpp)")

from foreign_words import INST, RULES, make_tokenizer
from llama_cpp import LlamaCpp
from tokenizers import Tokenizer as Backend

from minimind_jax.convert.gguf import adapter_to_gguf, to_gguf
from minimind_jax.convert.gguf_tokenizer import gguf_words
from minimind_jax.convert.hf import load_hf
from minimind_jax.convert.load import load_merged
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.model.config import ComputeConfig
from minimind_jax.model.transformer import LanguageModel

pytestmark = pytest.mark.oracle

PARTS = [
    *("\0", "\x01\x02", "\x7f", "\x1b[0m", "\r\n", "\r", "\n\n\n", "\t\t", " ", "   ", "\u00a0", "\u3000", "\u200b"),
    *("\u2028", "\ufeff", "\U0010ffff", "é", "e\u0301", "👩‍🚀", "🇩🇪🎉", "你好，世界！", "ภาษาไทย", "العربية", "हिन्दी"),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<tool_call>", "<|buffer1|>", "<tts_pad>"),
    *("<|im_", "_start|>", "it's", "I'LL", "we've", "1234567890", "３．１４", "½²", "ⅷ", "ſ", "İi", "㊙", "<my tag>"),
    *("a" * 300, "\n" * 200, " " * 200, "!!!???...", "def f(x):\n    return x\n", "\x0b\x0c\u0085"),
]


def hostile(count=200):
    rng = random.Random(0)
    return [*PARTS, *("".join(rng.choices(PARTS, k=rng.randint(2, 8))) for _ in range(count - len(PARTS)))]


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("dtype", ["float32", "q8_0"])
def test_llama_cpp_makes_the_same_tokens_and_answers(kind, dtype, chat_runs, tmp_path):
    folder = chat_runs / kind / "model"
    config, params = load_hf(folder)
    tokenizer = Tokenizer.load(folder)
    server = LlamaCpp(to_gguf(folder, tmp_path / "out.gguf", dtype).files[0])
    if dtype == "float32":
        assert len(hostile()) == 200
        for text in hostile():
            assert server.encode(text) == tokenizer.encode(text), repr(text)
    ids, logprobs = server.greedy(tokenizer.encode(chat_prompt(tokenizer)), 32)
    check_greedy(config, params, tokenizer, ids, logprobs, 0.02)


def chat_prompt(tokenizer):
    messages = [{"role": "user", "content": "the cat sat 你好"}]
    return "".join(segment.text for segment in tokenizer.prompt_segments(messages))


def check_greedy(config, params, tokenizer, ids, logprobs, bound):
    """llama.cpp's top tokens of every greedy step beside those of the model here, with its own answer so far before."""
    prompt = tokenizer.encode(chat_prompt(tokenizer))
    tokens = np.array([[*prompt, *ids[:-1, 0]]])
    logits = LanguageModel(config, ComputeConfig(dtype="float32")).apply(params, tokens)[0]
    ours = np.asarray(jax.nn.log_softmax(logits))[0, len(prompt) - 1 :]
    assert len(ids) == len(ours) == 32
    np.testing.assert_array_equal(ids[:, 0], ours.argmax(-1))
    np.testing.assert_allclose(np.take_along_axis(ours, ids, 1), logprobs, atol=bound)


@pytest.mark.parametrize("name", ["dense_untied", "dense_head_dim", "dense_yarn", "dense_linear", "moe_k1", "moe_yarn"])
def test_llama_cpp_computes_every_kind_of_model(name, saved, tokenizer, tmp_path):
    folder = saved(name)
    server = LlamaCpp(to_gguf(folder, tmp_path / "out.gguf").files[0])
    rng = np.random.default_rng(0)
    ids = rng.integers(36, tokenizer.vocab_size, 60)
    config, params = load_hf(folder)
    logits = LanguageModel(config, ComputeConfig(dtype="float32")).apply(params, ids[None])[0]
    ours = np.asarray(jax.nn.log_softmax(logits))[0, -1]
    (top,), (logprobs,) = server.greedy(ids, 1)
    assert list(top) == list(np.argsort(-ours)[:5])
    np.testing.assert_allclose(ours[top], logprobs, atol=1e-4)


def test_an_adapter_over_its_base_is_the_merged_model(chat_runs, tmp_path):
    folder = chat_runs / "adapter" / "model"
    config, params = load_merged(folder)
    tokenizer = Tokenizer.load(folder)
    prompt = tokenizer.encode(chat_prompt(tokenizer))
    base = to_gguf(chat_runs / "dense" / "model", tmp_path / "base.gguf").files[0]
    alone = adapter_to_gguf(folder, tmp_path / "adapter.gguf").files[0]
    merged = to_gguf(folder, tmp_path / "merged.gguf").files[0]
    for server in (LlamaCpp(base, alone), LlamaCpp(merged)):
        check_greedy(config, params, tokenizer, *server.greedy(prompt, 32), 1e-4)
    _, with_adapter = LlamaCpp(base, alone).greedy(prompt, 1)
    _, without = LlamaCpp(base).greedy(prompt, 1)
    assert np.abs(with_adapter - without).max() > 0.1


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_splits_as_the_tokenizer_does(rule, saved, tmp_path):
    words = make_tokenizer(tmp_path / "words", *RULES[rule])
    assert gguf_words(words, 400).pre == rule
    server = LlamaCpp(to_gguf(saved("dense", words), tmp_path / "out.gguf").files[0])
    for text in hostile():
        assert server.encode(text) == words.encode(text), repr(text)


def test_an_answer_ends_at_the_end_of_a_turn_too(saved, tokenizer, tmp_path):
    """A base model's end token is the end of a text; llama.cpp knows the name of no other end than the usual ones."""
    backend = Backend.from_str(tokenizer._backend.to_str())
    backend.add_special_tokens(["<turn_end>"])
    (tmp_path / "words").mkdir()
    backend.save(str(tmp_path / "words" / "tokenizer.json"))
    (tmp_path / "words" / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    (tmp_path / "words" / "chat_template.jinja").write_text(INST.replace("<|im_end|>", "<turn_end>"))
    words = Tokenizer.load(tmp_path / "words")
    written = to_gguf(saved("dense", words), tmp_path / "out")
    end = words.vocabulary()["<turn_end>"]
    server = LlamaCpp(written.files[0])
    for token in (end, words.eos_id):
        answer = server.ask("/completion", prompt=[70, 71], n_predict=5, logit_bias=[[token, 100.0]])
        assert (answer["stop_type"], answer["tokens_predicted"]) == ("eos", 1)
    text = written.files[1].read_text("utf-8")
    assert 'stop "<turn_end>"' in text
    assert 'stop "<|endoftext|>"' in text


def test_the_template_in_the_file_renders_as_ours(chat_runs, tmp_path):
    tokenizer = Tokenizer.load(chat_runs / "dense" / "model")
    server = LlamaCpp(to_gguf(chat_runs / "dense" / "model", tmp_path / "out.gguf").files[0])
    tools = [{"type": "function", "function": {"name": "f", "description": "né", "parameters": {"type": "object"}}}]
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi 你好"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42"},
    ]
    for thinks in (True, False):
        ours = "".join(s.text for s in tokenizer.prompt_segments(messages, tools, open_thinking=thinks))
        assert server.prompt(messages, tools=tools, chat_template_kwargs={"enable_thinking": thinks}) == ours

"""Perplexity against a plain float64 computation of each document, and what it refuses."""

import json

import jax
import numpy as np
import pytest

from minimind_jax.config.tools import PerplexityConfig
from minimind_jax.convert.hf import save_hf
from minimind_jax.data.documents import encode_conversation, encode_text
from minimind_jax.data.messages import Conversation
from minimind_jax.data.tokenizer import Tokenizer, train_bpe
from minimind_jax.errors import UserError
from minimind_jax.evaluate import perplexity
from minimind_jax.inference.load import load_model
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.transformer import LanguageModel

TEXTS = ["The cat sat on the mat.", "你好，世界！今天天气很好。" * 3, "A longer line about a dog and a log, 🐶. " * 6]
SEQ_LEN = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("perplexity")
    tokenizer = train_bpe(TEXTS, path / "tokenizer", vocab_size=330)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    save_hf(path / "model", config, LanguageModel(config).init(jax.random.key(1)), tokenizer, "float32")
    (path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(autouse=True)
def few_rows_at_once(monkeypatch, folder):
    monkeypatch.setattr(perplexity, "ROWS", 2)
    monkeypatch.setenv("MINIMIND_CACHE", str(folder / "cache"))


def evaluate(folder, seq_len=SEQ_LEN, file="text.jsonl", **given):
    settings = {"kind": "text", "seq_len": seq_len} | given
    return perplexity.evaluate_perplexity(
        PerplexityConfig(model=str(folder / "model"), files=(str(folder / file),), **settings)
    )


def by_hand(folder, text):
    """-log p of each predicted token of a text, in float64, its pieces of SEQ_LEN apart from each other."""
    model, params = load_model(folder / "model")
    ids = encode_text(Tokenizer.load(folder / "model"), text).ids
    nll = []
    for start in range(0, len(ids) - 1, SEQ_LEN):
        piece, targets = ids[start : start + SEQ_LEN], ids[start + 1 : start + SEQ_LEN + 1]
        logits = np.asarray(model.apply(params, piece[None])[0][0], np.float64)[: len(targets)]
        nll.append(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(targets)), targets])
    return nll


def test_every_token_of_every_document_counts_once(folder):
    result = evaluate(folder)
    pieces = [piece for text in TEXTS for piece in by_hand(folder, text)]
    nll = np.concatenate(pieces)
    assert max(map(len, pieces)) == SEQ_LEN  # a document was cut
    assert result.tokens == len(nll)
    assert result.nll == pytest.approx(nll.mean(), rel=1e-5)
    assert result.perplexity == pytest.approx(np.exp(nll.mean()), rel=1e-5)
    assert result.byte_count == sum(len(text.encode()) for text in TEXTS)
    assert result.bits_per_byte == pytest.approx(nll.sum() / np.log(2) / result.byte_count, rel=1e-5)
    at_position = [sum(piece[p] for piece in pieces if p < len(piece)) for p in range(SEQ_LEN)]
    np.testing.assert_allclose(result.nll_by_position_T, at_position, rtol=1e-4)


def test_of_conversations_only_the_assistant_s_words_count(folder):
    messages = [{"role": "user", "content": "What is a cat?"}, {"role": "assistant", "content": "A small animal."}]
    (folder / "talk.jsonl").write_text(json.dumps({"conversations": messages}) + "\n")
    result = evaluate(folder, file="talk.jsonl", kind="conversation")
    document = encode_conversation(Tokenizer.load(folder / "model"), Conversation(messages))
    assert result.tokens == document.trained.sum() < len(document.ids) / 2
    (folder / "talk.json").write_text(json.dumps([{"messages": messages, "id": 1}], indent=1))
    found = evaluate(folder, file="talk.json", kind=None)
    assert (found.tokens, found.nll) == (result.tokens, result.nll)


@pytest.mark.parametrize(
    "options, message, error",
    [
        ({"seq_len": 512}, "seq_len 512 is above the model's context of 128", UserError),
        ({"max_rows": -1}, "max_rows is -1; it must be at least 0", ValueError),  # as all settings are
    ],
)
def test_what_cannot_be_evaluated_is_refused(folder, options, message, error):
    with pytest.raises(error, match=message):
        evaluate(folder, **options)


def test_rows_without_a_token_to_predict_are_left_out(folder):
    """Of a question of seventy rows the answer is found, however few rows are asked for."""
    messages = [{"role": "user", "content": "What is a cat? " * 200}, {"role": "assistant", "content": "A cat."}]
    (folder / "question.jsonl").write_text(json.dumps({"conversations": messages}) + "\n")
    options = {"kind": "conversation", "max_rows": 1}
    assert evaluate(folder, 32, "question.jsonl", **options).tokens >= 3


def test_records_with_images_say_who_measures_them(folder):
    talk = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "A cat."}]
    (folder / "seen.jsonl").write_text(json.dumps({"image": "a.png", "conversations": talk}) + "\n")
    with pytest.raises(UserError, match=r"conversations with images; .*; evaluate images gives their bits per byte"):
        evaluate(folder, 32, "seen.jsonl", kind=None)


def test_a_missing_file_is_told_before_a_row_length_and_the_default_fits_the_model(folder):
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file"):
        evaluate(folder, 512, "gone.jsonl", kind=None)
    assert len(evaluate(folder, None).nll_by_position_T) == 128

"""Likelihoods of long continuations over many words: in pieces, and what they take."""

import jax
import numpy as np

from minimind_jax.inference.likelihood import LikelihoodScorer
from minimind_jax.losses import pieces
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.transformer import LanguageModel

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
         "num_key_value_heads": 1}  # fmt: skip


def test_pieces_give_what_the_whole_gives(monkeypatch):
    model = LanguageModel(ModelConfig(vocab_size=90, initializer_range=0.5, **SIZES))
    scorer = LikelihoodScorer(model, jax.jit(model.init)(jax.random.key(0)), batch_size=2)
    rng = np.random.default_rng(0)
    requests = [(rng.integers(3, 90, 5).tolist(), rng.integers(3, 90, count).tolist()) for count in (50, 7)]
    whole = scorer.score(requests)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 4 * 2 * 90 * 9)  # 8 pieces of 8 columns
    jax.clear_caches()
    in_pieces = scorer.score(requests)
    np.testing.assert_allclose([found.log_prob for found in in_pieces], [found.log_prob for found in whole], rtol=1e-6)
    assert [found[1:] for found in in_pieces] == [found[1:] for found in whole]


def test_long_continuations_over_the_words_of_qwen3_fit_in_memory():
    """16 x 1,024 tokens over 151,936 words: the logits alone take 9.3 GiB."""
    model = LanguageModel(ModelConfig(vocab_size=151936, **SIZES))
    scorer = LikelihoodScorer(model, model.abstract_params(), batch_size=16)
    rows, lengths = jax.ShapeDtypeStruct((16, 1024), "int32"), jax.ShapeDtypeStruct((16,), "int32")
    compiled = scorer._score.lower(model.abstract_params(), rows, lengths, rows, rows, None).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**30

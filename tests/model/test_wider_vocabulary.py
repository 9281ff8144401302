"""New words of a model: where their rows come from, and that nothing else changes."""

import jax
import numpy as np
import pytest

from minimind_jax.model.config import ModelConfig
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.model.vocabulary import grow_vocabulary

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.mark.parametrize("kind", [{}, {"tie_word_embeddings": False}, {"num_experts": 2}])
def test_new_rows_lie_around_the_mean_of_the_old_ones(kind):
    config = ModelConfig(**SMALL, **kind)
    params = jax.tree.map(np.asarray, LanguageModel(config).init(jax.random.key(0)))
    grown = grow_vocabulary(params, 43, jax.random.key(1))
    wanted = LanguageModel(ModelConfig(**{**SMALL, **kind, "vocab_size": 43})).abstract_params()
    assert jax.tree.map(np.shape, grown) == jax.tree.map(np.shape, wanted)
    tables = [(params["embed"]["embedding"], grown["embed"]["embedding"])]
    if "lm_head" in params:
        tables.append((params["lm_head"]["kernel"].T, grown["lm_head"]["kernel"].T))
    for old, new in tables:
        np.testing.assert_array_equal(new[:40], old)
        assert (np.abs(new[40:] - old.mean(0)) < 0.06 * old.std(0)).all()
        assert len(np.unique(new[40:], axis=0)) == 3
    again = grow_vocabulary(params, 43, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, again, grown)
    same = grow_vocabulary(params, 40, jax.random.key(1))
    assert same["embed"]["embedding"] is params["embed"]["embedding"]

"""Several adapters over one base: each answers as its merged model does, beside the others."""

import jax
import numpy as np
import pytest

from minimind_jax.convert.peft import StoredAdapter, rank_table
from minimind_jax.errors import UserError
from minimind_jax.inference.decode import make, read
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.request import Request
from minimind_jax.inference.sampling import SamplingConfig
from minimind_jax.model.config import ComputeConfig, ModelConfig
from minimind_jax.model.lora import init_adapters, join, merge
from minimind_jax.model.transformer import LanguageModel

MODEL = LanguageModel(
    ModelConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=128,
    ),
    ComputeConfig(dtype="float32"),
)  # fmt: skip
GREEDY = SamplingConfig(max_new_tokens=12, temperature=0.0, ignore_eos=True)


def adapter(params, rank, targets, seed):
    table = rank_table(MODEL.config, rank, targets, {})
    own = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = own.standard_normal(leaf.shape).astype(np.float32)
        return np.asarray(leaf) + 0.3 * noise * (path[-1].key == "lora_b")

    tree = jax.tree_util.tree_map_with_path(draw, init_adapters(jax.random.key(seed), params, table, 8.0, False))
    return StoredAdapter("base", {name: ranks for name, ranks in table.items() if any(ranks)}, tree, False)


@pytest.mark.slow
def test_adapters_of_any_shape_answer_in_one_batch():
    params = MODEL.init(jax.random.key(0))
    stored = {"all": adapter(params, 4, ("all-linear",), 1), "few": adapter(params, 2, ("q_proj", "down_proj"), 2)}
    trees = {"": params, **{name: merge(join(params, each.tree)) for name, each in stored.items()}}
    expected = {name: Engine(MODEL, tree).generate([[5, 6, 7]], GREEDY)[0] for name, tree in trees.items()}
    engine = Engine(MODEL, params, adapters={name: each.tree for name, each in stored.items()})
    names = ["all", "", "few", "all"]
    for asked in (names, names[::-1]):
        answers = engine.answers(Request((5, 6, 7), GREEDY, adapter=name) for name in asked)
        for name, answer in zip(asked, answers, strict=True):
            assert answer.ids == expected[name].ids
            np.testing.assert_allclose(answer.logprobs, expected[name].logprobs, atol=1e-4)
        programs = read._cache_size(), make._cache_size()
        names = [*names, "few"][:4]
    assert (read._cache_size(), make._cache_size()) == programs
    assert len({tuple(each.ids) for each in expected.values()}) == 3
    with pytest.raises(UserError, match="there is no adapter other; there are all, few"):
        engine.submit(Request((5,), GREEDY, adapter="other"))

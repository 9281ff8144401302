"""Which models are served, under which names, with how long a context."""

import shutil

import jax
import numpy as np
import openai
import pytest
from safetensors.numpy import load_file, save_file

from minimind_jax.config.serving import ServeConfig
from minimind_jax.convert.hf import load_hf
from minimind_jax.convert.peft import rank_table, save_peft
from minimind_jax.data.documents import encode_prompt
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.inference.load import load_engine
from minimind_jax.inference.sampling import SamplingConfig
from minimind_jax.model.lora import init_adapters, join
from minimind_jax.serve import models
from tests.serve.conftest import CONTEXT, client_of, running

ASK = [{"role": "user", "content": "hi"}]
GREEDY = SamplingConfig(max_new_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    """Two adapters that change every answer."""
    config, params = load_hf(folder)
    place, made = tmp_path_factory.mktemp("adapters"), {}
    for seed, (name, rank) in enumerate({"poet": 2, "lawyer": 4}.items()):
        table = rank_table(config, rank, ("all-linear",), {})
        tree, own = init_adapters(jax.random.key(seed), params, table, 8.0, False), np.random.default_rng(seed)
        leaves, shape = jax.tree.flatten(tree)
        tree = jax.tree.unflatten(shape, [leaf + 0.3 * own.standard_normal(leaf.shape) for leaf in leaves])
        made[name] = save_peft(place / name, join(params, tree), table, base=folder, tokenizer=Tokenizer.load(folder))
    return made


@pytest.mark.slow
def test_adapters_answer_under_their_names_as_their_merged_models_do(folder, adapters):
    with running(model=(f"tiny={folder}",), adapters=tuple(map(str, adapters.values()))) as server:
        client = client_of(server)
        assert [(model.id, model.parent) for model in client.models.list()] == [
            ("tiny", None),
            *((name, "tiny") for name in adapters),
        ]
        assert len(server.models.engines) == 1
        ids = encode_prompt(server.engine.tokenizer, ASK)
        for name, place in {"tiny": folder, **adapters}.items():
            found = client.chat.completions.create(model=name, messages=ASK, max_tokens=12, temperature=0)
            expected = load_engine(str(place)).generate([ids], GREEDY)[0].text
            assert (found.model, found.choices[0].message.content) == (name, expected)
        plain = client.embeddings.create(model="tiny", input="cat").data[0].embedding
        ids = server.engine.tokenizer.encode("cat")
        own = load_engine(str(folder))
        hidden = own.model.read_rows(own.params, own.model.embed(own.params, np.array([ids]))).hidden_BTD
        mean = np.asarray(hidden)[0].mean(0)
        np.testing.assert_allclose(plain, mean / np.linalg.norm(mean), atol=1e-5)
        with pytest.raises(openai.BadRequestError, match="base model"):
            client.embeddings.create(model="poet", input="cat")


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_an_adapter_that_would_spoil_the_answers_of_others_is_refused(folder, adapters, tmp_path, number):
    place = shutil.copytree(adapters["poet"], tmp_path / "poet")
    tensors = load_file(place / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = number
    save_file(tensors, place / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"poet/adapter_model\.safetensors: .* holds numbers that are infinite"):
        load_engine(str(folder), adapters=[str(place)])


@pytest.mark.parametrize(
    "entry, name", [("runs/a/model", "a"), ("b=runs/a", "b"), ("./c", "c"), ("org/d", "d"), ("/x=y/e", "e")]
)
def test_a_name_is_that_of_the_run_or_folder(entry, name):
    assert models._named(entry)[0] == name


def test_two_models_of_one_name_are_refused(folder):
    with pytest.raises(UserError, match="two models are called a"):
        models.load_models(ServeConfig(model=(f"a={folder}", f"a={folder}"), slots=1))


def test_the_context_is_what_the_memory_holds_for_all_slots(folder, monkeypatch):
    def context(free, **changes):
        monkeypatch.setattr(models, "free_memory", lambda: free)
        return models.context_of(folder, ServeConfig(model=(str(folder),), **{"slots": 4, **changes}))

    token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, their width, bytes
    assert context(1 << 40) == CONTEXT
    assert context(3 * 4 * 1024 * token) == 1024
    assert context(3 * 4 * 1024 * token, slots=8) == 512
    assert context(1, context=10**6) == CONTEXT
    assert context(1, context=300) == 300
    with pytest.raises(UserError, match="fewer --slots"):
        context(1000)

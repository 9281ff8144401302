"""Classifiers and reward models behind the server, beside what the library itself says of the same texts."""

import json

import httpx
import jax
import numpy as np
import pytest
from starlette.testclient import TestClient

from minimind_jax.config.serving import ServeConfig
from minimind_jax.convert.hf import Labels, save_hf
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.inference.score import Scorer
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.serve.app import Server, make_app
from minimind_jax.serve.models import Models
from minimind_jax.serve.worker import Worker
from minimind_jax.tools.toolbox import Toolbox
from tests.serve.conftest import running

TEXTS = ["The cat sat on the mat", "你好", "a dog " * 40]


@pytest.fixture(scope="module")
def folders(folder, tmp_path_factory):
    """name -> a folder of a random model with a head of scores."""
    place, tokenizer = tmp_path_factory.mktemp("heads"), Tokenizer.load(folder)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ModelConfig(vocab_size=384, num_key_value_heads=1, max_position_embeddings=64, **shape)
    labels = {"topics": Labels(("cats", "dogs", "other")), "marks": Labels(("new", "old"), several=True)}
    made = {}
    for name, own in {**labels, "reward": Labels(("score",))}.items():
        params = LanguageModel(config).init(jax.random.key(1))
        kernel = np.random.default_rng(0).normal(size=(32, len(own.names))).astype(np.float32)
        made[name] = save_hf(
            place / name, config, {**params, "score": {"kernel": kernel}}, tokenizer, "float32", labels=own
        )
    return made


@pytest.fixture(scope="module")
def heads(folders):
    with running(model=tuple(f"{name}={path}" for name, path in folders.items())) as server:
        with httpx.Client(base_url=server.root, timeout=60) as client:
            yield client


def test_labels_and_probabilities_are_the_classifiers(heads, folders):
    found = heads.post("/classify", json={"input": TEXTS}).json()
    assert (found["model"], [item["index"] for item in found["data"]]) == ("topics", [0, 1, 2])
    logits = Scorer(str(folders["topics"])).texts(TEXTS).astype(np.float64)
    likely = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose([item["probs"] for item in found["data"]], likely, atol=1e-6)
    assert [item["label"] for item in found["data"]] == [("cats", "dogs", "other")[i] for i in likely.argmax(1)]
    (alone,) = heads.post("/classify", json={"input": TEXTS[0]}).json()["data"]
    assert alone["probs"] == pytest.approx(found["data"][0]["probs"], abs=1e-6)


def test_a_length_is_compiled_once_and_ahead_of_its_turn(folders):
    scorer = Scorer(str(folders["topics"]))
    prompts = [[5] * 40] * 3
    scorer.prepare(prompts)
    compiled = dict(scorer._last_scores._programs)
    assert list(compiled) == [(4, 64)]
    logits = scorer.score_ids(prompts)
    assert scorer._last_scores._programs == compiled
    np.testing.assert_allclose(logits[0], scorer.score_ids(prompts[:1])[0], atol=1e-5)


def test_several_labels_have_probabilities_of_their_own(heads, folders):
    (item,) = heads.post("/classify", json={"input": TEXTS[0], "model": "marks"}).json()["data"]
    logits = Scorer(str(folders["marks"])).texts(TEXTS[:1])[0].astype(np.float64)
    np.testing.assert_allclose(item["probs"], 1 / (1 + np.exp(-logits)), atol=1e-6)
    assert item["labels"] == [name for name, share in zip(("new", "old"), item["probs"], strict=True) if share > 0.5]


def test_scores_are_the_reward_models(heads, folders):
    talks = [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}] for answer in ("cat", "dog " * 90)
    ]
    expected = Scorer(str(folders["reward"])).conversations([(talk, None) for talk in talks])[:, 0]
    found = heads.post("/score", json={"messages": talks}).json()
    assert [item["score"] for item in found["data"]] == pytest.approx(expected.tolist(), abs=1e-5)
    pairs = {"text_1": "hi", "text_2": ["cat", "dog " * 90]}
    assert heads.post("/score", json=pairs).json()["data"] == found["data"]
    (alone,) = heads.post("/score", json={"messages": talks[0]}).json()["data"]
    assert alone["score"] == pytest.approx(found["data"][0]["score"], abs=1e-5)


@pytest.mark.parametrize(
    "path, body",
    [
        ("/classify", {"input": TEXTS, "model": "reward"}),
        ("/classify", {"input": ""}),
        ("/classify", {"input": [5]}),
        ("/classify", {"input": ["a", {"type": "text", "text": "a"}]}),
        ("/classify", {"input": {}}),
        ("/score", {"text_1": ["a", "b", "c"], "text_2": ["a", "b"]}),
        ("/score", {"text_1": "a"}),
        ("/score", {"messages": [[]]}),
        ("/score", {"messages": [{"role": "user", "content": "a"}, []]}),
        ("/score", {}),
    ],
)
def test_what_cannot_be_scored_is_refused(heads, path, body):
    found = heads.post(path, json=body)
    assert found.status_code == 400
    assert found.json()["error"]["message"]


@pytest.mark.parametrize("picture", [{"image_url": {"url": "data:,"}}, {"type": "image", "image": "data:,"}])
def test_classifiers_of_texts_are_shown_no_pictures(heads, picture):
    for value in (picture, ["a cat", picture]):
        found = heads.post("/classify", json={"input": value})
        assert (found.status_code, found.json()["error"]["code"]) == (400, "images_not_supported")


def test_there_is_no_language_model_here(heads):
    found = heads.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
    assert (found.status_code, found.json()["error"]["code"]) == (404, "model_not_found")
    assert [item["task"] for item in heads.get("/v1/models").json()["data"]] == ["classify", "classify", "score"]


def test_a_page_without_tools_is_told_so(folder, tmp_path):
    (tmp_path / "index.html").write_text("")
    app = make_app(Server(ServeConfig(model=(str(folder),), web=True), Models([]), Worker([])), [], tmp_path)
    http = TestClient(app, "http://localhost")
    assert http.get("/tools").json() == {"tools": []}
    assert http.post("/tools/call", json={"name": "calculate_math", "arguments": {}}).status_code == 404


def test_calls_of_the_page_are_carried_out(folder):
    config = ServeConfig(model=(str(folder),), web=True, tools=("calculator",))
    with Toolbox(config.tools) as tools:
        http = TestClient(make_app(Server(config, Models([]), Worker([])), [], None, tools), "http://localhost")
        assert [tool["function"]["name"] for tool in http.get("/tools").json()["tools"]] == ["calculate_math"]
        for arguments in ({"expression": "256*37"}, '{"expression": "256*37"}'):
            found = http.post("/tools/call", json={"name": "calculate_math", "arguments": arguments}).json()
            assert (json.loads(found["content"]), found["is_error"]) == ({"result": "9472"}, False)
        found = http.post("/tools/call", json={"name": "nothing", "arguments": {}}).json()
        assert found["is_error"]
        assert http.post("/tools/call", json={"name": "calculate_math", "arguments": "{"}).status_code == 400

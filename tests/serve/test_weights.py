"""A model takes other weights while it is served, and tells what its tokens were drawn from."""

import dataclasses
import shutil
import threading

import httpx
import jax
import numpy as np
import pytest

from minimind_jax.convert.hf import load_hf, save_hf
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.inference.load import load_engine
from minimind_jax.model.transformer import LanguageModel
from tests.serve.conftest import running, wait_until

UPDATE = "/update_weights_from_disk"
PROMPT = [5, 60, 70, 80]
ASKED = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0.7, "top_p": 0.9, "seed": 3, "return_token_ids": True}


@pytest.fixture(scope="module")
def place(folder, tmp_path_factory):
    """A model's folder, and in it one with other weights, `new`, and one of another shape, `larger`."""
    place = shutil.copytree(folder, tmp_path_factory.mktemp("served") / "tiny")
    config, _ = load_hf(folder)
    save_hf(place / "new", config, LanguageModel(config).init(jax.random.key(9)), Tokenizer.load(folder), "float32")
    larger = dataclasses.replace(config, num_hidden_layers=3)
    save_hf(place / "larger", larger, LanguageModel(larger).init(jax.random.key(9)), Tokenizer.load(folder), "float32")
    return place


@pytest.fixture(scope="module")
def served(place):
    with running(model=(f"tiny={place}",), update_weights=True) as server:
        yield server


def choice_of(server, **changes):
    reply = httpx.post(server.root + "/v1/completions", json={**ASKED, **changes}, timeout=60)
    return reply.json()["choices"][0]


def expected(folder):
    engine = load_engine(str(folder))
    sampling = dataclasses.replace(engine.sampling, max_new_tokens=12, temperature=0.7, top_p=0.9, seed=3)
    return engine.generate([PROMPT], sampling)[0]


def test_token_ids_come_with_log_probabilities_of_what_they_were_drawn_from(server, folder):
    found, answer = choice_of(server, logprobs=0), expected(folder)
    assert (found["token_ids"], found["prompt_token_ids"]) == (answer.ids, PROMPT)
    np.testing.assert_allclose(found["sampled_logprobs"], [t.sampled_logprob for t in answer.tokens], atol=1e-5)
    np.testing.assert_allclose(found["logprobs"]["token_logprobs"], answer.logprobs, atol=1e-5)
    assert not np.allclose(found["sampled_logprobs"], answer.logprobs, atol=0.1)
    asked = {**ASKED, "seed": 2**63 - 1, "n": 2}
    assert httpx.post(server.root + "/v1/completions", json=asked).json()["error"]["param"] == "seed"
    messages = {"messages": [{"role": "user", "content": "hi"}], "seed": 1, "max_tokens": 9, "return_token_ids": True}
    (chat,) = httpx.post(server.root + "/v1/chat/completions", json=messages).json()["choices"]
    assert len(chat["sampled_logprobs"]) == len(chat["token_ids"]) > 0


def test_open_answers_are_finished_with_the_old_weights_and_later_ones_have_the_new(served, place):
    step, slow = served.engine.step, threading.Event()
    served.engine.step = lambda: (slow.wait(0.5), step())[1]
    told = {}
    asks = threading.Thread(target=lambda: told.update(choice_of(served, ignore_eos=True, max_tokens=300)))
    asks.start()
    wait_until(lambda: served.engine.running, 10)
    body = {"model_path": str(place / "new"), "weight_version": "2"}
    updates = threading.Thread(
        target=lambda: told.update(update=httpx.post(served.root + UPDATE, json=body, timeout=60))
    )
    updates.start()
    wait_until(lambda: served.worker._loading, 20)
    refused = httpx.post(served.root + "/v1/completions", json=ASKED)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    slow.set()
    asks.join()
    updates.join()
    assert told["update"].json()["success"] is True
    old = expected(place)
    assert told["token_ids"][: len(old.ids)] == old.ids
    reply = httpx.post(served.root + "/v1/completions", json=ASKED).json()
    assert reply["metadata"] == {"weight_version": "2"}
    assert reply["choices"][0]["token_ids"] == expected(place / "new").ids != old.ids


def test_what_is_not_below_the_folder_is_not_read(served, place, folder):
    for path in (folder, place.parent, place / "new" / ".." / "..", "/etc", "~", "a\0b", "a" * 5000):
        found = httpx.post(served.root + UPDATE, json={"model_path": str(path)})
        assert (found.status_code, found.json()["error"]["param"]) == (403, "model_path"), path
    (place / "link").symlink_to(folder)
    assert httpx.post(served.root + UPDATE, json={"model_path": str(place / "link")}).status_code == 403


def test_a_model_of_another_shape_and_none_are_refused_and_the_old_one_stays(served, place):
    before = choice_of(served)["token_ids"]
    for name, words in (("larger", "another shape"), ("nothing", "no such file")):
        found = httpx.post(served.root + UPDATE, json={"model_path": str(place / name)})
        assert found.status_code == 400
        assert words in found.json()["error"]["message"]
    assert choice_of(served)["token_ids"] == before


def test_weights_are_not_replaced_where_it_was_not_allowed(server, folder):
    assert httpx.post(server.root + UPDATE, json={"model_path": str(folder)}).status_code == 404

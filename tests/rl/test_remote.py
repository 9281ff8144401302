"""A policy on a server in another process, beside the same policy in an engine here."""

import contextlib
import dataclasses
import functools
import http.server
import json
import shutil
import threading
import time

import httpx
import jax
import numpy as np
import pytest
from run_helpers import rows_of
from worlds import write_lines

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.config.rl import GRPOConfig, RewardsConfig, RolloutConfig
from minimind_jax.convert.hf import load_hf, read_hf_config
from minimind_jax.convert.peft import rank_table
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.request import Request
from minimind_jax.model.config import ComputeConfig
from minimind_jax.model.lora import init_adapters, join, make_adapter, merge
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.rl.environment import SingleTurn
from minimind_jax.rl.episode import Task
from minimind_jax.rl.play import Start, play
from minimind_jax.rl.remote import RemotePolicy
from minimind_jax.stages import start
from minimind_jax.stages.reinforce import check
from minimind_jax.training.run import RunFolder
from tests.serve.conftest import Process, wait_until

PROMPTS = [(5, 60, 70), (80,), tuple(range(20, 60)), (5, 60, 70)]
PLAIN = SamplingConfig(max_new_tokens=24, temperature=1.0, top_p=1.0)
WARM = dataclasses.replace(PLAIN, temperature=0.7, top_p=0.9, top_k=40)


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    return shutil.copytree(RunFolder(base).model, tmp_path_factory.mktemp("served") / "policy")


@pytest.fixture(scope="module")
def tokenizer(base):
    return Tokenizer.load(RunFolder(base).model)


@pytest.fixture(scope="module")
def model(base):
    return LanguageModel(read_hf_config(RunFolder(base).model), ComputeConfig(dtype="float32"))


@pytest.fixture(scope="module")
def params(model):
    """Of policies whose answers are varied."""
    config = dataclasses.replace(model.config, initializer_range=0.3)
    return [LanguageModel(config).init(jax.random.key(seed)) for seed in range(3)]


@pytest.fixture(scope="module")
def server(folder):
    server = Process(folder, "--update_weights").ready()
    yield server
    server.process.kill()
    server.process.wait(20)


@pytest.fixture(scope="module")
def url(server):
    return server.url


@pytest.fixture
def policy_at(model, tokenizer, folder):
    return lambda url, **changes: RemotePolicy(url, folder, model, tokenizer, **{"patience": 2.0, **changes})


def requests():
    """Both ways of drawing, ends of several kinds, and a stop string."""
    drawn = [dataclasses.replace(way, seed=2**62 - n) for n, way in enumerate([PLAIN, WARM, PLAIN, WARM])]
    asked = [Request(prompt, sampling) for prompt, sampling in zip(PROMPTS, drawn, strict=True)]
    stops = dataclasses.replace(PLAIN, stop=("e", "a"), seed=4)
    return [*asked, Request((9, 9), stops), Request((5,), dataclasses.replace(PLAIN, ignore_eos=True), stop_ids=(71,))]


def written(writer):
    answers = [writer.submit(request) for request in requests()]
    while any(answer.finish_reason is None for answer in answers):
        writer.step(patient=True)
    return answers


@functools.cache
def engine_of(model, tokenizer):
    return Engine(model, model.init(jax.random.key(0)), tokenizer, slots=4, context=256)


def here(model, tokenizer, params):
    engine = engine_of(model, tokenizer)
    engine.load(params)
    return written(engine)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one.ids, one.finish_reason, one.text) == (other.ids, other.finish_reason, other.text)
        logprobs = [[token.sampled_logprob for token in answer.tokens] for answer in (one, other)]
        np.testing.assert_allclose(*logprobs, atol=1e-4)


def test_a_server_writes_what_an_engine_here_writes_with_each_new_policy(url, policy_at, model, tokenizer, params):
    policy, seen = policy_at(url), []
    for each in params[1:]:
        found = written(policy.load({**each, "critic": {"score": np.zeros(3)}}))
        assert_same(found, here(model, tokenizer, each))
        seen.append([answer.ids for answer in found])
    assert seen[0] != seen[1]
    assert {answer.finish_reason for answer in found} == {"stop", "length"}


def test_episodes_are_those_that_an_engine_plays(url, policy_at, model, tokenizer, params):
    def played(writer):
        task, prompts = Task("a record", [], None, {}), ([5, 60, 70], [80, 81])
        starts = [Start(n, task, prompt, False, seed=n) for n, prompt in enumerate(prompts * 3)]
        return play(writer, starts, SingleTurn(), tokenizer, sampling=PLAIN, seq_len=64)

    engine = engine_of(model, tokenizer)
    engine.load(params[1])
    for one, other in zip(played(policy_at(url).load(params[1])), played(engine), strict=True):
        assert (one.tokens, one.sampled, one.finish, one.text) == (
            other.tokens,
            other.sampled,
            other.finish,
            other.text,
        )
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_run_learns_from_a_server_what_it_learns_by_itself(url, folder, make, tmp_path, ahead):
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": f"the {n} cat"} for n in range(24)])
    loop = {"steps": 4, "eval_every": 2, "eval_rows": 2, "batch_tokens": None}
    rollout = RolloutConfig(prompts=2, completions=4, max_new_tokens=8, ahead=ahead, correction="token")
    own = {
        "rollout": rollout,
        "rewards": RewardsConfig(use=("repetition(1)",)),
        "rate": 3e-2,
        "data": {"val_fraction": 0.25},
    }
    alone = make(GRPOConfig, tmp_path / "alone", prompts, training=loop, **own)
    served = dataclasses.replace(rollout, server=url, server_model=str(folder))
    remote = make(GRPOConfig, tmp_path / "remote", prompts, training=loop, **{**own, "rollout": served})
    expected, found = (rows_of(start(config)) for config in (alone, remote))
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    assert max(row.get("grad_norm", 0) for row in found) > 1e-3  # the loss of what was just written is 0
    for one, other in zip(found, expected, strict=True):
        for name in ("reward", "loss", "val_reward"):
            assert one.get(name) == pytest.approx(other.get(name), abs=1e-4), (one["step"], name)
    if ahead:
        with pytest.raises(UserError, match="is of one process"):
            check(remote, 2)
        with pytest.raises(UserError, match="would be written over"):
            start(dataclasses.replace(remote, run=str(tmp_path / "over"), init_from=str(folder)))


def test_adapters_are_merged_into_what_the_server_gets(url, model, tokenizer, params, folder):
    table = rank_table(model.config, 2, ("q_proj",), {})
    tree, own = init_adapters(jax.random.key(1), params[0], table, 8.0, False), np.random.default_rng(0)
    trained = join(params[0], jax.tree.map(lambda leaf: leaf + 0.2 * own.standard_normal(leaf.shape), tree))
    adapted = dataclasses.replace(model, adapter=make_adapter(table))
    found = written(RemotePolicy(url, folder, adapted, tokenizer).load(trained))
    assert_same(found, here(model, tokenizer, merge(trained)))
    assert jax.tree.structure(load_hf(folder)[1]) == jax.tree.structure(params[0])


def test_answers_that_nobody_waits_for_are_given_up(url, policy_at, params):
    writer = policy_at(url, slots=1).load(params[0])
    first, *others = [writer.submit(Request((5, n), PLAIN)) for n in range(60, 66)]
    with pytest.raises(ValueError, match="in work"):
        policy = policy_at(url)
        policy._writer = writer
        policy.load(params[0])
    for answer in others:
        writer.cancel(answer)
    while first.finish_reason is None:
        writer.step()
    assert {answer.finish_reason for answer in others} == {"cancelled"}
    assert not writer.busy
    assert writer.step() == []


# Servers with a fault -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def standing_before(url, change):
    """A server that hands on to another one. change: gets a path, the body, and what asks the other server, which
    returns (status, reply), and returns the like."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            server.keys.add(self.headers["authorization"])
            status, reply = change(self.path, body, lambda: posted(url + self.path, body))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.keys = set()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def posted(url, body):
    found = httpx.post(url, json=body, timeout=30)
    return found.status_code, found.json()


def changing(**changes):
    """Of each choice: None takes the field away."""

    def change(path, body, ask):
        status, reply = ask()
        for choice in reply.get("choices", ()):
            for name, value in changes.items():
                choice[name] = value(choice[name]) if value else None
        return status, reply

    return change


FAULTS = {
    "without token ids": changing(token_ids=None),
    "without log-probabilities": changing(sampled_logprobs=None, logprobs=None),
    "model's ids are 0 to 303": changing(token_ids=lambda ids: [ids[0] + 400, *ids[1:]]),
    "has another tokenizer": changing(token_ids=lambda ids: [(i + 7) % 200 + 80 for i in ids]),
    "other tokens before the prompt": changing(prompt_token_ids=lambda ids: [1, *ids]),
    "not by a token that ends one": changing(
        token_ids=lambda ids: ids[:-1], sampled_logprobs=lambda values: values[:-1], finish_reason=lambda _: "stop"
    ),
    "log-probability nan": changing(sampled_logprobs=lambda values: [float("nan"), *values[1:]]),
    "which is no completion": lambda path, body, ask: (ask()[0], ["text"]),
    "does not take new weights": lambda path, body, ask: (404, {"detail": "Not Found"}),
    "HTTP 401: no key": lambda path, body, ask: (401, {"error": {"message": "no key"}}),
    "HTTP 400: too long": lambda path, body, ask: (400, {"message": "too long"}),
}


@pytest.mark.parametrize("words", FAULTS)
def test_a_server_that_nothing_can_be_learned_from_is_refused_before_the_first_answer(url, policy_at, params, words):
    with standing_before(url, FAULTS[words]) as other, pytest.raises(UserError, match=words):
        policy_at(other.url).load(params[0])


def test_answers_of_other_weights_are_noticed(url, policy_at, params):
    version = {}

    def change(path, body, ask):
        status, reply = ask()
        return status, {**reply, **({"metadata": version} if version and "choices" in reply else {})}

    with standing_before(url, change) as other:
        writer = policy_at(other.url).load(params[0])
        version["weight_version"] = "older"
        with pytest.raises(UserError, match="other weights than it was given"):
            written(writer)
        assert not writer.busy
        with pytest.raises(UserError, match="answers with the weights 'older'"):
            policy_at(other.url).load(params[0])


def test_a_server_that_tells_no_version_answers_otherwise_with_other_weights(url, policy_at, params):
    """As vLLM: other paths for new weights, and log-probabilities from before the temperature."""
    asked, is_stale = [], False

    def change(path, body, ask):
        if path.startswith("/update_weights"):
            return 404, {"detail": "Not Found"}
        if path == "/v1/completions":
            status, reply = ask()
            for choice in reply["choices"]:
                del choice["sampled_logprobs"]
            return status, {name: value for name, value in reply.items() if name != "metadata"}
        asked.append(path)
        if path == "/collective_rpc" and not is_stale:
            assert body["method"] == "reload_weights"
            posted(url + "/update_weights_from_disk", {"model_path": body["kwargs"]["weights_path"]})
        return 200, {}

    with standing_before(url, change) as other:
        policy = policy_at(other.url)
        for each in (params[1], params[2]):
            writer = policy.load(each)
        assert asked == ["/collective_rpc", "/reset_prefix_cache"] * 2
        with pytest.raises(UserError, match="from before the temperature"):
            writer.submit(Request((5,), WARM))
        answer = writer.submit(Request((5,), PLAIN))
        while answer.finish_reason is None:
            writer.step()
        is_stale = True
        policy.load(params[2])
        with pytest.raises(UserError, match="answers as before"):
            policy.load(params[1])


def test_a_server_that_is_busy_for_a_while_is_asked_again(url, policy_at, model, tokenizer, params, monkeypatch):
    monkeypatch.setenv("MINIMIND_API_KEY", "of the server\n")
    left = {"/v1/completions": [429, 503, 500], "/update_weights_from_disk": [503]}

    def busy(path, body, ask):
        return (left[path].pop(), {"error": "busy"}) if left[path] else ask()

    with standing_before(url, busy) as other:
        found = written(policy_at(other.url, patience=10).load(params[1]))
        assert other.keys == {"Bearer of the server"}
    assert_same(found, here(model, tokenizer, params[1]))


def test_nobody_there_and_no_address_are_said(policy_at, params):
    with pytest.raises(UserError, match="no address of HTTP"):
        policy_at("file:///etc/passwd")
    with pytest.raises(UserError, match="has not answered for 1 seconds"):
        policy_at("http://127.0.0.1:9", patience=1).load(params[0])


@pytest.mark.slow
def test_a_server_that_dies_ends_the_run_and_does_not_hang_it(server, policy_at, params):
    """The last one, for the server is gone then."""
    writer = policy_at(server.url).load(params[0])
    short, long = (dataclasses.replace(PLAIN, max_new_tokens=n, ignore_eos=True) for n in (5, 1400))
    answers = [writer.submit(Request((5, n), (short, long)[n % 2])) for n in range(30, 60)]
    wait_until(writer.step, 20)
    server.process.kill()
    begun = time.monotonic()
    with pytest.raises(UserError, match="has not answered for 2 seconds"):
        while any(answer.finish_reason is None for answer in answers):
            writer.step(patient=True)
    assert time.monotonic() - begun < 10
    assert not writer.busy
    assert {answer.finish_reason for answer in answers} == {"length", "cancelled"}

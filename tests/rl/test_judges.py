"""Models and servers as judges, beside what they say when they are asked by themselves."""

import contextlib
import http.server
import json
import socket
import threading
import time

import jax
import numpy as np
import pytest

from minimind_jax.convert.hf import Labels, save_hf
from minimind_jax.data.tokenizer import train_bpe
from minimind_jax.data.tools import parse_calls
from minimind_jax.errors import UserError
from minimind_jax.inference.score import Scorer
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.rl import judges
from minimind_jax.tools.toolbox import Observation
from tests.rl.episodes import episode
from tests.rl.test_rewards import rewards, values
from tests.serve.conftest import running

CALL = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'


@pytest.fixture(scope="module")
def folders(tmp_path_factory, compilation_cache):
    """name -> a folder of a random model with a head of scores."""
    place = tmp_path_factory.mktemp("heads")
    words = train_bpe(["The cat sat on the mat.", "你好，世界。"] * 5, place / "words", vocab_size=330)
    config = ModelConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    made = {}
    kinds = {"topics": Labels(("cats", "dogs, big")), "marks": Labels(("new", "old"), several=True)}
    for name, own in {**kinds, "reward": Labels(("score",))}.items():
        params = LanguageModel(config).init(jax.random.key(1))
        kernel = np.random.default_rng(0).normal(size=(32, len(own.names))).astype(np.float32)
        made[name] = str(
            save_hf(place / name, config, {**params, "score": {"kernel": kernel}}, words, "float32", labels=own)
        )
    made["language"] = str(save_hf(place / "language", config, params, words, "float32"))
    return made


def talks():
    return [
        episode("so</think>The cat sat", question="What?", thinking=True),
        episode("你好", question="Who?"),
        episode("", question="And?"),
        episode(CALL, "done", calls=[parse_calls(CALL)[1]], observations=[(Observation("6"),)], question="x"),
    ]


def asked(question, *answers):
    return [{"role": "user", "content": question}, *answers]


def said(text):
    return {"role": "assistant", "content": text}


CONVERSATIONS = [
    asked("What?", said("The cat sat")),
    asked("Who?", said("你好")),
    asked("And?", said("")),
    asked("x", {**said(""), "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
          {"role": "tool", "content": "6"}, said("done")),
]  # fmt: skip


def test_a_conversation_is_scored_without_thoughts():
    assert [judges.talk(each) for each in talks()] == CONVERSATIONS
    whole = judges.written(talks()[3])
    assert whole == [said(CALL), {"role": "tool", "content": "6"}, said("done")]


def test_our_reward_model_and_classifiers(folders, capsys):
    expected = Scorer(folders["reward"]).conversations([(each, None) for each in CONVERSATIONS])[:, 0]
    assert values(f"model({folders['reward']})", talks()) == pytest.approx(expected.tolist(), abs=1e-5)
    texts = ["The cat sat", "你好", "done"]
    logits = Scorer(folders["topics"]).texts(texts).astype(np.float64)
    shares = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[:, 1]
    found = values(f'model({folders["topics"]}, label="dogs, big")', talks())
    assert [found[0], found[1], found[3]] == pytest.approx(shares.tolist(), abs=1e-6) and found[2] == 0
    likely = 1 / (1 + np.exp(-Scorer(folders["marks"]).texts(texts).astype(np.float64)[:, 0]))
    found = values(f"model({folders['marks']}, label=new)", talks())
    assert [found[0], found[1], found[3]] == pytest.approx(likely.tolist(), abs=1e-6)
    assert values(f"model({folders['marks']}, new)", [episode()]) == [0]
    assert capsys.readouterr().err == ""
    with rewards(f"model({folders['reward']})") as give:
        for _ in range(2):
            give([episode("cat " * 200), episode("dog")])
    assert capsys.readouterr().err.count("1 of 2 completions were longer than the 128 tokens it reads") == 1


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("model", "there is no folder"),
        ("model(no/such/run)", "no/such/run"),
        ("model({language})", "is a language model"),
        ("model({topics})", "its scores are of cats, dogs, big; expected one of several"),
        ("model({topics}, birds)", "its scores are of cats"),
        ("model({reward}, good)", "its scores are of score; .*none of one"),
        ("hf(no/such)", r"hf\(no/such\): there is no such folder; download"),
        ("internlm2(no/such, clip=x)", "'x' is wrong there"),
        ("judge(localhost:8000)", "expected http:// or https://"),
        ("judge(http://localhost/a,b)", "'b' is wrong there"),
    ],
)
def test_judges_that_are_none_are_refused(entry, words, folders):
    with pytest.raises(UserError, match=words):
        rewards(entry.format(**folders))


def test_a_model_that_another_program_runs_is_told_as_that(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "id2label": {"0": "good"}}')
    with pytest.raises(UserError, match="model_type 'bert' is not supported"):
        rewards(f"model({tmp_path})")


# Models of others -----------------------------------------------------------------------------------------------------


@pytest.mark.slow  # imports torch and transformers
def test_transformers_says_of_our_models_what_we_say(folders):
    pytest.importorskip("transformers")
    for name, label in (("reward", ""), ("topics", "dogs, big"), ("marks", "new")):
        ours, theirs = judges.model(folders[name], label), judges.hf(folders[name], label)
        assert theirs(talks()) == pytest.approx(ours(talks()), abs=1e-5)
    assert theirs([]) == [] and theirs([episode("  ")]) == [0]
    assert judges.hf(folders["reward"])([]) == []
    assert values(f'hf({folders["topics"]}, "dogs, big")', talks()) == pytest.approx(
        judges.model(folders["topics"], "dogs, big")(talks()), abs=1e-5
    )
    with pytest.raises(UserError, match=r"no sequence classifier: its weights lack score\.weight"):
        judges.hf(folders["language"])


@pytest.mark.slow  # imports torch and transformers
def test_a_pair_of_question_and_answer(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "cat", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1,
        max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    network = transformers.BertForSequenceClassification(config).eval()
    network.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    answers = ["cat", "dog dog", "", "cat " * 100] * 5
    found = judges.hf(str(tmp_path / "rm"))([episode(text, question="what") for text in answers])
    for text, value in zip(answers[:4], found, strict=False):
        inputs = tokenizer("what", text, return_tensors="pt", truncation=True, max_length=16)
        assert value == pytest.approx(network(**inputs).logits.item(), abs=1e-5)
    assert len(found) == 20 and found[:4] == pytest.approx(found[16:], abs=1e-5)


REMOTE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class Config(PretrainedConfig):
    model_type = "judge"

class Judge(PreTrainedModel):
    config_class = Config
    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.post_init()
    def {name}
"""
ONE = 'get_score(self, tokenizer, messages):\n        return self.scale.item() * len(messages[-1]["content"])'
MANY = "get_scores(self, tokenizer, talks):\n        return [1.0 + len(t) for t in talks]\n    get_score = None"


@pytest.mark.slow  # imports torch and transformers
@pytest.mark.parametrize(
    ("code", "found"),
    [(ONE, [2.5, 2.0, 0.0, 2.5]), (MANY, [2.5, 2.5, 2.5, 2.5]), ("other(self):\n        pass", None)],
)
def test_a_reward_model_with_code_of_its_own(code, found, folders, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from safetensors.torch import save_file

    judges_folder = tmp_path / "judge"
    judges_folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (judges_folder / file).write_bytes((tmp_path.__class__(folders["reward"]) / file).read_bytes())
    (judges_folder / "modeling_judge.py").write_text(REMOTE.format(name=code))
    names = {"AutoConfig": "modeling_judge.Config", "AutoModel": "modeling_judge.Judge"}
    (judges_folder / "config.json").write_text(json.dumps({"model_type": "judge", "auto_map": names}))
    save_file({"scale": torch.ones(1)}, judges_folder / "model.safetensors", {"format": "pt"})
    if found is None:
        with pytest.raises(UserError, match="the model has no get_score"):
            judges.internlm2(str(judges_folder))
    else:
        assert judges.internlm2(str(judges_folder), clip=2.5)(talks()) == found


# Servers --------------------------------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, texts = self.server, [messages[-1]["content"] for messages in body["completions"]]
        server.asked.append((len(texts), self.headers.get("Authorization")))
        way = self.path.strip("/")
        if way == "hang":
            time.sleep(20)
        if (way == "busy" and len(server.asked) < 3) or way in ("400", "500"):
            self.send_response(503 if way == "busy" else int(way))
            self.end_headers()
            return
        if way == "fields":
            found = [fields["score"] for fields in body["fields"]]
        else:
            found = [len(text) for text in texts]
        answer = {"few": {"rewards": found[:-1]}, "odd": {"rewards": [None, "good", True, float("nan")]}, "list": found}
        text = "<html>" if way == "html" else json.dumps(answer.get(way, {"rewards": found}))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *words):
        pass


@contextlib.contextmanager
def judging():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()


def test_a_server_is_asked_in_parts_at_the_same_time_and_in_order(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    with judging() as server:
        texts = [episode("x" * n) for n in range(50)]
        assert values(f"judge({server.url})", texts) == list(range(50))
        assert sorted(server.asked) == [(2, "Bearer secret")] + [(16, "Bearer secret")] * 3
        assert judges.judge(f"{server.url}/fields")([episode("a", score=0.25, date=time)]) == [0.25]
        assert judges.judge(server.url)([]) == []


def test_our_own_server_is_a_judge(folders):
    expected = Scorer(folders["reward"]).conversations([(each, None) for each in CONVERSATIONS])[:, 0]
    with running(model=(f"reward={folders['reward']}",)) as server:
        assert judges.judge(f"{server.root}/score")(talks()) == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("way", "words", "requests"),
    [
        ("few", "gave no list of 4 rewards", 1),
        ("html", "the answer is not JSON", 1),
        ("list", "TypeError", 1),
        ("400", "HTTP 400: Bad Request", 1),
        ("500", "has not answered for 2 seconds: HTTP 500", 5),
    ],
)
def test_a_server_that_fails(way, words, requests):
    with judging() as server:
        found = judges.judge(f"{server.url}/{way}")(talks())
        assert len(found) == 4 and all(words in value and server.url in value for value in found)
        assert len(server.asked) == requests


def test_a_server_that_is_busy_is_asked_again():
    with judging() as server:
        assert judges.judge(f"{server.url}/busy")([episode("abc")]) == [3]


def test_odd_values_a_server_that_hangs_and_one_that_is_not_there():
    with judging() as server:
        none, *others = judges.judge(f"{server.url}/odd")(talks())
        assert none is None and others[0].startswith("gave the text 'good'") and others[1] is True
        with rewards(f"judge({server.url}/hang)", on_error="count", seconds=1.0) as give:
            started = time.monotonic()
            assert list(give([episode("a")]).values()) == [1]
            assert time.monotonic() - started < 10
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with rewards(f"judge({url})") as give, pytest.raises(UserError, match=f"judge.{url}.: f.jsonl:1: .*refused"):
            give([episode("a")])

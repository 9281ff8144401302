"""A server in a thread of this process, with a tiny random model, and clients of it."""

import contextlib
import os
import re
import subprocess
import sys
import threading
import time

import httpx
import jax
import openai
import pytest

from minimind_jax.config.serving import ServeConfig
from minimind_jax.convert.hf import save_hf
from minimind_jax.data.tokenizer import train_bpe
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.serve import log
from minimind_jax.serve.listening import Listening
from minimind_jax.serve.models import load_models

TEXTS = [
    "The cat sat on the mat, and the dog sat on the log.",
    "你好，世界。今天天气很好，我们去公园散步吧。",
    "User: what is a cat? Assistant: a cat is a small animal. 🐱🐶",
    '{"name": "add", "arguments": {"a": 1, "b": [true, null]}}',
]
CONTEXT = 1536


@pytest.fixture(scope="session")
def folder(tmp_path_factory, compilation_cache):
    """A random model whose answers are varied text and seldom end by themselves."""
    words = train_bpe(TEXTS * 3, tmp_path_factory.mktemp("words"), vocab_size=360)
    config = ModelConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.3,
    )  # fmt: skip
    params = LanguageModel(config).init(jax.random.key(3))
    return save_hf(tmp_path_factory.mktemp("models") / "tiny", config, params, words, "float32")


class Running:
    """A server that listens. url: of its /v1."""

    def __init__(self, config: ServeConfig, keys=(), tools=None):
        log.set_up()
        self.models = load_models(config)
        self.server = Listening(config, self.models, list(keys), tools)
        self.worker = self.server._worker
        self._thread = threading.Thread(target=self.server.run, daemon=True)
        self._thread.start()
        wait_until(lambda: self.worker.is_ready or self.worker.fault or not self._thread.is_alive(), seconds=120)
        assert self.worker.is_ready, self.worker.fault
        self.url = f"{self.server.url}/v1"
        self.root = self.server.url

    @property
    def engine(self):
        return self.models.engines[0]

    def idle(self):
        """Waits until no row is busy."""
        wait_until(lambda: not self.engine.busy and not self.worker.open_answers, seconds=20)
        return self.engine.running == self.engine.waiting == 0

    def stop(self):
        self.server.should_exit = True
        self._thread.join(timeout=30)


def wait_until(holds, seconds):
    deadline = time.monotonic() + seconds
    while not (found := holds()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert found, f"not within {seconds} seconds"


class Process:
    """`minimind serve` as a user starts it."""

    def __init__(self, folder, *options):
        words = [sys.executable, "-m", "minimind_jax", "serve", "--model", f"tiny={folder}"]
        command = [*words, "--port", "0", "--slots", "4", *options]
        kept = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
        kept |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu"}
        environment = {**os.environ, **kept}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.said = []
        threading.Thread(target=self._read, daemon=True).start()
        wait_until(lambda: self.url or self.process.poll() is not None, 60)
        assert self.url, "".join(self.said)

    def _read(self):
        for line in self.process.stderr:
            self.said.append(line)

    @property
    def url(self):
        found = re.search(r"serving tiny at (http\S+)", "".join(self.said))
        return found and found[1]

    def ready(self):
        try:
            wait_until(lambda: httpx.get(self.url + "/health").status_code == 200, 240)
        except BaseException:
            self.process.kill()
            raise
        return self


@contextlib.contextmanager
def running(*arguments, **changes):
    server = Running(ServeConfig(**{"port": 0, "slots": 4, **changes}), *arguments)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def server(folder):
    with running(model=(f"tiny={folder}",)) as server:
        yield server


def client_of(server):
    """OpenAI's."""
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def client(server):
    return client_of(server)


@pytest.fixture(scope="module")  # not for longer: while it is there, this thread has a loop that runs
def browser():
    from tests.serve.page_helpers import chromium  # imported here, and below: what they need is not always there

    with chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def seeing(compilation_cache, tmp_path_factory):
    """The folder of a model that sees."""
    from tests.serve.seeing import save_seeing

    return save_seeing(tmp_path_factory.mktemp("seeing"))


@pytest.fixture(scope="session")
def engine(seeing):
    """What that model says, without a server."""
    from tests.serve.seeing import Reference

    return Reference(seeing)


@pytest.fixture(scope="session")
def http(server):
    """Plain HTTP to the server."""
    with httpx.Client(base_url=server.root, timeout=60) as client:
        yield client

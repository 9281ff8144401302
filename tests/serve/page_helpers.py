"""A browser, servers of the chat page, and a model that says what a test wants."""

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import jax
import numpy as np
import pytest

from minimind_jax.convert.hf import save_hf
from minimind_jax.data.tokenizer import train_bpe
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.transformer import LanguageModel
from tests.serve.conftest import TEXTS

sync_api = pytest.importorskip("playwright.sync_api", reason="the page's tests need `pip install playwright`")
sync_api.expect.set_options(timeout=20_000)  # milliseconds, on a busy machine
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
if not CHROMIUM:
    pytest.skip("the page's tests need a Chromium: apt install chromium, or CHROMIUM=its path", allow_module_level=True)

THINKING = "The user greets.\n</think>\n\nHello **you**."
CALL = '<tool_call>\n{"name": "calculate_math", "arguments": {"expression": "256*37"}}\n</tool_call>'
HOSTILE = """<script>window.hacked = 1</script>

a <img src=x onerror="window.hacked = 2"> b [click](javascript:window.hacked=3) ![seen](http://127.0.0.1:9/seen.png)

<iframe src="http://127.0.0.1:9/frame"></iframe><style>body { display: none }</style>

[data](data:text/html,<script>window.hacked=4</script>) <a href="http://127.0.0.1:9/" onclick="window.hacked=5">x</a>"""


@contextlib.contextmanager
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, address, wait=True, **options):
    """A page of a person who was never here. By its end no error may have been met that it did not show."""
    context = browser.new_context(**{"locale": "en-US", **options})
    page = context.new_page()
    page.set_default_timeout(20_000)
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(address)
    if wait:
        sync_api.expect(page.locator("#model option")).to_have_count(1)
    yield page
    context.close()
    assert not faults


def talk_of(page):
    """What is said in the conversation that is shown."""
    return [text.strip() for text in page.locator(".question, .markdown").all_text_contents()]


def shows(page, *talk):
    """Waits until the conversation that is shown is this."""
    sync_api.expect(page.locator(".question, .markdown")).to_have_text(list(talk))


class Said:
    """A `Constraint` under which the model can only say certain tokens, and end. pause: seconds before each."""

    cut = ended = False  # the end follows as a token

    def __init__(self, ids, vocabulary, pause):
        self.left, self.vocabulary, self.pause = list(ids), vocabulary, pause

    def mask(self):
        bits = np.zeros(-(-self.vocabulary // 32), np.uint32)
        bits[self.left[0] // 32] = 1 << self.left[0] % 32
        return bits

    def accept(self, token):
        time.sleep(self.pause)
        if len(self.left) > 1:
            assert token == self.left.pop(0)


class Prompter:
    """Tells the model of a running server what to say: `says` are its next answers. prompts: what it was asked."""

    def __init__(self, running):
        self.says, self.pause, self.prompts = [], 0.0, []
        engine = running.engine
        self._engine, self._submit = engine, engine.submit
        engine.submit = self._submit_said

    def _submit_said(self, request):
        self.prompts.append(self._engine.tokenizer.decode(request.prompt))
        if self.says:
            ids = [*self._engine.tokenizer.encode(self.says.pop(0)), self._engine.eos_ids[0]]
            said = Said(ids, self._engine.model.config.vocab_size, self.pause)
            request = dataclasses.replace(request, constraint=said)
        return self._submit(request)


class Process:
    """`minimind serve` as a process, which can be killed."""

    def __init__(self, model, port, key):
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "minimind_jax", "serve", "--model", model, "--web", "--port", str(port)]
        self._process = subprocess.Popen(command, env={**os.environ, "MINIMIND_API_KEY": key})
        deadline = time.monotonic() + 120
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)

    def _answers(self):
        with contextlib.suppress(OSError):  # 503 until it is warm
            return urllib.request.urlopen(f"{self.url}/health").status == 200

    def kill(self):
        self._process.kill()
        self._process.wait()


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def ask(page, text):
    page.fill("#text", text)
    page.press("#text", "Enter")


def answered(page, turns=1):
    """Waits until so many questions have their answers."""
    sync_api.expect(page.locator("article.assistant footer")).to_have_count(turns)
    sync_api.expect(page.locator("#send")).to_be_visible()


def sent_by(page):
    """The bodies that the page sends from now on."""
    sent = []
    page.on("request", lambda request: sent.append(request.post_data_json) if "completions" in request.url else None)
    return sent


def unending(page):
    """The model's answers go on until the context is full."""

    def pass_on(route):
        route.continue_(post_data=json.dumps({**json.loads(route.request.post_data), "ignore_eos": True}))

    page.route("**/v1/chat/completions", pass_on)


def stream(page, text, size=2000):
    """The next answer is `text` as a recorded stream, for what no model of ours can be made to write."""
    chunks = [{"content": text[at : at + size]} for at in range(0, len(text), size)]
    events = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in chunks]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))


def save_talker(folder, context):
    """A random model with room for tools and several turns."""
    words = train_bpe(TEXTS * 3, folder / "words", vocab_size=360)
    config = ModelConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=context,
    )  # fmt: skip
    return save_hf(folder / "talker", config, LanguageModel(config).init(jax.random.key(3)), words, "float32")

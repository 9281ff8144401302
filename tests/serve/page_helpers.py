"""A browser, servers of the chat page, and a model that says what a test wants."""

import contextlib
import dataclasses
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="the page's tests need `pip install playwright`")
sync_api.expect.set_options(timeout=20_000)  # milliseconds, on a busy machine
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
if not CHROMIUM:
    pytest.skip("the page's tests need a Chromium: apt install chromium, or CHROMIUM=its path", allow_module_level=True)


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

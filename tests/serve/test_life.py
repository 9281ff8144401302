"""A server's life: who may ask, what happens to those who leave, and how it ends."""

import json
import re
import signal
import socket
import sys
import threading
import time

import httpx
import openai
import pytest

from minimind_jax.config.serving import ServeConfig
from minimind_jax.errors import UserError
from minimind_jax.serve.listening import Listening, api_keys
from minimind_jax.serve.models import Models, load_models
from tests.serve.conftest import Process, running, wait_until

CHAT = "/v1/chat/completions"
LONG = {"messages": [{"role": "user", "content": "hi"}], "ignore_eos": True, "max_tokens": 480}


def stream_begun(url, body=LONG):
    """A socket on which a stream has begun."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    sent = json.dumps({**body, "stream": True}).encode()
    lines = [f"POST {CHAT} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(sent)}", "", ""])
    connection.sendall(head.encode() + sent)
    assert b"200 OK" in connection.recv(1 << 16)
    return connection


def test_who_leaves_a_stream_frees_his_row(server):
    connections = [stream_begun(server.root) for _ in range(4)]
    wait_until(lambda: server.engine.running == 4, 10)
    for connection in connections:
        connection.close()
    made = server.engine.counts["generated_tokens"]
    assert server.idle()
    assert server.engine.counts["generated_tokens"] - made < 4 * 400


def test_who_leaves_without_a_stream_frees_his_row_too(server):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.root + CHAT, json={**LONG, "n": 8}, timeout=0.2)
    made = server.engine.counts["generated_tokens"]
    assert server.idle()
    assert server.engine.counts["generated_tokens"] - made < 8 * 400


def test_neighbours_of_those_who_leave_are_not_disturbed(server, client):
    def ask(seed):
        asked = {"messages": LONG["messages"], "model": "tiny", "seed": seed, "max_tokens": 60}
        return client.chat.completions.create(**asked).choices[0].message.content

    alone, together = [ask(seed) for seed in range(3)], {}
    threads = [threading.Thread(target=lambda n=n: together.update({n: ask(n)})) for n in range(3)]
    for thread in threads:
        thread.start()
        stream_begun(server.root).close()
    for thread in threads:
        thread.join()
    assert [together[n] for n in range(3)] == alone
    assert server.idle()


def test_a_page_whose_domain_points_here_gets_no_answer(server):
    for host in ("evil.example.org", "evil.example.org:80", "127.0.0.1.example.org", "[::1", ""):
        found = httpx.get(server.root + "/v1/models", headers={"host": host})
        assert found.status_code in (400, 403), host  # an address that is none is refused by uvicorn
    for host in ("localhost", "localhost:5", "127.0.0.1:8000", "[::1]:8000"):
        assert httpx.get(server.root + "/v1/models", headers={"host": host}).status_code == 200


@pytest.fixture(scope="module")
def guarded(folder):
    changes = {"queue": 1, "cors_origins": ("https://chat.example.org",), "drain_seconds": 0.5}
    with running(("first-key", "second-key"), model=(f"tiny={folder}",), web=True, **changes) as server:
        yield server


def test_a_key_is_asked_for_everywhere_but_at_health(guarded):
    assert httpx.get(guarded.root + "/health").status_code == 200
    for path in ("/v1/models", "/metrics", "/openapi.json", "/tokenize", "/nothing"):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "first-key2"}, {"x-api-key": ""}):
            found = httpx.get(guarded.root + path, headers=headers)
            assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key"), path
    for headers in ({"authorization": "Bearer first-key"}, {"authorization": "bearer second-key"}):
        assert httpx.get(guarded.root + "/v1/models", headers=headers).status_code == 200
    assert httpx.get(guarded.root + "/v1/models", headers={"x-api-key": "first-key"}).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=guarded.url, api_key="wrong", max_retries=0).models.list()


def test_only_pages_of_the_origins_that_are_named_may_call(guarded, server):
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    for origin, status in (("https://chat.example.org", 200), ("https://evil.example.org", 400)):
        found = httpx.options(guarded.root + CHAT, headers={"origin": origin, **asked})
        assert found.status_code == status
        assert found.headers.get("access-control-allow-origin") == (origin if status == 200 else None)
    found = httpx.options(server.root + CHAT, headers={"origin": "https://chat.example.org", **asked})
    assert "access-control-allow-origin" not in found.headers


def test_the_page_needs_no_key_and_lets_no_script_in(guarded):
    page = httpx.get(guarded.root + "/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    sources = re.findall(r'(?:src|href)="([^":]+)"', page.text)
    kinds = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    assert {source.rpartition(".")[2] for source in sources} == {*kinds}
    for source in sources:
        found = httpx.get(f"{guarded.root}/{source}")
        assert found.headers["content-type"].startswith(kinds[source.rpartition(".")[2]])
    assert httpx.get(f"{guarded.root}/../app.py").status_code == 401


def test_more_than_may_wait_are_told_to_come_again(guarded):
    headers = {"authorization": "Bearer first-key"}
    client = openai.OpenAI(base_url=guarded.url, api_key="first-key", max_retries=0)  # which takes as long as an answer
    with httpx.Client(base_url=guarded.root, headers=headers) as http:
        with http.stream("POST", CHAT, json={**LONG, "stream": True}):
            wait_until(lambda: guarded.engine.running == 1, 10)
            found = http.post(CHAT, json={**LONG, "n": 5, "stream": True})
            assert (found.status_code, found.headers["retry-after"]) == (429, "1")
            assert found.json()["error"]["type"] == "rate_limit_error"
            with pytest.raises(openai.RateLimitError):
                client.chat.completions.create(model="tiny", n=5, **{"messages": LONG["messages"]})
    assert guarded.idle()


def test_a_fault_of_the_engine_is_told_to_all_who_wait(folder):
    with running(model=(f"tiny={folder}",)) as server:
        connection = stream_begun(server.root)

        def fails(*_):
            raise RuntimeError("the device is gone")

        server.engine.step = fails
        text = b""
        while b"[DONE]" not in text:
            text += connection.recv(1 << 16)
        event = text[text.index(b'data: {"error"') :].split(b"\r\n")[0]
        error = json.loads(event.removeprefix(b"data: ").strip())["error"]
        assert "the device is gone" in error["message"]
        assert httpx.get(server.root + "/health").status_code == 503
        found = httpx.post(server.root + CHAT, json=LONG)
        assert (found.status_code, found.json()["error"]["type"]) == (503, "unavailable_error")


def test_keys_come_from_a_file_and_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# of the team\none\n\n two \n")
    monkeypatch.setenv("MINIMIND_API_KEY", "three")
    assert api_keys(str(file)) == ["one", "two", "three"]
    monkeypatch.delenv("MINIMIND_API_KEY")
    assert api_keys("") == []
    file.write_text("\n")
    with pytest.raises(UserError, match="no API key"):
        api_keys(str(file))


@pytest.mark.parametrize("changes", [{"model": ()}, {"tools": ("all",)}, {"cors_origins": ("*",)}, {"port": 70000}])
def test_settings_that_make_no_sense_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        ServeConfig(**{"model": ("a",), **changes})


BODY = {**LONG, "seed": 1, "max_tokens": 300}


def answer_of(url):
    return httpx.post(url + CHAT, json=BODY, timeout=60).json()["choices"][0]["message"]["content"]


def test_sigterm_finishes_open_answers(folder):
    server = Process(folder).ready()
    connection = stream_begun(server.url, BODY)
    server.process.send_signal(signal.SIGTERM)
    text = b""
    while piece := connection.recv(1 << 16):
        text += piece
    assert b"[DONE]" in text
    assert b'"error"' not in text
    assert server.process.wait(20) == 128 + signal.SIGTERM
    said = "".join(server.said)
    assert "no API key is set" in said
    assert "1 open answers are finished first" in said
    (line,) = re.findall(r"POST .*", said)
    assert re.fullmatch(r"POST /v1/chat/completions 200 [\d.]+s req_\w+ tokens=\d+\+300 unfinished=0", line)


def test_who_stops_it_while_it_compiles_is_told_of_no_fault(folder):
    config = ServeConfig(model=(f"tiny={folder}",), port=0)
    models = load_models(config)
    server = Listening(config, models, [])
    models.engines[0].warm_up = lambda report: wait_until(lambda: not server.servers[0].sockets, 4)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started, 20)
    server.should_exit = True
    thread.join(20)
    assert not server._worker.fault


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no such signal there")
def test_a_second_ctrl_c_ends_it_at_once_and_without_a_traceback(folder):
    server = Process(folder).ready()
    connections = [stream_begun(server.url, {**LONG, "max_tokens": 1500}) for _ in range(3)]
    for _ in range(2):
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert server.process.wait(20) == 128 + signal.SIGINT
    wait_until(lambda: "minimind: stopped" in "".join(server.said), 5)
    said = "".join(server.said)
    assert said.count("unfinished=1") == len(connections)
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_kill_loses_only_the_open_answers(folder):
    first = Process(folder).ready()
    whole = answer_of(first.url)
    stream_begun(first.url, BODY)
    first.process.kill()
    again = Process(folder).ready()
    try:
        assert answer_of(again.url) == whole
    finally:
        again.process.terminate()
        again.process.wait(20)


def test_who_is_not_done_when_the_time_is_up_is_told(folder):
    with running(model=(f"tiny={folder}",), drain_seconds=0.3) as server:
        slow = server.engine.step
        server.engine.step = lambda: (time.sleep(0.05), slow())[1]
        connection = stream_begun(server.root)
        server.server.should_exit = True
        text = b""
        while piece := connection.recv(1 << 16):
            text += piece
        assert b"the server is stopping" in text
        assert b"[DONE]" in text


def test_an_address_that_is_taken_is_named(server, folder):
    port = int(server.root.rpartition(":")[2])
    with pytest.raises(UserError, match=f"cannot listen at 127.0.0.1:{port}"):
        Listening(ServeConfig(model=(f"tiny={folder}",), port=port), Models([]), []).run()

"""The events of a stream, letter by letter: what OpenAI's protocol says of each."""

import json

import pytest

from minimind_jax.serve import app

ASK = {"messages": [{"role": "user", "content": "你好"}], "seed": 2, "max_tokens": 24, "stream": True}


def events(http, path, body):
    """(its lines' first words, the data) of every event, and the headers."""
    with http.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        text = b"".join(response.iter_bytes()).decode()
    assert text.endswith("\n\n")
    return text.removesuffix("\n\n").split("\n\n"), response.headers


def data_of(event):
    (line,) = event.split("\n")
    name, _, data = line.partition(": ")
    assert name == "data"
    return json.loads(data)


def test_a_chat_stream_keeps_the_protocol(http):
    found, headers = events(http, "/v1/chat/completions", {**ASK, "n": 2, "stream_options": {"include_usage": True}})
    assert headers["content-type"].startswith("text/event-stream")
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")
    assert found.pop() == "data: [DONE]"
    chunks = [data_of(event) for event in found]
    last = chunks.pop()
    assert last["choices"] == []
    assert last["usage"].keys() >= {"prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"}
    assert not any("usage" in chunk for chunk in chunks)
    for name in ("id", "created", "model", "object", "system_fingerprint"):
        assert len({chunk[name] for chunk in [*chunks, last]}) == 1, name
    assert last["id"].startswith("chatcmpl-")
    assert (last["object"], type(last["created"]), last["model"]) == ("chat.completion.chunk", int, "tiny")
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert all(set(choice["delta"]) == {"content"} for choice in own[1:-1])
        assert all(choice["finish_reason"] is None for choice in own[:-1])
        assert (own[-1]["delta"], own[-1]["finish_reason"]) == ({}, "length")
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)


def test_a_completion_stream_keeps_the_protocol(http):
    body = {"prompt": "你", "seed": 1, "max_tokens": 24, "stream": True, "stream_options": {"include_usage": True}}
    found, _ = events(http, "/v1/completions", body)
    assert found.pop() == "data: [DONE]"
    chunks = [data_of(event) for event in found]
    assert chunks[0]["id"].startswith("cmpl-")
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    whole = http.post("/v1/completions", json={**body, "stream": False}).json()
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == whole["choices"][0]["text"]
    assert chunks[-1]["usage"]["completion_tokens"] == 24


def test_a_response_stream_keeps_the_protocol(http):
    body = {"input": "你好", "seed": 2, "max_output_tokens": 24, "stream": True}
    found, _ = events(http, "/v1/responses", body)
    told = []
    for event in found:
        name, data = event.split("\n")
        told.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {told[-1]['type']}"
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    names = [event["type"].removeprefix("response.") for event in told]
    assert names[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(names[4:-4]) == {"output_text.delta"}
    assert names[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    text = "".join(event.get("delta", "") for event in told)
    whole = http.post("/v1/responses", json={**body, "stream": False}).json()
    assert text == told[-1]["response"]["output"][0]["content"][0]["text"] == whole["output"][0]["content"][0]["text"]
    assert told[-1]["response"]["usage"]["output_tokens"] == whole["usage"]["output_tokens"] == 24
    assert {event["item_id"] for event in told if "item_id" in event} == {told[-1]["response"]["output"][0]["id"]}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_an_error_inside_a_stream_is_an_event(http, server, path, monkeypatch):
    """The time of a request is up while it is answered."""
    answers = app.Answers
    monkeypatch.setattr(app, "Answers", lambda *given: answers(*given[:3], 0.0, *given[4:]))
    name = "messages" if "chat" in path else "input"
    found, _ = events(http, path, {name: ASK["messages"], "stream": True, "seed": 1})
    if "chat" in path:
        assert found[-1] == "data: [DONE]"
        error = data_of(found[-2])["error"]
        assert (error["type"], error["code"]) == ("timeout_error", "timeout")
    else:
        assert found[-2].startswith("event: error\n")
        assert json.loads(found[-1].split("\ndata: ")[1])["response"]["status"] == "failed"
    assert server.idle()

"""Requests as clients send them, field for field, where they once got what misled them."""

import json

import pytest

from minimind_jax.data.messages import CLOSE_THINK
from minimind_jax.serve import log

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
CITY = {
    "properties": {"name": {"title": "Name", "type": "string"}, "people": {"title": "People", "type": "integer"}},
    "required": ["name", "people"],
    "title": "City",
    "type": "object",
}
GUIDANCE = {
    "model": "tiny", "stream": True, "messages": [{"role": "user", "content": [{"type": "text", "text": "A city"}]}],
    "logprobs": True, "max_completion_tokens": 30, "stream_options": {"include_usage": True}, "tools": None,
    "top_logprobs": 5,
}  # fmt: skip
PYDANTIC_AI = {
    "messages": [{"role": "user", "content": "A city"}], "model": "tiny", "max_completion_tokens": 200,
    "response_format": {
        "type": "json_schema", "json_schema": {"name": "City", "schema": CITY, "strict": True}
    }, "stream": False,
}  # fmt: skip
AI_SDK = {
    "model": "tiny",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "What is 6 times 7?"}]},
        {"type": "item_reference", "id": "msg_684e3fca5d525ef0ec054852"},
        {"role": "user", "content": [{"type": "input_text", "text": "Hello!"}]},
    ],
}
AGENTS = {
    "input": [{"content": "Hello!", "role": "user"}], "model": "tiny", "instructions": "Use tools.",
    "include": ["reasoning.encrypted_content"], "max_output_tokens": 2, "metadata": {"a": "b"}, "store": False,
    "reasoning": {"effort": "low", "summary": "auto"}, "text": {"verbosity": "low"}, "truncation": "auto",
}  # fmt: skip
LIST_FILES = {"type": "function", "name": "list_files", "parameters": {"type": "object", "properties": {}}}
CODEX = {
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "You are an agent."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "<environment/>"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello!"}]},
    ],
    "tools": [
        LIST_FILES,
        {"type": "namespace", "name": "agents", "description": "More.", "tools": [LIST_FILES]},
        {"type": "web_search", "external_web_access": False},
    ],
    "model": "tiny", "stream": True, "tool_choice": "auto", "parallel_tool_calls": True, "store": False,
    "reasoning": {"summary": "auto"}, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "01a2",
    "max_output_tokens": 2,
}  # fmt: skip
VLLM = {**GUIDANCE, "max_completion_tokens": 2, "stream_options": {"continuous_usage_stats": True}}


def chunks(response):
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line)["choices"] for line in lines]


def test_the_tokens_of_a_chunk_are_those_of_its_text(http, server):
    """guidance shows the tokens in place of the text; one that ends the answer was seen in it."""
    end = server.engine.eos_ids[0]
    form = {"structured_outputs": {"regex": "[a-c]{3,9}"}, "logit_bias": {str(end): 100}}
    shown = [choices[0] for choices in chunks(http.post(CHAT, json={**GUIDANCE, **form})) if choices]
    said = [("".join(t["token"] for t in c["logprobs"]["content"]), c["delta"].get("content")) for c in shown[1:]]
    assert all(tokens == text for tokens, text in said[:-1])
    assert said[-1] == (server.engine.tokenizer.byte_pieces[end].decode(), None)
    assert shown[-1]["finish_reason"] == "stop"


def test_a_whole_number_that_a_schema_leaves_open_is_one_that_programs_hold(http):
    for seed in range(3):
        found = http.post(CHAT, json={**PYDANTIC_AI, "seed": seed, "temperature": 1}).json()["choices"][0]
        assert abs(json.loads(found["message"]["content"])["people"]) <= 10**15


def test_thoughts_are_counted_to_their_end_and_not_to_that_of_the_tokens_made_with_it(http, server):
    close = server.models.get("tiny").grammars.tag(CLOSE_THINK)
    asked = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 12, "reasoning_effort": "low"}
    usage = http.post(CHAT, json={**asked, "logit_bias": {str(close): 100}}).json()["usage"]
    assert usage["completion_tokens"] == 12
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 1}


def test_a_reference_to_what_is_not_stored_says_what_to_send(http):
    """The AI SDK's OpenAI provider sends one for each message that it was answered, unless told store: false."""
    found = http.post(RESPONSES, json=AI_SDK)
    error = found.json()["error"]
    assert (found.status_code, error["param"]) == (400, "input[1]")
    assert "store: false" in error["message"]


@pytest.mark.parametrize(
    "path, body, notes",
    [
        (RESPONSES, AGENTS, {"Reasoning: field 'summary'", "TextSettings: field 'verbosity'"}),
        (CHAT, VLLM, {"StreamOptions: field 'continuous_usage_stats'"}),
    ],
)
def test_what_is_ignored_within_a_body_is_told(http, monkeypatch, path, body, notes):
    monkeypatch.setattr(log, "_told", set())
    assert http.post(path, json=body).status_code == 200
    assert log._told == {f"{note} is ignored" for note in notes}


def test_tools_that_are_no_functions_are_left_out_and_told(http, monkeypatch):
    """As Codex offers them, whether it may use them or not."""
    monkeypatch.setattr(log, "_told", set())
    body = {**CODEX, "stream": False}
    mixed, alone = (http.post(RESPONSES, json={**body, "tools": tools}) for tools in (CODEX["tools"], [LIST_FILES]))
    assert (mixed.status_code, alone.status_code) == (200, 200), mixed.text
    assert mixed.json()["usage"]["input_tokens"] == alone.json()["usage"]["input_tokens"]
    kinds = {note.split("'")[1] for note in log._told if note.startswith("tools of the type")}
    assert kinds == {"namespace", "web_search"}
    assert "event: response.incomplete" in http.post(RESPONSES, json=CODEX).text
    refused = http.post(RESPONSES, json={**body, "tools": CODEX["tools"][1:], "tool_choice": "required"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tool_choice")
    assert http.post(RESPONSES, json={**body, "tools": [{"type": "functoin", "name": "f"}]}).status_code == 400


def test_settings_under_the_names_of_other_servers(http):
    ours = {"repetition_penalty": 1.7, "max_tokens": 9, "stop": ["zzz"]}
    theirs = {"repeat_penalty": 1.7, "max_tokens": 9, "stop_sequences": ["zzz"]}
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "A city"}], "temperature": 0}
    said = [http.post(CHAT, json={**asked, **names}).json() for names in (ours, theirs, {"max_tokens": 9})]
    texts = [found["choices"][0]["message"]["content"] for found in said]
    assert texts[0] == texts[1] != texts[2]
    asked = {"model": "tiny", "prompt": "A city", "max_tokens": 3, "max_completion_tokens": 3}  # GuideLLM's
    for names in (asked, {name: value for name, value in asked.items() if name != "max_tokens"}):
        assert http.post("/v1/completions", json=names).json()["usage"]["completion_tokens"] == 3


def test_what_is_refused_is_not_called_ignored(http, monkeypatch):
    """outlines, as it speaks to SGLang."""
    monkeypatch.setattr(log, "_told", set())
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "A city"}], "max_tokens": 100}
    assert http.post(CHAT, json={**asked, "regex": "([a-c]{3})"}).status_code == 400
    assert not log._told


@pytest.mark.parametrize("path", ["/api/chat", "/api/tags", "/v1/messages", "/chat/completions", "/completion"])
def test_clients_of_other_protocols_are_told_where_to_ask(http, path):
    """ollama's, Anthropic's, llama.cpp's, and OpenAI's whose base URL lacks the /v1."""
    found = http.request("GET" if path == "/api/tags" else "POST", path, json={})
    assert found.status_code == 404
    assert "OpenAI's protocol" in found.json()["error"]["message"] and "/v1" in found.json()["error"]["message"]

"""Requests that nobody should send: each is refused with OpenAI's error object, and the server answers the next."""

import gzip
import json
import socket

import httpx
import pytest

from minimind_jax.serve import listening

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def refusal(response, status=400):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.fixture(autouse=True)
def _still_answers(http, server):
    yield
    assert http.post(CHAT, json=ASK).status_code == 200
    assert server.idle()


@pytest.mark.parametrize(
    "changes, param",
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"seed": 2**70}, "seed"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"٣": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"stop": ""}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": [5]}, "stop[0]"),
        ({"stop": ["a", "b" * 1001]}, "stop[1]"),
        ({"stop_token_ids": [2**40]}, "stop_token_ids[0]"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"max_output_tokens": 5}, "max_output_tokens"),
        ({"include_stop_str_in_output": True}, "include_stop_str_in_output"),
        ({"echo": True}, "echo"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"skip_special_tokens": False, "continue_final_message": True}, "skip_special_tokens"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"best_of": 3}, "best_of"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"reasoning_effort": "banana"}, "reasoning_effort"),
        ({"reasoning": {"effort": "banana"}}, "reasoning_effort"),
        ({"thinking": {"type": []}}, "thinking"),
        ({"chat_template_kwargs": {"enable_thinking": {"type": {}}}}, "enable_thinking"),
        ({"stream": "yes"}, "stream"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{}]}, None),
        ({"messages": [{"role": "user"}]}, None),
        ({"messages": [{"role": "user", "content": 5}]}, None),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, None),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"name": "f", "arguments": {}}]}]}, None),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "[1"}]}]}, None),
        ({"tools": "f"}, "tools"),
        ({"tools": [{"type": "function"}]}, None),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"model": 5}, "model"),
        ({"reasoning_effort": 5}, "reasoning_effort"),
        ({"thinking": "yes"}, "thinking"),
        ({"tools": [{"name": "f"}], "tool_choice": "any"}, "tool_choice"),
        ({"logit_bias": {"5": None}}, "logit_bias.5"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(http, changes, param):
    error = refusal(http.post(CHAT, json={**ASK, **changes}))
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param


def test_a_setting_of_others_that_changes_nothing_is_no_fault(http):
    neutral = {"best_of": 1, "length_penalty": 1.0, "modalities": ["text"], "function_call": "auto", "echo": False}
    neutral |= {"skip_special_tokens": True, "add_generation_prompt": True, "use_beam_search": False, "audio": None}
    assert http.post(CHAT, json={**ASK, **neutral, "reasoning_effort": "xhigh"}).status_code == 200
    going_on = [*ASK["messages"], {"role": "assistant", "content": "A"}]
    more = {"messages": going_on, "continue_final_message": True, "add_generation_prompt": False}
    assert http.post(CHAT, json={**ASK, **more}).status_code == 200


@pytest.mark.parametrize(
    "path, body",
    [
        ("/v1/embeddings", {"input": "hi", "encoding_format": None, "normalize": None, "dimensions": None}),
        ("/tokenize", {"prompt": "hi", "add_special_tokens": None, "return_token_strs": None}),
        ("/apply-template", {**ASK, "add_generation_prompt": None, "tools": None}),
    ],
)
def test_null_is_as_not_given(http, path, body):
    given = {name: value for name, value in body.items() if value is not None}
    answers = [http.post(path, json=each) for each in (body, given)]
    assert answers[0].status_code == 200
    assert answers[0].json() == answers[1].json()


@pytest.mark.parametrize(
    "body, name",
    [
        ({"prompt": "a" * 4000}, "prompt"),
        ({"prompt": ["a", "a" * 4000]}, "prompt[1]"),
        ({"prompt": "a", "tools": [{"name": "f"}]}, "tools"),
    ],
)
def test_completions_name_the_prompt_at_fault(http, body, name):
    error = refusal(http.post("/v1/completions", json=body))
    assert error["param"] == name
    assert "messages" not in error["message"]


@pytest.mark.parametrize(
    "changes, words", [({"stop": ["a"] * 65}, "at most 64 items"), ({"stop": ["a", 1]}, "stop[1]: ")]
)
def test_what_is_wrong_with_a_list_is_told(http, changes, words):
    assert words in refusal(http.post(CHAT, json={**ASK, **changes}))["message"]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"max_tokens": 5}, "max_tokens is not followed here: call it max_output_tokens"),
        ({"n": 2}, "n is not followed here: leave it out"),
        ({"stop": "a"}, "stop is not"),
        ({"stop_sequences": ["a"]}, "stop_sequences is not"),
        (
            {"guided_regex": "a", "text": {"format": {"type": "json_object"}}},
            "guided_regex and text.format.json_object",
        ),
        ({"ignore_eos": True}, "ignore_eos is not"),
        ({"prompt": {"id": "pmpt_1"}}, "no prompts are stored here"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format: a json_schema without its schema"),
        ({"input": [{"id": "msg_1"}]}, "input[0] refers to what this server has not stored"),
        ({"min_tokens": 5}, "min_tokens is not"),
        ({"response_format": {"type": "json_object"}}, "call it text.format"),
        ({"top_logprobs": 2}, "chat completions tell log-probabilities"),
        ({"include": ["message.output_text.logprobs"]}, "chat completions tell log-probabilities"),
        ({"n": 1, "logprobs": False, "include": ["reasoning.encrypted_content"], "stream_options": {}}, ""),
    ],
)
def test_responses_refuse_what_they_would_ignore_of_chat(http, changes, words):
    answer = http.post("/v1/responses", json={"input": "hi", "max_output_tokens": 2, **changes})
    assert words in refusal(answer)["message"] if words else answer.status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b"{",
        b'{"messages": [{"role": "user", "content": "hi"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "hi"}], "temperature": Infinity}',
        b'{"messages": [{"role": "user", "content": "hi"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "hi \\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "hi"}], "stop": "\\udfff"}',
        b'{"messages": ' + b"[" * 100_000,
        b'{"messages": [{"role": "user", "content": "hi"}], "metadata": ' + b'{"a":' * 200 + b"1" + b"}" * 201,
    ],
    ids=lambda body: repr(body[:70]),
)
def test_what_is_no_json_object_of_whole_characters_is_refused(http, body):
    refusal(http.post(CHAT, content=body, headers={"content-type": "application/json"}))


def test_a_body_that_is_compressed_says_so_and_a_mark_of_byte_order_is_no_harm(http):
    body, kind = json.dumps(ASK).encode(), {"content-type": "application/json"}
    answer = http.post(CHAT, content=gzip.compress(body), headers={**kind, "content-encoding": "gzip"})
    assert answer.status_code == 415 and "gzip" in answer.json()["error"]["message"]
    assert http.post(CHAT, content=b"\xef\xbb\xbf" + body, headers=kind).status_code == 200


@pytest.mark.parametrize("sent", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /h"])
def test_a_connection_without_requests_is_closed(server, monkeypatch, sent):
    monkeypatch.setattr(listening, "IDLE_SECONDS", 0.5)
    address = httpx.URL(server.root)
    with socket.create_connection((address.host, address.port), timeout=10) as client:
        client.sendall(sent)
        answered = b""
        while piece := client.recv(4096):  # until it is closed
            answered += piece
    assert answered.count(b"HTTP/1.1 200") == sent.count(b"\r\n\r\n")


def test_an_endless_path_is_not_told_back(http):
    answer = http.get("/" + "a" * 5000)
    assert answer.status_code == 404 and len(answer.json()["error"]["message"]) < 300


def test_no_name_of_a_model_is_the_first(http):
    assert http.post(CHAT, json={**ASK, "model": ""}).json()["model"] == "tiny"


def test_a_form_is_refused_so_that_no_page_of_another_origin_can_send_one(http):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        refusal(http.post(CHAT, content=json.dumps(ASK), headers={"content-type": kind}), 415)
    kind = "Application/JSON; Charset=UTF-8"
    assert http.post(CHAT, content=json.dumps(ASK), headers={"content-type": kind}).status_code == 200


def test_a_body_that_is_too_large_is_refused_also_without_a_length(http, server):
    size = int(server.server._settings.max_body_mib * 2**20) + 1
    refusal(http.post(CHAT, content=b" " * size, headers={"content-type": "application/json"}), 413)

    def pieces():
        for _ in range(size // 65536 + 1):
            yield b" " * 65536

    try:
        refusal(http.post(CHAT, content=pieces(), headers={"content-type": "application/json"}), 413)
    except httpx.WriteError:
        pass  # the server has answered and closed before all was sent


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/../etc/passwd", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/other", 404),
        ("GET", "/tools", 404),
        ("POST", "/v1/chat/completions/", 404),
    ],
)
def test_a_path_that_is_not_there_says_so(http, method, path, status):
    refusal(http.request(method, path), status)


@pytest.mark.parametrize(
    "path, body",
    [
        ("/v1/completions", {"prompt": []}),
        ("/v1/completions", {"prompt": [[]]}),
        ("/v1/completions", {"prompt": [99999]}),
        ("/v1/completions", {"prompt": [-1]}),
        ("/v1/completions", {"prompt": ["a", 5]}),
        ("/v1/completions", {"prompt": [5] * 1536}),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}),
        ("/v1/completions", {"prompt": "a", "best_of": 3}),
        ("/v1/completions", {"prompt": "a", "echo": True, "logprobs": 1}),
        ("/v1/responses", {"input": []}),
        ("/v1/responses", {"input": [{"type": "image"}]}),
        ("/v1/responses", {"input": [{"type": "reasoning", "content": 5}]}),
        ("/v1/responses", {"input": [{"type": "function_call", "name": 5}]}),
        ("/v1/responses", {"input": "a", "previous_response_id": "resp_1"}),
        ("/v1/responses", {"input": "a", "tool_choice": {"type": "function"}}),
        ("/v1/responses", {"input": "a", "reasoning": 5}),
        ("/v1/responses", {"input": "a", "max_tokens": 5}),
        ("/v1/responses", {"input": "a", "stop": ["b"]}),
        ("/v1/embeddings", {"input": "a", "dimensions": 5}),
        ("/v1/embeddings", {"input": [5] * 1600}),
        ("/v1/embeddings", {"input": ""}),
        ("/classify", {"input": "a", "model": "tiny"}),
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "content": "b"}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [9999]}),
        ("/apply-template", {"messages": [{"role": "user", "content": None}]}),
    ],
)
def test_other_routes_refuse_in_the_same_way(http, path, body):
    refusal(http.post(path, json=body))


def test_fields_that_nobody_knows_change_nothing(http):
    told = http.post(CHAT, json={**ASK, "seed": 1, "temperature": 1}).json()
    more = {"frobnicate": {"a": 1}, "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"}
    found = http.post(CHAT, json={**ASK, "seed": 1, "temperature": 1, **more}).json()
    assert found["choices"] == told["choices"]


def test_a_history_that_other_servers_wrote_is_read(http):
    """Answers without words, calls and results with more than we know, as OpenAI and others write them."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    ours = [
        *ASK["messages"], {"role": "assistant", "content": "no"}, {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": ""},
    ]  # fmt: skip
    theirs = [
        *ASK["messages"], {"role": "assistant", "content": None, "refusal": "no"}, {"role": "assistant"},
        {"role": "assistant", "tool_calls": [{**call, "extra_content": {"google": {"thought_signature": "x"}}}]},
        {"role": "tool", "content": None, "tool_call_id": "c1"},
    ]  # fmt: skip
    first, second = (http.post("/apply-template", json={"messages": messages}).json() for messages in (ours, theirs))
    assert first["prompt"] == second["prompt"]


def test_errors_say_nothing_of_training(http):
    messages = [{"role": "assistant", "content": "a", "reasoning": "b", "reasoning_content": "c"}]
    for wrong in (messages, [{"role": "user", "content": "a", "reasoning": "b"}]):
        message = refusal(http.post(CHAT, json={"messages": wrong}))["message"]
        assert "messages[0]" in message and "train" not in message and "ignore_fields" not in message


def test_a_head_is_that_of_the_page_that_would_come(http):
    for path, status in (("/health", 200), ("/v1/models", 200), ("/v1/nothing", 404), (CHAT, 405)):
        got, found = http.get(path), http.head(path)
        assert (found.status_code, found.content, found.headers["content-length"]) == (
            status, b"", got.headers["content-length"]
        )  # fmt: skip


def test_tokens_there_and_back(http):
    text = "The cat 你好 <|im_end|>\n"
    found = http.post("/tokenize", json={"content": text, "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json()["content"] == text
    whole = http.post("/tokenize", json={"prompt": text, "add_special_tokens": True}).json()
    assert whole["tokens"][1:] == found["tokens"]


@pytest.mark.parametrize("url", ["data:image/png;base64,AAAA", "http://127.0.0.1:9/x.png"])
@pytest.mark.parametrize("path, field", [(CHAT, "messages"), ("/v1/responses", "input"), ("/tokenize", "messages")])
def test_a_blind_model_says_that_it_is(http, path, field, url):
    part = {"type": "image_url", "image_url": {"url": url}}
    error = refusal(http.post(path, json={field: [{"role": "user", "content": [part]}]}))
    assert (error["code"], error["param"]) == ("images_not_supported", f"{field}[0].content[0]")
    assert "words alone" in error["message"]
    told = http.get("/v1/models").json()["data"][0]["architecture"]
    assert told == {"input_modalities": ["text"], "output_modalities": ["text"]}

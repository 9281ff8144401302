"""What users of other servers have reported, tried here."""

import json

import pytest

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}], "seed": 5, "temperature": 1.0, "max_tokens": 60}
NOTE = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "note": {"type": "string"}},
    "required": ["a", "note"],
}
TOOLS = [{"type": "function", "function": {"name": "note", "parameters": NOTE}}]


def whole(http, path=CHAT, **changes):
    return http.post(path, json={**ASK, **changes}).json()


def events(http, path=CHAT, **changes):
    lines = http.post(path, json={**ASK, **changes, "stream": True}).text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def deltas(chunks):
    return [(choice, choice["delta"]) for chunk in chunks for choice in chunk["choices"]]


def text_of(chunks):
    return "".join(delta.get("content") or "" for _, delta in deltas(chunks))


def test_text_is_neither_doubled_nor_lost_at_what_might_become_a_stop_string(http):
    """ggml-org/llama.cpp 10914 and 9867: doubled when a stop string began and did not go on; lost where it ended."""
    words = {"logit_bias": {str(i): -100 for i in range(36)}}  # no special tokens, which a stop string would see
    full = whole(http, **words)["choices"][0]["message"]["content"]
    for start in range(0, len(full) - 4, 5):
        one, begun, next_one = full[start : start + 3], full[start : start + 2] + "zz", full[start + 1 : start + 4]
        for stop in ([one], [begun], [full[start] + "\n", next_one]):
            shown = min((at for text in stop if (at := full.find(text)) >= 0), default=len(full))
            answer = whole(http, **words, stop=stop)["choices"][0]["message"]["content"]
            assert answer == text_of(events(http, **words, stop=stop)) == full[:shown], stop


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": True}])
def test_usage_comes_once_and_only_where_it_was_asked_for(http, options):
    """vllm-project/vllm 7262 and 36379: in every chunk; also for empty stream_options."""
    chunks = events(http, stream_options=options, n=2)
    with_usage = [chunk for chunk in chunks if chunk.get("usage")]
    assert with_usage == (chunks[-1:] if options and options.get("include_usage") else [])
    for chunk in with_usage:
        assert chunk["choices"] == [] and chunk["usage"]["completion_tokens"] == 120


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "note"}}, "auto"])
def test_calls_of_a_stream_are_those_of_the_whole_answer_with_logprobs_too(http, choice):
    """vllm-project/vllm 24509: arguments twice in a stream that must call. ggml-org/llama.cpp 28478: no logprobs with
    tools in a stream. openai/codex 7517: ids in later deltas."""
    asked = {"tools": TOOLS, "tool_choice": choice, "logprobs": True, "top_logprobs": 2, "max_tokens": 160}
    chunks, answer = events(http, **asked), whole(http, **asked)
    calls, logprobs = {}, []
    for part, delta in deltas(chunks):
        logprobs += (part.get("logprobs") or {}).get("content", [])
        for call in delta.get("tool_calls", []):
            index, function = call["index"], call["function"]
            assert ("id" in call) == ("name" in function) == (index not in calls)
            name, arguments = calls.get(index, (function.get("name"), ""))
            calls[index] = name, arguments + function["arguments"]
    message = answer["choices"][0]["message"]
    found = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])]
    assert [calls[index] for index in sorted(calls)] == found
    assert bool(found) == (choice != "auto") and text_of(chunks) == (message["content"] or "")
    entries = answer["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in logprobs] == [entry["bytes"] for entry in entries]
    assert [entry["logprob"] for entry in logprobs] == pytest.approx([entry["logprob"] for entry in entries], abs=1e-4)
    assert len(entries) == answer["usage"]["completion_tokens"]


def test_the_tokens_of_a_stop_string_have_logprobs(http):
    """ikawrakow/ik_llama.cpp 998: they were cut off with the text."""
    full = whole(http)["choices"][0]["message"]["content"]
    answer = whole(http, logprobs=True, stop=full[20:23])
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] == full[20:23]
    assert len(choice["logprobs"]["content"]) == answer["usage"]["completion_tokens"] > 0


def test_responses_that_call_end_with_an_event_that_says_so(http):
    """vllm-project/vllm 52418: the stream broke off where words and a call met."""
    asked = {"tools": TOOLS, "tool_choice": "required", "input": "hi", "max_output_tokens": 160, "thinking": True}
    asked |= {"messages": None, "max_tokens": None}
    told = events(http, "/v1/responses", **asked)
    assert told[-1]["type"] in ("response.completed", "response.incomplete")
    items = told[-1]["response"]["output"]
    done = [event["item"] for event in told if event["type"] == "response.output_item.done"]
    assert items == done and items[-1]["type"] == "function_call"
    assert json.loads(items[-1]["arguments"]).keys() == {"a", "note"}

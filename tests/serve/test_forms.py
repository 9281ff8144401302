"""Answers of a form, and calls of tools: a random model says nothing else, through the official client."""

import json
import re

import openai
import pydantic
import pytest

ASK = [{"role": "user", "content": "what is a cat?"}]


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": "does", "parameters": parameters}}


ADD = tool("add", a={"type": "integer"}, b={"type": "boolean"})
TELL = tool("tell", colour={"enum": ["red", "blue"]})
ARGUMENTS = {"add": {"a": int, "b": bool}, "tell": {"colour": str}}


@pytest.fixture(scope="module")
def chat(client):
    def chat(messages=ASK, **settings):
        settings = {"max_tokens": 200, "temperature": 1.0, "seed": 1, **settings}
        return client.chat.completions.create(model="tiny", messages=messages, **settings)

    return chat


def check_call(name, arguments):
    found = json.loads(arguments)
    assert {key: type(value) for key, value in found.items()} == ARGUMENTS[name]


class Animal(pydantic.BaseModel):
    name: str
    legs: int
    tame: bool | None


def test_a_schema_is_kept(client, chat):
    for seed in range(5):
        parsed = client.chat.completions.parse(
            model="tiny", messages=ASK, response_format=Animal, max_tokens=300, temperature=1, seed=seed
        ) if seed == 0 else None  # fmt: skip
        schema = {"name": "animal", "schema": Animal.model_json_schema()}
        found = chat(response_format={"type": "json_schema", "json_schema": schema}, seed=seed, max_tokens=300)
        Animal.model_validate_json(found.choices[0].message.content)
        assert parsed is None or parsed.choices[0].message.parsed == Animal.model_validate_json(
            found.choices[0].message.content
        )


def is_finite(text):
    return json.dumps(json.loads(text), allow_nan=False)


@pytest.mark.parametrize(
    "form, fits",
    [
        ({"response_format": {"type": "json_object"}}, lambda text: isinstance(json.loads(text), dict)),
        ({"response_format": {"type": "json_object", "schema": {"enum": [1, 2]}}}, lambda text: text in "12"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"maxLength": 3}}}}, is_finite),
        ({"guided_json": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}}, json.loads),
        ({"guided_json": '{"enum": [1, 2]}'}, lambda text: json.loads(text) in (1, 2)),
        ({"guided_regex": "[a-c]{3}[0-9]"}, lambda text: re.fullmatch("[a-c]{3}[0-9]", text)),
        ({"guided_choice": ["你好", "yes"]}, lambda text: text in ("你好", "yes")),
        ({"guided_grammar": 'start: "a" start | "b"'}, lambda text: re.fullmatch("a*b", text)),
        ({"structured_outputs": {"regex": "(yes|no)!"}}, lambda text: text in ("yes!", "no!")),
        ({"structured_outputs": {"json_object": True}}, json.loads),
    ],
)
def test_other_forms_are_kept(chat, client, form, fits):
    for seed in range(3):
        text = chat(extra_body=form, seed=seed).choices[0].message.content
        assert fits(text) or json.loads(text) == [], text
    plain = client.completions.create(model="tiny", prompt="The", max_tokens=200, seed=1, extra_body=form)
    assert fits(plain.choices[0].text) or json.loads(plain.choices[0].text) == []
    if "response_format" not in form:
        asked = {"model": "tiny", "input": "The", "max_output_tokens": 200}
        text = client.responses.create(**asked, extra_body={"seed": 1, **form}).output_text
        assert fits(text) or json.loads(text) == []


def test_a_form_holds_behind_the_thinking(chat):
    message = chat(
        max_tokens=60, extra_body={"enable_thinking": True, "structured_outputs": {"choice": ["yes", "no"]}}
    ).choices[0].message  # fmt: skip
    assert message.content in ("yes", "no")
    assert message.reasoning


@pytest.mark.parametrize(
    "body, words",
    [
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": {"type": "nothing"}}, "guided_json"),
        ({"guided_grammar": "begin: 5"}, "guided_grammar"),
        ({"guided_choice": []}, "guided_choice"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "keep one"),
        ({"guided_json": {"pattern": "(?!a)b", "type": "string"}}, r"the pattern \(\?!a\)b: look-around"),
        *(({name: "a"}, f"{name} is not followed") for name in ("grammar", "json_schema", "regex", "ebnf", "format")),
        ({"functions": [{"name": "f", "parameters": {}}]}, "functions is not followed here: .* by tools"),
    ],
)
def test_a_form_that_makes_no_sense_is_refused(chat, client, body, words):
    with pytest.raises(openai.BadRequestError, match=words):
        chat(extra_body=body)
    with pytest.raises(openai.BadRequestError, match=words):
        client.responses.create(model="tiny", input="hi", extra_body=body)


@pytest.mark.parametrize("stream", [False, True])
def test_a_form_that_cannot_be_followed_to_its_end_fails_its_own_answer_alone(chat, client, server, stream):
    many = " ".join(["part?"] * 1500)
    told = []
    for harmless, harmful in ("xy", "yx"):  # which of the two letters the trial takes is not known
        grammar = f'start: "{harmless}" | "{harmful}" many\nmany: {many}\npart: "b" | "c"'
        bias = {str(server.models.get("tiny").tokenizer.encode(harmful)[0]): 100}
        with pytest.raises(openai.APIError) as caught:
            answer = chat(extra_body={"guided_grammar": grammar}, logit_bias=bias, stream=stream, n=2)
            list(answer)
        told.append("cannot be followed any further" in str(caught.value))
    assert sorted(told) == [False, True]
    assert server.idle() and chat(max_tokens=3).choices[0].finish_reason == "length"


def test_a_call_that_must_be_made_is_made(chat):
    for seed in range(4):
        found = chat(tools=[ADD, TELL], tool_choice="required", seed=seed).choices[0]
        assert found.message.content is None
        assert found.finish_reason in ("tool_calls", "length")
        for call in found.message.tool_calls:
            check_call(call.function.name, call.function.arguments)
        named = chat(tools=[ADD, TELL], tool_choice={"type": "function", "function": {"name": "tell"}}, seed=seed)
        assert {call.function.name for call in named.choices[0].message.tool_calls} == {"tell"}
        assert named.choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {"a": {}, "b": True, "c": {"description": "anything"}}, "required": ["a", "b", "c"]},
        {"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}},
        {"properties": {"a": {"type": "string", "pattern": "^(?!x)"}}, "required": ["a"]},
    ],
)
def test_a_call_is_json_that_a_program_can_hold_whatever_its_schema_leaves_open(chat, parameters):
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    for seed in range(6):
        (call,) = chat(
            tools=[tool], tool_choice="required", seed=seed, max_tokens=160, temperature=1.5, parallel_tool_calls=False
        ).choices[0].message.tool_calls  # fmt: skip
        is_finite(call.function.arguments)
        assert {*parameters.get("required", ())} <= json.loads(call.function.arguments).keys()


@pytest.mark.parametrize("name", ["parameters", "input_schema", "inputSchema"])
def test_tools_of_other_protocols_have_their_schemas(chat, http, name):
    schema = {"type": "object", "properties": {"b": {"enum": [3]}}, "required": ["b"]}
    body = {"messages": ASK, "tools": [{"name": "f", "description": "d", name: schema}], "tool_choice": "required"}
    message = http.post("/v1/chat/completions", json={**body, "max_tokens": 60}).json()["choices"][0]["message"]
    assert {call["function"]["arguments"] for call in message["tool_calls"]} == {'{"b": 3}'}


def test_nulls_of_a_schema_and_of_a_call_are_meant(chat, http):
    """`"default": null` is pydantic's of every optional field. Nulls of what stands around a schema are left out."""
    properties = {"a": {"type": "string", "default": None}, "b": {"const": None}, "c": {"enum": [{"d": None}]}}
    schema = {"type": "object", "properties": properties, "required": ["b", "c"]}
    tool = {"type": "function", "strict": None, "function": {"name": "f", "description": None, "parameters": schema}}
    call = {"id": "1", "index": None, "type": "function", "function": {"name": "f", "arguments": {"a": None}}}
    talk = [*ASK, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "1"}]
    shown = http.post("/apply-template", json={"messages": talk, "tools": [tool]}).json()["prompt"]
    written = {"type": "function", "function": {"name": "f", "parameters": schema}}
    as_text = http.post("/apply-template", json={"messages": ASK, "tools": [written]}).json()["prompt"]
    assert json.dumps(written) in shown and json.dumps(written) in as_text
    assert '{"name": "f", "arguments": {"a": null}}' in shown
    body = {"messages": ASK, "tools": [tool], "tool_choice": "required", "max_tokens": 80}
    message = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    for each in message["tool_calls"]:
        given = json.loads(each["function"]["arguments"])
        assert (given["b"], given["c"]) == (None, {"d": None})


@pytest.mark.parametrize(
    "changes",
    [
        {"properties": None},
        {"required": None, "additionalProperties": None, "minProperties": None, "patternProperties": None},
        *({"properties": {"b": {key: None, "type": "integer"}}} for key in ("enum", "anyOf", "$ref", "pattern")),
        {"properties": {"b": {"type": None}, "c": None}},
        *({"properties": {"b": {"type": kind}}} for kind in ("str", "int, optional", "any")),
    ],
)
def test_a_schema_that_says_less_than_it_seems_is_followed_as_far_as_it_goes(chat, changes):
    """Keywords that are null are not set; of types there are seven, and data for training has others."""
    function = {"name": "f", "parameters": {"type": "object", "properties": {"b": {"type": "integer"}}, **changes}}
    answer = chat(tools=[{"type": "function", "function": function}], tool_choice="required", max_tokens=80)
    for call in answer.choices[0].message.tool_calls or ():
        assert isinstance(json.loads(call.function.arguments), dict)


def test_results_stand_in_the_order_of_their_calls(http):
    calls = [{"id": i, "type": "function", "function": {"name": i, "arguments": "{}"}} for i in ("one", "two")]
    results = [{"role": "tool", "tool_call_id": i, "content": f"of {i}"} for i in ("two", "one")]
    talk = [*ASK, {"role": "assistant", "tool_calls": calls}, *results, {"role": "user", "content": "and?"}]
    tool = {"type": "function", "function": {"name": "one", "parameters": {"type": "object"}}}
    shown = http.post("/apply-template", json={"messages": talk, "tools": [tool]}).json()["prompt"]
    assert shown.index("of one") < shown.index("of two") < shown.index("and?")
    for odd in ({"tool_calls": "x"}, {"tool_calls": [5]}, {"tool_calls": [{"id": []}]}):
        assert (
            http.post("/apply-template", json={"messages": [{"role": "assistant", **odd}, *results]}).status_code == 400
        )


def test_a_form_may_be_named_twice_if_it_is_the_same(http):
    """guidance says its grammar under vLLM's old and new name."""
    body = {"messages": ASK, "max_tokens": 20, "guided_choice": ["a"]}
    same = http.post("/v1/chat/completions", json={**body, "structured_outputs": {"choice": ["a"]}}).json()
    assert same["choices"][0]["message"]["content"] == "a"
    for other in ({"choice": ["b"]}, {"regex": "a"}):
        assert http.post("/v1/chat/completions", json={**body, "structured_outputs": other}).status_code == 400


def test_calls_stream_by_index_with_whole_ids(chat):
    settings = {"tools": [ADD, TELL], "tool_choice": "required", "seed": 4}
    calls, ended = {}, []
    for chunk in chat(stream=True, **settings):
        choice = chunk.choices[0]
        assert not choice.delta.content
        for piece in choice.delta.tool_calls or ():
            if piece.index not in calls:
                assert piece.index == len(calls)
                assert piece.id.startswith("call_")
                assert (piece.type, piece.function.arguments) == ("function", "")
                calls[piece.index] = {"name": piece.function.name, "arguments": ""}
            else:
                assert (piece.id, piece.type, piece.function.name) == (None, None, None)
                calls[piece.index]["arguments"] += piece.function.arguments
        ended.append(choice.finish_reason)
    whole = chat(**settings).choices[0]
    told = [{"name": call.function.name, "arguments": call.function.arguments} for call in whole.message.tool_calls]
    assert [calls[index] for index in sorted(calls)] == told
    assert ended[-1] == whole.finish_reason


def test_one_call_where_calls_may_not_be_parallel(chat, server):
    for choice in ("required", "auto"):
        found = chat(tools=[ADD, TELL], tool_choice=choice, parallel_tool_calls=False, n=4).choices
        assert all(len(each.message.tool_calls or ()) <= 1 for each in found)
    assert server.idle()


def test_words_that_call_nothing_where_nothing_may_be_called(chat, http):
    found = chat(tools=[ADD], tool_choice="none").choices[0]
    assert found.message.tool_calls is None
    rendered = http.post("/apply-template", json={"messages": ASK, "tools": [ADD]}).json()["prompt"]
    assert '"name": "add"' in rendered


def test_tools_and_a_form_together(chat):
    for seed in range(4):
        settings = {"tools": [TELL], "response_format": {"type": "json_object"}, "seed": seed}
        message = chat(**settings).choices[0].message
        assert message.tool_calls or isinstance(json.loads(message.content), dict)


def test_a_tool_loop(chat, http):
    call = chat(tools=[ADD], tool_choice="required", parallel_tool_calls=False).choices[0].message
    history = [*ASK, call.model_dump(exclude_none=True)]
    history += [{"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": '{"result": 5}'}]
    rendered = http.post("/apply-template", json={"messages": history, "tools": [ADD]}).json()["prompt"]
    assert f'"arguments": {call.tool_calls[0].function.arguments}}}\n</tool_call>' in rendered
    assert '<tool_response>\n{"result": 5}\n</tool_response>' in rendered
    assert chat(history, tools=[ADD], tool_choice="none", max_tokens=8).choices[0].message.content


def test_responses_call_tools_and_read_their_results(client):
    flat = {"type": "function", "strict": True, **ADD["function"]}
    asked = {"model": "tiny", "tools": [flat], "max_output_tokens": 200, "temperature": 1.0}
    first = client.responses.create(input="add!", tool_choice="required", parallel_tool_calls=False, **asked)
    (call,) = first.output
    assert call.type == "function_call"
    check_call(call.name, call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": '{"result": 5}'}
    items = [{"role": "user", "content": "add!"}, call.model_dump(exclude_none=True), result]
    second = client.responses.create(input=items, tool_choice="none", instructions="Be brief.", **asked)
    assert second.output_text
    names = [
        event.type.removeprefix("response.")
        for event in client.responses.create(input="add!", tool_choice="required", stream=True, **asked)
    ]
    assert names[2:6] == [
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
    ]  # fmt: skip
    form = {"format": {"type": "json_schema", "name": "animal", "schema": Animal.model_json_schema()}}
    found = client.responses.create(model="tiny", input="cat", text=form, max_output_tokens=300, temperature=1.0)
    Animal.model_validate_json(found.output_text)


def test_responses_think(client):
    found = client.responses.create(
        model="tiny", input="cat", reasoning={"effort": "high"}, max_output_tokens=60, temperature=1.0,
        extra_body={"seed": 3},
    )  # fmt: skip
    assert found.output[0].type == "reasoning"
    assert found.output[0].content[0].text
    assert found.usage.output_tokens_details.reasoning_tokens > 0

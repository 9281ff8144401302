"""Other people's programs against the server: schemathesis over its description, LangChain with a tool."""

import pytest

from tests.serve.conftest import running


@pytest.mark.slow
def test_nothing_that_the_description_allows_or_forbids_makes_a_5xx(folder):
    schemathesis = pytest.importorskip("schemathesis")
    Mode = schemathesis.GenerationMode
    hypothesis = pytest.importorskip("hypothesis")

    with running(model=(f"tiny={folder}",), max_tokens=4, context=256, max_n=4) as server:
        schema = schemathesis.openapi.from_url(f"{server.root}/openapi.json")
        paths = set()

        for operation in schema.get_all_operations():
            operation = operation.ok()
            paths.add(operation.path)
            modes = [*Mode] if operation.method == "post" else [Mode.POSITIVE]
            for mode in modes:

                @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
                @hypothesis.settings(
                    max_examples=40, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
                )
                def check(case):
                    response = case.call(timeout=60)
                    assert response.status_code < 500, (case.path, case.body, response.text)
                    if response.status_code >= 400:
                        assert response.json()["error"].keys() == {"message", "type", "param", "code"}

                check()
        assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/tokenize"} <= paths
        assert server.idle()
        assert server.worker.is_ready


def test_langchain_completes_a_tool_loop(server):
    chat_models = pytest.importorskip("langchain_openai")
    messages = pytest.importorskip("langchain_core.messages")
    tools = pytest.importorskip("langchain_core.tools")

    @tools.tool
    def multiply(a: int, b: int) -> int:
        """Multiplies two whole numbers."""
        return a * b

    model = chat_models.ChatOpenAI(
        model="tiny", base_url=server.url, api_key="none", temperature=1, max_tokens=200, seed=3, max_retries=0
    )
    talk = [messages.HumanMessage("What is 6 times 7?")]
    answer = model.bind_tools([multiply], tool_choice="required", parallel_tool_calls=False).invoke(talk)
    (call,) = answer.tool_calls
    result = multiply.invoke(call)
    assert int(result.content) == call["args"]["a"] * call["args"]["b"]
    last = model.bind_tools([multiply], tool_choice="none").invoke([*talk, answer, result])
    assert last.content
    assert last.usage_metadata["input_tokens"] > model.invoke(talk).usage_metadata["input_tokens"]
    streamed = model.bind_tools([multiply], tool_choice="required").stream(talk)
    whole = None
    for chunk in streamed:
        whole = chunk if whole is None else whole + chunk
    assert whole.tool_calls[0]["name"] == "multiply"

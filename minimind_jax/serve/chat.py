"""/v1/chat/completions: from the request to the engine, and from the answers to OpenAI's objects."""

import secrets
import time
from collections.abc import Iterator
from typing import Any

from minimind_jax import __version__
from minimind_jax.config.serving import ServeConfig
from minimind_jax.data.messages import CLOSE_THINK, OPEN_THINK
from minimind_jax.inference.request import Request
from minimind_jax.inference.splitter import AnswerSplitter, Part
from minimind_jax.serve import logprobs
from minimind_jax.serve.answers import Answers, Choice
from minimind_jax.serve.drawing import count_of, extras_of, requests_of, sampling_of
from minimind_jax.serve.errors import refused
from minimind_jax.serve.forms import form_of, with_calls
from minimind_jax.serve.models import Served
from minimind_jax.serve.prompts import begun, prompt_ids, read_talk, thinks
from minimind_jax.serve.protocol import ChatRequest, NamedTool
from minimind_jax.serve.stream import Shape, event

Asked = tuple[list[Request], list[Choice]]  # what the engine is to do, and the choices that its answers become


def new_id(kind: str) -> str:
    return f"{kind}{secrets.token_hex(12)}"


def heading(kind: str, served: Served) -> dict[str, Any]:
    """What the objects of one completion begin with. kind: how its id does."""
    told = {"created": int(time.time()), "model": served.name, "system_fingerprint": f"minimind-jax-{__version__}"}
    return {"id": new_id(kind), **told}


def ask(body: ChatRequest, served: Served, config: ServeConfig) -> Asked:
    """Raises ApiError or UserError for a bad request."""
    count = count_of(body, 1, config)
    wanted = body.max_completion_tokens or body.max_tokens or config.max_tokens
    choice = body.tool_choice or "auto"
    if choice != "auto" and choice != "none" and not body.tools:
        raise refused("tool_choice is set, but there are no tools", "tool_choice")
    if body.top_logprobs and not body.logprobs:
        raise refused("top_logprobs wants logprobs: true", "top_logprobs")
    tools = body.tools if choice != "none" else None
    if isinstance(choice, NamedTool) and choice.called not in [_name(tool) for tool in tools]:
        raise refused(f"tool_choice: there is no tool {choice.called[:60]!r}", "tool_choice")
    talk = read_talk(served, body.messages, tools, thinks(body, config.thinking))
    talk, words = begun(talk) if body.continue_final_message else (talk, "")
    prompt = prompt_ids(served.tokenizer, talk) + served.tokenizer.encode(words)
    opens = served.tokenizer.prompt_opens_thinking(talk.messages, talk.tools, talk.thinking)
    sampling = sampling_of(body, served, prompt, wanted)
    parallel = body.parallel_tool_calls is not False
    form = with_calls(form_of(body), talk.tools, choice, parallel, served.grammars)
    thought = "open" if opens else "may" if talk.thinking else "no"
    bind = form and form.binder(served.grammars, sampling.max_new_tokens, thought)
    more = {**extras_of(body, served), "top_logprobs": (body.top_logprobs or 0) if body.logprobs else 0}
    more["images"] = talk.pictures
    requests = requests_of(served, prompt, sampling, count, bind, **more)
    splitters = [AnswerSplitter(opens, calls=bool(talk.tools)) for _ in range(count)]
    named = isinstance(choice, NamedTool)
    thoughts = opens, tuple(map(served.grammars.tag, (OPEN_THINK, CLOSE_THINK)))
    choices = [Choice(n, prompt, splitter, parallel, not named, *thoughts) for n, splitter in enumerate(splitters)]
    return requests, choices


def _name(tool: dict[str, Any]) -> Any:
    function = tool.get("function")
    return function.get("name") if isinstance(function, dict) else tool.get("name")


class ChatShape(Shape):
    """The objects of one chat completion."""

    def __init__(self, body: ChatRequest, served: Served):
        self._body, self._served, self._base = body, served, heading("chatcmpl-", served)
        self._calls: dict[int, int] = {}  # how many each choice has told of

    def whole(self, answers: Answers) -> dict[str, Any]:
        choices = [self._choice(choice) for choice in answers.choices]
        more = {"prompt_token_ids": answers.choices[0].prompt} if self._body.return_token_ids else {}
        more |= self._served.metadata
        return {**self._base, "object": "chat.completion", "choices": choices, "usage": answers.usage(), **more}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        reasoning, calls = choice.reasoning or None, [_call(call) for call in choice.calls]
        message = {
            "role": "assistant",
            "content": choice.content or (None if calls else ""),
            "refusal": None,
            "reasoning_content": reasoning,
            "reasoning": reasoning,
            **({"tool_calls": calls} if calls else {}),
        }
        end = {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
        return {"index": choice.index, "message": message, **end, **self._tokens(choice)}

    def _tokens(self, choice: Choice, but: int = 0) -> dict[str, Any]:
        """Log-probabilities and ids of the tokens that are new, but for the last ones, where they were asked for."""
        tokens, body = choice.fresh(but), self._body
        found: dict[str, Any] = {"logprobs": None}
        if body.logprobs:
            found["logprobs"] = logprobs.of_chat(self._served.tokenizer, tokens, body.top_logprobs or 0)
        return {**found, **logprobs.of_ids(tokens)} if body.return_token_ids else found

    def begin(self, answers: Answers) -> Iterator[str]:
        for choice in answers.choices:
            more = {"prompt_token_ids": choice.prompt} if self._body.return_token_ids else {}
            yield self._chunk(choice, {"role": "assistant", "content": ""}, {"logprobs": None}, **more)

    def grow(self, choice: Choice, parts: list[Part]) -> Iterator[str]:
        for part in parts:
            for delta in self._deltas(choice, part):
                yield self._chunk(choice, delta, self._tokens(choice, self._ends(choice)))
        if choice.finish_reason:
            end = {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
            yield self._chunk(choice, {}, {**self._tokens(choice), **end})

    def _ends(self, choice: Choice) -> int:
        """How many of the new tokens end the answer and are no text of it. The last chunk tells of them, for clients
        (guidance) take a chunk's tokens for its text."""
        last = choice.new[-1:] if choice.finish_reason else []
        special = self._served.tokenizer.special_ids
        return sum(isinstance(choice.stop_reason, int) or token.id in special for token in last)

    def finish(self, answers: Answers) -> Iterator[str]:
        if self._body.stream_options and self._body.stream_options.include_usage:
            yield event({**self._base, "object": "chat.completion.chunk", "choices": [], "usage": answers.usage()})

    def _deltas(self, choice: Choice, part: Part) -> list[dict[str, Any]]:
        if part.reasoning:
            return [{"reasoning_content": part.reasoning, "reasoning": part.reasoning}]
        if part.content:
            return [{"content": part.content}]
        index = self._calls.get(choice.index, 0)
        self._calls[choice.index] = index + 1
        call = _call(part.call)
        arguments = call["function"]["arguments"]
        call["function"] = {"name": part.call.name, "arguments": ""}
        rest = {"index": index, "function": {"arguments": arguments}}
        return [{"tool_calls": [{"index": index, **call}]}, {"tool_calls": [rest]}]

    def _chunk(self, choice: Choice, delta: dict[str, Any], told: dict[str, Any], **more: Any) -> str:
        shown = {"index": choice.index, "delta": delta, "finish_reason": None, **told}
        return event({**self._base, "object": "chat.completion.chunk", "choices": [shown], **more})


def _call(call: Any) -> dict[str, Any]:
    return {"id": new_id("call_"), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}

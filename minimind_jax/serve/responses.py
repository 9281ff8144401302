"""/v1/responses: items in and out, and the events of items that grow. Nothing is stored between requests."""

import bisect
import json
import re
import time
from collections.abc import Iterator
from typing import Any

from minimind_jax.config.serving import ServeConfig
from minimind_jax.data.values import kind_of
from minimind_jax.errors import UserError
from minimind_jax.inference.splitter import Part, joined
from minimind_jax.serve import chat, log
from minimind_jax.serve.answers import Answers, Choice
from minimind_jax.serve.chat import Asked, new_id
from minimind_jax.serve.errors import ApiError, error_object, refused
from minimind_jax.serve.models import Served
from minimind_jax.serve.protocol import ChatRequest, Formed, Json, ResponsesRequest
from minimind_jax.serve.stream import Shape, event

_SAME = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed"),
    *("tools", "parallel_tool_calls", "enable_thinking", "open_thinking", "thinking", "think", "chat_template_kwargs"),
    *("reasoning", "reasoning_effort", *Formed.model_fields),
)
_STORED = ("previous_response_id", "conversation", "background")
_OTHER_TOOLS = (  # types of tools that are no functions, as they begin; who offers them gets on without them
    *("apply_patch", "code_interpreter", "computer", "custom", "file_search", "image_generation", "local_shell"),
    *("mcp", "namespace", "shell", "tool_search", "web_search"),
)


def ask(body: ResponsesRequest, served: Served, config: ServeConfig) -> Asked:
    """As of chat. Raises ApiError or UserError."""
    for name in _STORED:
        if getattr(body, name):
            raise refused(f"{name}: this server stores no responses; send the whole conversation as input", name)
    try:
        return chat.ask(as_chat(body), served, config)
    except (ApiError, UserError) as error:
        raise _about_input(error, body) from error


def as_chat(body: ResponsesRequest) -> ChatRequest:
    values: Json = {name: getattr(body, name) for name in _SAME}
    values["tools"] = [tool for tool in body.tools or [] if not _is_other(tool)] or None
    values["messages"] = messages_of(body.input, body.instructions)
    values["max_completion_tokens"] = body.max_output_tokens
    values["tool_choice"] = body.tool_choice.model_dump() if hasattr(body.tool_choice, "called") else body.tool_choice
    if body.text and body.text.format:
        values["response_format"] = body.text.format.model_dump(by_alias=True)
    return ChatRequest.model_validate({name: value for name, value in values.items() if value is not None})


def _is_other(tool: Json) -> bool:
    kind = str(tool.get("type", "function"))[:40]
    if found := kind.startswith(_OTHER_TOOLS):
        log.once(f"tools of the type {kind!r} are ignored; the model is offered functions alone")
    return found


def _about_input(error: ApiError | UserError, body: ResponsesRequest) -> ApiError:
    """What is wrong with a message, said of the item that it was made of."""
    error = refused(str(error)) if isinstance(error, UserError) else error
    items = [] if isinstance(body.input, str) else body.input

    def made(number: int) -> int:
        return len(messages_of(items[: number + 1], body.instructions))

    def item(found: re.Match) -> str:
        if body.instructions and found[1] == "0":
            return "instructions"
        if not items:
            return "input"
        number = bisect.bisect_right(range(len(items)), int(found[1]), key=made)  # the first that makes this message
        is_output = items[number].get("type") == "function_call_output"
        return f"input[{number}]{'.output' if found[2] and is_output else found[2] or ''}"

    told = [text and re.sub(r"messages\[(\d+)\](\.content)?", item, text) for text in (error.detail, error.param)]
    told = [text and text.replace("response_format", "text.format") for text in told]
    param = "input" if told[1] == "messages" else told[1]
    return ApiError(error.status_code, told[0], param, error.code, **(error.headers or {}))


def messages_of(items: str | list[Json], instructions: str | None) -> list[Json]:
    """The messages that input items spell: calls, and thoughts before them, belong to one message of the assistant."""
    messages: list[Json] = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    for index, item in enumerate(items):
        kind = item.get("type") or ("item_reference" if item.keys() <= {"id", "type"} else "message")
        if kind == "message":
            message = {name: value for name, value in item.items() if name not in ("type", "id", "status", "phase")}
            last = messages[-1] if messages else {}
            is_open = "reasoning_content" in last and not last["content"]  # a thought without words
            is_answer = is_open and message.get("role") == "assistant"
            messages.append({**messages.pop(), **message} if is_answer else message)
        elif kind == "reasoning":
            parts = item.get("content") or item.get("summary") or []
            messages.append({"role": "assistant", "content": "", "reasoning_content": _text(parts, index)})
        elif kind == "function_call":
            if not (messages and messages[-1].get("role") == "assistant"):
                messages.append({"role": "assistant", "content": ""})
            call = {name: item.get(name) for name in ("name", "arguments")}
            whole = {"id": item.get("call_id"), "type": "function", "function": call}
            messages[-1].setdefault("tool_calls", []).append(whole)
        elif kind == "function_call_output":
            output, place = item.get("output") or "", f"input[{index}].output"
            if not isinstance(output, str | list):
                raise refused(f"{place} is {kind_of(output)}; expected a text or a list of parts", place)
            messages.append({"role": "tool", "content": output, "tool_call_id": item.get("call_id")})
        elif kind == "item_reference":
            words = "refers to what this server has not stored; send the item itself, as clients do with store: false"
            raise refused(f"input[{index}] {words}", f"input[{index}]")
        else:
            raise refused(f"input[{index}] has the type {str(kind)[:40]!r}, which this model cannot read", "input")
    return messages


def _text(parts: Any, index: int) -> str:
    texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise refused(f"input[{index}]: a thought without text", "input")
    return "".join(texts)


class Items:
    """The output items of a response, as parts of the answer come; each step gives the events (name, fields)."""

    def __init__(self):
        self.done: list[Json] = []
        self._kind, self._item, self._text = "", {}, ""

    def push(self, part: Part) -> Iterator[tuple[str, Json]]:
        if part.call:
            yield from self.close()
            yield from self._call(part.call)
            return
        kind, text = ("reasoning", part.reasoning) if part.reasoning else ("message", part.content)
        if kind != self._kind:
            yield from self.close()
            yield from self._open(kind)
        self._text += text
        more = {"logprobs": []} if kind == "message" else {}
        yield f"{self._of_text}.delta", {**self._place(0), "delta": text, **more}

    def close(self, status: str = "completed") -> Iterator[tuple[str, Json]]:
        if not self._kind:
            return
        more = {"logprobs": []} if self._kind == "message" else {}
        yield f"{self._of_text}.done", {**self._place(0), "text": self._text, **more}
        part = _part(self._kind, self._text)
        yield "response.content_part.done", {**self._place(0), "part": part}
        item = {**self._item, "content": [part], "status": status}
        self._kind = ""
        yield "response.output_item.done", {"output_index": len(self.done), "item": item}
        self.done.append(item)

    @property
    def _of_text(self) -> str:
        return "response.output_text" if self._kind == "message" else "response.reasoning_text"

    def _place(self, content: int | None = None) -> Json:
        where = {"item_id": self._item["id"], "output_index": len(self.done)}
        return where if content is None else {**where, "content_index": content}

    def _open(self, kind: str) -> Iterator[tuple[str, Json]]:
        self._kind, self._text = kind, ""
        own = {"role": "assistant"} if kind == "message" else {"summary": []}
        item_id = new_id("msg_" if kind == "message" else "rs_")
        self._item = {"id": item_id, "type": kind, "status": "in_progress", **own, "content": []}
        yield "response.output_item.added", {"output_index": len(self.done), "item": dict(self._item)}
        yield "response.content_part.added", {**self._place(0), "part": _part(kind, "")}

    def _call(self, call: Any) -> Iterator[tuple[str, Json]]:
        own = {"call_id": new_id("call_"), "name": call.name}
        self._item = {"id": new_id("fc_"), "type": "function_call", "status": "completed", **own}
        begun = {**self._item, "arguments": "", "status": "in_progress"}
        yield "response.output_item.added", {"output_index": len(self.done), "item": begun}
        yield "response.function_call_arguments.delta", {**self._place(), "delta": call.arguments}
        yield "response.function_call_arguments.done", {**self._place(), "arguments": call.arguments, "name": call.name}
        item = {**self._item, "arguments": call.arguments}
        yield "response.output_item.done", {"output_index": len(self.done), "item": item}
        self.done.append(item)


def _part(kind: str, text: str) -> Json:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class ResponsesShape(Shape):
    """The object of one response, and its events."""

    end = ""

    def __init__(self, body: ResponsesRequest, served: Served):
        self._body, self._number, self._items = body, 0, Items()
        self._base = {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "model": served.name,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
            "store": False,
            "temperature": served.sampling.temperature if body.temperature is None else body.temperature,
            "text": {"format": _format(body)},
            "tool_choice": body.model_dump(include={"tool_choice"}, exclude_none=True).get("tool_choice", "auto"),
            "tools": body.tools or [],
            "top_p": served.sampling.top_p if body.top_p is None else body.top_p,
            "truncation": "disabled",
        }

    def whole(self, answers: Answers) -> Json:
        for part in joined(answers.choices[0].parts):
            list(self._items.push(part))
        list(self._items.close(_status(answers)))
        return self._object(_status(answers), answers)

    def _object(self, status: str, answers: Answers | None = None, error: Json | None = None) -> Json:
        return {
            **self._base,
            "status": status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": self._items.done,
            "usage": _usage(answers) if answers else None,
        }

    def begin(self, answers: Answers) -> Iterator[str]:
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", {"response": self._object("in_progress")})

    def grow(self, choice: Choice, parts: list[Part]) -> Iterator[str]:
        for part in parts:
            for name, fields in self._items.push(part):
                yield self._event(name, fields)

    def finish(self, answers: Answers) -> Iterator[str]:
        for name, fields in self._items.close(_status(answers)):
            yield self._event(name, fields)
        status = _status(answers)
        yield self._event(f"response.{status}", {"response": self._object(status, answers)})

    def fault(self, error: Exception) -> str:
        told = error_object(error)["error"]
        flat = {name: told[name] for name in ("code", "message", "param")}
        failed = self._object("failed", error={"code": told["code"] or told["type"], "message": told["message"]})
        return self._event("error", flat) + self._event("response.failed", {"response": failed})

    def _event(self, name: str, fields: Json) -> str:
        self._number += 1
        return event({"type": name, "sequence_number": self._number - 1, **fields}, name)


def _status(answers: Answers) -> str:
    return "incomplete" if answers.choices[0].finish_reason == "length" else "completed"


def _format(body: ResponsesRequest) -> Json:
    if not (body.text and body.text.format):
        return {"type": "text"}
    return json.loads(body.text.format.model_dump_json(by_alias=True, exclude_none=True))


def _usage(answers: Answers) -> Json:
    usage = answers.usage()
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": usage["completion_tokens_details"],
        "total_tokens": usage["total_tokens"],
    }

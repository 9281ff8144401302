"""Conversations as other programs export them: ChatGPT's trees, Gemini's contents."""

from typing import Any

from minimind_jax.data.fields import Fields
from minimind_jax.data.messages import Message, read_messages
from minimind_jax.errors import UserError


def chatgpt_messages(fields: Fields) -> list[Message]:
    """Of a conversation in ChatGPT's conversations.json the branch that was shown last: what user and assistant say.

    `mapping` is a tree of nodes {"message": ..., "parent": id}; `current_node` is the end of that branch. Raises
    UserError where it is none, and where nobody says a word on it.
    """
    (nodes, name), (node, _) = fields.take("mapping"), fields.take("current_node")
    fields.left.clear()
    where = fields.place(name).text
    turns: list[Message] = []
    seen: set[str] = set()
    while node is not None:
        if not isinstance(node, str) or not _object(_object(nodes).get(node)) or node in seen:
            raise UserError(f"{where}: no node {node!r} on the way to the first; export the conversation again")
        seen.add(node)
        message, node = _object(nodes[node].get("message")), nodes[node].get("parent")
        turns += _said(message, fields)
    if not turns:
        raise UserError(f"{where}: no words of user or assistant; expected a conversation of ChatGPT's export")
    fields.tell("of ChatGPT's export, title, times and all else beside the messages are ignored")
    return read_messages(turns[::-1], fields.place(name))[0]


def _said(message: dict[str, Any], fields: Fields) -> list[Message]:
    """The message as others write it; nothing if it is not what one of both says to the other."""
    role, content = _object(message.get("author")).get("role"), _object(message.get("content"))
    parts = content.get("parts") if isinstance(content.get("parts"), list) else []
    texts = [part for part in parts if isinstance(part, str) and part.strip()]
    hidden = _object(message.get("metadata")).get("is_visually_hidden_from_conversation")
    if role not in ("user", "assistant") or message.get("recipient", "all") != "all" or hidden:
        if texts or content.get("text"):
            fields.tell("of ChatGPT's export, hidden messages and those from and to tools are left out")
        return []
    if len(texts) < len([part for part in parts if part]) or content.get("content_type") not in (None, "text"):
        fields.tell("of ChatGPT's export, pictures, files and thoughts are left out")
    return [{"role": role, "content": "\n".join(texts)}] if texts else []


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def gemini_messages(fields: Fields) -> list[Message]:
    """Of a record for tuning Gemini: `contents`, of messages with `role` and `parts`, and `systemInstruction`."""
    contents, name = fields.take("contents")
    system, system_name = fields.take("systemInstruction", "system_instruction")
    turns = [_with_content(turn) for turn in contents] if isinstance(contents, list) else contents
    messages, _ = read_messages(turns, fields.place(name))
    if system is None:
        return messages
    if isinstance(system, dict):  # its role is left out, or `user`
        system = {**_with_content(system), "role": "system"}
    return read_messages([system], fields.place(system_name))[0] + messages


def _with_content(turn: Any) -> Any:
    if not isinstance(turn, dict):
        return turn
    parts = turn.get("parts")
    named = {**turn, "content": [parts] if isinstance(parts, dict) else parts}
    return {"role": "user", **{name: value for name, value in named.items() if name != "parts"}}

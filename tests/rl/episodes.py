"""Episodes that a test writes down."""

from minimind_jax.data.tools import parse_calls
from minimind_jax.rl.episode import Episode, Task, Turn


def episode(
    *texts, where="f.jsonl:1", tokens=None, thinking=False, opened=None, calls=(), observations=(), tools=None, **fields
):
    """An episode of these turns, a token a character but for `tokens` of the last. opened: a think block, by prompts;
    None for as `thinking` says."""
    ids = [[ord(char) for char in text] for text in texts]
    ids = [*ids[:-1], tokens] if tokens is not None else ids
    turns, start = [], 2
    for n, (text, own) in enumerate(zip(texts, ids, strict=True)):
        made = calls[n] if n < len(calls) else ()
        told = observations[n] if n < len(observations) else ()
        answer = parse_calls(text.rpartition("</think>")[2])[0]
        own_thinking = thinking if opened is None else opened
        turns.append(Turn(text, answer, tuple(made), tuple(told), start, start + len(own), "stop", own_thinking))
        start += len(own)
    question = [{"role": "user", "content": fields.pop("question", "How many of 3?")}]
    count = start - 2
    return Episode(
        0, Task(where, question, tools, fields), thinking, [1, 1, *(i for own in ids for i in own)], 2,
        [False] * 2 + [True] * count, [0.0] * (2 + count), turns, "stop",
    )  # fmt: skip

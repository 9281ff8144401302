"""The tasks of a run: its records' prompts, those that are held out, and which of them a rollout asks."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from minimind_jax.config.rl import RLConfig
from minimind_jax.data.batches import split_records
from minimind_jax.data.documents import encode_prompt
from minimind_jax.data.jsonl import iter_records, tell
from minimind_jax.data.messages import EMPTY_ANSWERS, Message
from minimind_jax.data.prompts import own_thinking, read_prompt, shortened
from minimind_jax.data.template import Dice
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.rl.episode import Task
from minimind_jax.seeds import named_seed
from minimind_jax.tools.schema import Schema
from minimind_jax.training.defaults import share_held_out


class Tasks(NamedTuple):
    """train, held_out: tasks in the order of their records. notes: what is told of them, with counts."""

    train: list[Task]
    held_out: list[Task]
    notes: list[str]

    @property
    def content(self) -> str:
        """A hash of those that are trained on, wherever their files lie."""
        found = hashlib.blake2b(digest_size=8)
        for _, *own in self.train:
            found.update(json.dumps(own, sort_keys=True, default=str).encode())
        return found.hexdigest()


def read_tasks(config: RLConfig, tokenizer: Tokenizer, tools: Sequence[Schema] = ()) -> Tasks:
    """All prompts of data.train, and those of data.val or a share of the others.

    tools: of an agent, which are offered where a prompt offers none itself.
    Raises UserError for a broken record, unless data.on_error skips them, and for a prompt that leaves no room for its
    answer, unless rollout.long_prompts says what to do.
    """
    train, notes = _read(config, tokenizer, config.data.train, "data.train", tools)
    if config.data.val:
        held_out, more = _read(config, tokenizer, config.data.val, "data.val", tools)
        return Tasks(train, held_out, notes + more + _trained_on(train, held_out))
    fraction = config.data.val_fraction
    if fraction is None:
        fraction = share_held_out(len(train), config.figures)
        if not fraction:
            notes.append(
                f"{len(train)} prompts are too few to hold some out; give data.val, or data.val_fraction, to see how "
                "well the policy does"
            )
    kept, aside = ([train[n] for n in side] for side in split_records(np.arange(len(train)), fraction, config.seed))
    return Tasks(kept, aside, notes + _trained_on(kept, aside))


def _said(task: Task) -> str:
    """What a prompt asks; without a system prompt, which may have been drawn."""
    messages = [message for message in task.messages if message["role"] != "system"]
    return json.dumps([messages, task.tools, task.thinking], sort_keys=True)


def _trained_on(train: Sequence[Task], held_out: Sequence[Task]) -> list[str]:
    known = set(map(_said, train))
    count = sum(_said(task) in known for task in held_out)
    asked = f"{count:,} of the {len(held_out):,} held-out prompts"
    return [f"warning: {asked} are trained on, too, and tell nothing of new ones"] * bool(count)


def _read(
    config: RLConfig, tokenizer: Tokenizer, files: Sequence[str], name: str, tools: Sequence[Schema]
) -> tuple[list[Task], list[str]]:
    if not files:
        raise UserError(f"{name} is empty; give files of prompts: --{name} FILE.jsonl")
    told, counts = Counter(), Counter()
    dice = Dice(config.seed, 0, config.data.system_prompt_probability, 0.0)
    tasks: list[Task] = []

    def skip(error: UserError) -> None:
        if config.data.on_error != "skip":
            raise error
        counts["broken records are skipped"] += 1

    for number, record in enumerate(iter_records(files, skip, config.data, told)):
        try:
            asked, _ = dice.roll(number)(read_prompt(record, config.data).as_conversation())
            if (last := asked.messages[-1])["role"] == "user" and not last["content"].strip():
                raise UserError(f"{record.where}: the question is empty; expected text")
            offered = asked.tools or list(tools) or None
            thinking = own_thinking(asked, record.where)
            task = Task(record.where, asked.messages, offered, dict(record.value), thinking)
            length = prompt_length(config, tokenizer, task)
        except UserError as error:
            skip(error)
            continue
        fitting = _fitting(config, tokenizer, task, length)
        counts["prompts are too long and left out (rollout.long_prompts)"] += fitting is None
        counts["prompts lost their beginning (rollout.long_prompts)"] += fitting not in (None, task)
        tasks += [fitting] if fitting else []
        if tools:
            there_are = {schema["function"]["name"] for schema in tools}
            counts["prompts offer no tools, and get those of agent.tools"] += not asked.tools
            for missing in {(tool.get("function") or tool)["name"] for tool in asked.tools or ()} - there_are:
                counts[f"prompts offer {missing}, which agent.tools does not have: a call of it fails"] += 1
    tell(Counter({key: count for key, count in told.items() if key[1] != EMPTY_ANSWERS}))  # they are left out
    if not tasks:
        why = "".join(f"; {count:,} {note}" for note, count in counts.items() if count)
        raise UserError(f"{', '.join(map(str, files))}: no prompt is left to learn from{why}")
    counts["prompts repeat others word for word"] = len(tasks) - len(set(map(_said, tasks)))
    asked, unasked = (encode_prompt(tokenizer, tasks[0].messages, tasks[0].tools, wanted) for wanted in (True, False))
    if config.rollout.thinking and asked == unasked:
        counts["prompts are the same, thinking or not: the chat template knows no rollout.thinking"] = len(tasks)
    return tasks, [f"{name}: {count:,} {note}" for note, count in counts.items() if count]


def _fitting(config: RLConfig, tokenizer: Tokenizer, task: Task, length: int) -> Task | None:
    """The task, cut if need be; None where it is left out. Raises UserError where nothing says what to do."""
    room, wanted = config.data.seq_len - config.rollout.max_new_tokens, config.rollout.long_prompts
    if length <= room:
        return task
    if wanted == "stop":
        raise UserError(
            f"{task.where}: the prompt has {length:,} tokens, and data.seq_len {config.data.seq_len} less "
            f"rollout.max_new_tokens {config.rollout.max_new_tokens} leaves {room:,}; raise data.seq_len, or set "
            "rollout.long_prompts to skip or cut"
        )
    if wanted == "skip":
        return None

    def count(messages: list[Message]) -> int:
        return prompt_length(config, tokenizer, task._replace(messages=messages))

    messages = shortened(task.messages, count, room, tokenizer)
    return None if messages is None else task._replace(messages=messages)


def prompt_length(config: RLConfig, tokenizer: Tokenizer, task: Task) -> int:
    """Tokens of a task's prompt; of one that is asked to think now and then, the longer one's."""
    chance = config.rollout.thinking if task.thinking is None else task.thinking
    possible = {chance > 0, chance == 1}
    return max(len(encode_prompt(tokenizer, task.messages, task.tools, thinking)) for thinking in possible)


def thinks(config: RLConfig, task: Task, name: str) -> bool:
    """Whether a prompt opens a think block: as its record says, or as is drawn under that name."""
    draw = np.random.default_rng(named_seed(config.seed, "thinking", name)).random()
    return draw < config.rollout.thinking if task.thinking is None else task.thinking


def drawn_tasks(tasks: int, count: int, seed: int, rollout: int) -> list[int]:
    """Numbers of the tasks that a rollout asks: all of them, in an order drawn anew, before one comes again."""
    places = range(rollout * count, (rollout + 1) * count)
    draws = {epoch: np.random.default_rng(named_seed(seed, "tasks", epoch)) for epoch in {p // tasks for p in places}}
    orders = {epoch: draw.permutation(tasks) for epoch, draw in draws.items()}
    return [int(orders[place // tasks][place % tasks]) for place in places]


def refilling_tasks(tasks: int, count: int, seed: int, rollout: int, attempt: int) -> list[int]:
    """Numbers of the tasks that take the place of such that taught nothing."""
    return np.random.default_rng(named_seed(seed, "refill", rollout, attempt)).integers(0, tasks, count).tolist()

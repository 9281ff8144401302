"""Many episodes at once: each goes on as soon as its own turn is done, and its environment works meanwhile.

Tokens are what was sampled, never encoded anew; what an environment says is encoded once and appended. Everything is a
function of the seeds, but for what an environment or a clock brings in.
"""

import dataclasses
import math
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.data.documents import encode_replies
from minimind_jax.data.messages import OPEN_THINK, ROLES, Message
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.data.tools import parse_calls
from minimind_jax.errors import UserError, first_line
from minimind_jax.inference.request import Answer, Request
from minimind_jax.inference.splitter import parted
from minimind_jax.rl.environment import Environment
from minimind_jax.rl.episode import Episode, Task, Turn
from minimind_jax.seeds import named_seed
from minimind_jax.texts import one_line
from minimind_jax.tools.toolbox import Observation

PATIENCE = 2.0  # seconds that others wait for an environment, so that who writes beside whom is not left to the clock
_SEEDS = 2**62  # within what a SamplingConfig takes
_TAIL = 8  # tokens of a prompt among which its open think block is


class Writer(Protocol):
    """Who writes: the engine, or a server."""

    def submit(self, request: Request) -> Answer:
        """Takes a request: its answer grows with the steps."""

    def step(self, patient: bool = False) -> list[Answer]:
        """The answers that grew. patient: nobody reads along."""

    def cancel(self, answer: Answer) -> None:
        """Ends an answer as it is."""


class GaveUp(Exception):
    """The run is to stop: what was begun is not played to its end."""


class Start(NamedTuple):
    """An episode that is to be played. prompt: its tokens. thinking: whether it was asked to think."""

    group: int
    task: Task
    prompt: Sequence[int]
    thinking: bool
    seed: int


class Reply(NamedTuple):
    """What an environment had to say. ids: its tokens. finish: why the episode is over, if it is. error: its own."""

    ids: Sequence[int] = ()
    observations: tuple[Observation, ...] = ()
    finish: str = ""
    error: BaseException | None = None


@dataclasses.dataclass(eq=False)
class _Seat:
    """An episode in the making."""

    number: int
    seed: int  # of what it writes
    task_seed: int  # of its environment
    episode: Episode
    has_started: bool = False
    deadline: float = math.inf  # of the clock, once it writes
    given_up: bool = False  # nobody waits for its environment


def play(
    writer: Writer,
    starts: Sequence[Start],
    environment: Environment,
    tokenizer: Tokenizer,
    *,
    sampling: SamplingConfig,
    turns: int = 1,
    seq_len: int,
    seconds: float = 0.0,
    tell: Callable[[str], None] = lambda note: None,
    is_stopping: Callable[[], bool] = lambda: False,
) -> list[Episode]:
    """Plays all episodes, in the order of `starts`.

    sampling: of each turn, whose seed comes of the start's and the number of the turn. turns: of an episode at most.
    seq_len: tokens of an episode at most. seconds: that an episode may take from when it begins to write; 0 for no
    limit. tell: hears what went wrong. is_stopping: asked between two steps of the writer.

    While environments answer within PATIENCE, an episode is the same to the last bit whenever it is played; once one
    took longer, nobody waits any more, and numbers may differ in their last bits (who shares a step with whom decides
    the order of sums).
    Raises UserError for a prompt that fills seq_len, and where all episodes of several prompts ended by errors; GaveUp
    where the run is to stop.
    """
    for start in starts:
        if (count := len(start.prompt)) >= seq_len:
            raise UserError(
                f"{start.task.where}: a prompt of {count} tokens leaves no room for an answer in data.seq_len {seq_len}"
            )
    table = _Table(writer, environment, tokenizer, sampling, turns, seq_len, seconds or math.inf, is_stopping)
    first = {start.group: start.seed for start in reversed(starts)}
    seats = []
    for number, start in enumerate(starts):
        prompt, count = list(start.prompt), len(start.prompt)
        episode = Episode(start.group, start.task, start.thinking, prompt, count, [False] * count, [0.0] * count)
        seats.append(_Seat(number, start.seed, named_seed(first[start.group], "environment"), episode))
    episodes = table.play(seats)
    if table.errors:
        error = table.errors[min(table.errors)]
        raised = [f" ({frame.filename}:{frame.lineno})" for frame in traceback.extract_tb(error.__traceback__)[-1:]]
        said = f"{type(error).__name__}: {one_line(first_line(error))}{''.join(raised)}"
        what = f"of {len(starts):,} episodes ended by an error of their environment, the first: {said}"
        if len(table.errors) == len(starts) and len(first) > 1:
            raise UserError(f"all {what}") from error
        tell(f"{len(table.errors):,} {what}")
    return episodes


@dataclasses.dataclass(eq=False)
class _Table:
    """All that play together."""

    writer: Writer
    environment: Environment
    tokenizer: Tokenizer
    sampling: SamplingConfig
    turns: int
    seq_len: int
    seconds: float
    is_stopping: Callable[[], bool]
    writing: dict[Answer, _Seat] = dataclasses.field(default_factory=dict)  # those whose turn is being written
    waiting: set[_Seat] = dataclasses.field(default_factory=set)  # those whose environment works
    replies: "queue.SimpleQueue[tuple[_Seat, Reply]]" = dataclasses.field(default_factory=queue.SimpleQueue)
    is_quick: bool = True  # all environments were, so far
    errors: dict[int, BaseException] = dataclasses.field(default_factory=dict)

    def play(self, seats: Sequence[_Seat]) -> list[Episode]:
        try:
            for seat in seats:
                self._ask(seat)
            while self.writing or self.waiting:
                if self.is_stopping():
                    raise GaveUp
                for answer in self.writer.step(patient=True) if self.writing else ():
                    if seat := self.writing.get(answer):
                        seat.deadline = min(seat.deadline, time.monotonic() + self.seconds)
                        if answer.finish_reason:
                            self._hear(answer)
                for seat, reply in self._collected():
                    self._go_on(seat, reply)
                self._end_late()
        finally:
            for answer in self.writing:
                self.writer.cancel(answer)
        return [seat.episode for seat in seats]

    # A turn -----------------------------------------------------------------------------------------------------------

    def _ask(self, seat: _Seat) -> None:
        """Has the next turn written."""
        episode = seat.episode
        number, room = len(episode.turns), self.seq_len - len(episode.tokens)
        sampling = dataclasses.replace(
            self.sampling,
            seed=named_seed(seat.seed, "turn", number) % _SEEDS,
            max_new_tokens=min(self.sampling.max_new_tokens, room),
        )
        ends = self.tokenizer.end_ids
        answer = self.writer.submit(Request(tuple(episode.tokens), sampling, stop_ids=ends, priority=number))
        self.writing[answer] = seat

    def _hear(self, answer: Answer) -> None:
        """Takes what was written, and has the environment answer it."""
        seat = self.writing.pop(answer)
        episode, ids = seat.episode, answer.ids
        has_ended = answer.finish_reason == "stop" and ids[-1] in answer.ends
        if answer.finish_reason == "cancelled":
            episode.finish = "seconds"
        elif not has_ended:
            is_full = answer.request.sampling.max_new_tokens < self.sampling.max_new_tokens
            episode.finish = "tokens" if is_full else "length"
        if ids:
            episode.turns.append(self._turn(episode.tokens, ids, has_ended))
        episode.tokens += ids
        episode.sampled += [True] * len(ids)
        episode.logprobs += [token.sampled_logprob for token in answer.tokens]
        self.waiting.add(seat)
        threading.Thread(target=self._answer, args=(seat,), daemon=True).start()

    def _turn(self, before: Sequence[int], ids: Sequence[int], has_ended: bool) -> Turn:
        decode = self.tokenizer.decode
        text = decode(ids[:-1] if has_ended else ids)
        is_thinking = decode(before[-_TAIL:], skip_special_tokens=False).rstrip().endswith(OPEN_THINK)
        answer, calls = parse_calls(parted(text, is_thinking).content)
        finish = "stop" if has_ended else "length"
        return Turn(text, answer, tuple(calls), (), len(before), len(before) + len(ids), finish, is_thinking)

    def _go_on(self, seat: _Seat, reply: Reply) -> None:
        """Takes what the environment said; the next turn, or the end."""
        episode = seat.episode
        if reply.error is not None:
            self.errors[seat.number] = reply.error
        if reply.observations:
            episode.turns[-1] = episode.turns[-1]._replace(observations=reply.observations)
        episode.finish = reply.finish
        if reply.finish:
            return
        episode.tokens += reply.ids
        episode.sampled += [False] * len(reply.ids)
        episode.logprobs += [0.0] * len(reply.ids)
        self._ask(seat)

    # The environment --------------------------------------------------------------------------------------------------

    def _answer(self, seat: _Seat) -> None:
        """In a thread: what the environment says to the last turn. Of the episode only its state is changed here, for
        who gave it up does not wait."""
        try:
            reply = self._reply(seat, seat.episode)
        except BaseException as error:  # an environment that calls exit() has only failed
            reply = Reply(finish="error", error=error)
        self.replies.put((seat, reply))

    def _reply(self, seat: _Seat, episode: Episode) -> Reply:
        if not seat.has_started:
            episode.state = self.environment.start(episode.task, seat.task_seed)
            seat.has_started = True
        reply = Reply(finish=episode.finish)
        try:
            if not episode.finish:
                reply = self._said(self.environment.step(episode.state, episode.turns[-1]), episode)
        except BaseException as error:
            reply = Reply(finish="error", error=error)
        if reply.finish or seat.given_up:
            self.environment.end(episode.state)
        return reply

    def _said(self, said: Any, episode: Episode) -> Reply:
        messages = _checked(said)
        if not messages:
            return Reply(finish="stop")
        tools = [message for message in messages if message["role"] == "tool"]
        told = tuple(Observation(tool["content"], bool(tool.get("is_error"))) for tool in tools)
        if len(episode.turns) == self.turns:
            return Reply((), told, "turns")
        ids = encode_replies(self.tokenizer, messages, episode.task.tools, episode.thinking)
        if len(episode.tokens) + len(ids) >= self.seq_len:
            return Reply((), told, "tokens")
        return Reply(ids, told)

    def _collected(self) -> list[tuple[_Seat, Reply]]:
        """What environments have said, in the order of the episodes. None is left behind as long as all are quick."""
        found: list[tuple[_Seat, Reply]] = []
        until = time.monotonic() + min(PATIENCE, self.seconds)
        while self.waiting:
            waits = self.is_quick or not (found or self.writing)
            try:
                seat, reply = self.replies.get(timeout=max(0.0, until - time.monotonic()) if waits else 0.0)
            except queue.Empty:
                self.is_quick = False
                break
            if not seat.given_up:
                self.waiting.discard(seat)
                found.append((seat, reply))
        return sorted(found, key=lambda each: each[0].number)

    def _end_late(self) -> None:
        """Ends the episodes that have taken too long, whether they write or their environment works."""
        now = time.monotonic()
        for seat in [seat for seat in self.waiting if now > seat.deadline]:
            self.waiting.remove(seat)
            seat.given_up, seat.episode.finish = True, seat.episode.finish or "seconds"
        for answer, seat in list(self.writing.items()):
            if now > seat.deadline:
                seat.deadline = now + self.seconds  # for its environment to end
                self.writer.cancel(answer)
                self._hear(answer)


def _checked(said: Any) -> list[Message]:
    """What `step` gave, as messages. Raises TypeError for what is none."""
    if said is None:
        return []
    others = [role for role in ROLES if role != "assistant"]
    for message in said if isinstance(said, list | tuple) else [said]:
        if (
            not isinstance(message, dict)
            or message.get("role") not in others
            or not isinstance(message.get("content"), str)
        ):
            raise TypeError(
                f"step gave {message!r:.80}; expected None or a list of messages such as "
                '{"role": "user", "content": "Higher."}, of the roles ' + ", ".join(others)
            )
    return list(said)

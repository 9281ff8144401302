"""`minimind chat`: a conversation with a model in the terminal."""

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from minimind_jax.config.generation import ChatConfig
from minimind_jax.data.documents import encode_prompt
from minimind_jax.data.images import Picture, open_picture
from minimind_jax.data.pictures import find_file, marker_of, with_markers
from minimind_jax.data.tools import Call, parse_calls
from minimind_jax.errors import UserError
from minimind_jax.inference.adapters import OFF
from minimind_jax.inference.engine import Engine, Piece
from minimind_jax.inference.image_encoder import BLIND
from minimind_jax.inference.load import load_engine
from minimind_jax.inference.splitter import AnswerSplitter, Part
from minimind_jax.inference.tool_use import carry_out
from minimind_jax.inference.typed import typed_messages, typed_path
from minimind_jax.tools.toolbox import Observation, Toolbox

Message = dict[str, Any]

HELP = """\
/clear        forget the conversation
/think        think before answering        /nothink   answer at once
/image PATH   show a picture with the next question, where that says <image>, or in front of it
/system TEXT  set the system prompt and forget the conversation; without TEXT, remove it
/adapter NAME answer with another adapter, or `off`; without NAME, list them
/exit         leave (or Ctrl-D); Ctrl-C stops an answer"""


def run(config: ChatConfig) -> None:
    """Loads the model and talks until the user leaves. Raises UserError if there is no such model or tool."""
    with Toolbox(config.tools) if config.tools else contextlib.nullcontext() as tools:
        engine = load_engine(config.model, config.dtype, config.adapters, slots=1)
        chat(engine, config, Console(markup=False, emoji=False, highlight=False), tools=tools)


def chat(
    engine: Engine,
    config: ChatConfig,
    console: Console,
    lines: Iterable[str] | None = None,
    tools: Toolbox | None = None,
) -> None:
    """Answers the user's lines until they end or one is /exit.

    Args:
        lines: what the user types, messages and commands; None reads the standard input, a terminal or a pipe.
        tools: that the model may call.
    """
    conversation = Dialogue(engine, config, tools)
    with console.status("Compiling ..."):
        conversation.warm_up()
    offered = f" Tools: {', '.join(tools.names)}." if tools else ""
    console.print(
        f"{config.model}, context of {engine.room(0)} tokens.{offered} /help lists the commands.",
        style="dim", soft_wrap=True,
    )  # fmt: skip
    if lines is None:
        lines = typed_messages(console.print, lambda hint: console.print(hint, style="dim"))
    for line in lines:
        line = line.strip()
        if line in ("/exit", "/quit"):
            return
        if line.startswith("/"):
            console.print(conversation.command(line), style="dim")
        elif line:
            _answer(conversation, line, console, config)


class Dialogue:
    """The messages so far, and the answers of the model to them.

    messages: of user, assistant and tools, without the system prompt; those of a user with the `images` that they show.
    pictures: that the next question shows. thinking: whether the next answer thinks first. adapter: that gives it; ""
    for the base model by itself.
    """

    def __init__(self, engine: Engine, config: ChatConfig, tools: Toolbox | None = None):
        self._engine, self._sampling = engine, config.resolve(engine.sampling)
        self._tools = tools
        self._answers = 0
        self.adapter = next(iter(engine.adapters), "")
        self.system, self.thinking = config.system, config.thinking
        self.messages: list[Message] = []
        self.pictures: list[Picture] = []
        self._vision = engine.model.config.vision
        self._marker = marker_of(engine.tokenizer, self._vision)

    def command(self, line: str) -> str:
        """Carries out a /command and returns what to tell the user."""
        name, _, text = line.partition(" ")
        if name == "/clear":
            self.messages, self.pictures = [], []
            return "the conversation is forgotten"
        if name == "/image":
            return self._show(text.strip())
        if name in ("/think", "/nothink"):
            self.thinking = name == "/think"
            return "thinks before answering" if self.thinking else "answers at once"
        if name == "/adapter":
            return self._adapter(text.strip())
        if name == "/system":
            if self._spells_marker(text):
                return f"{self._marker.text} stands for pictures; leave it out of the system prompt"
            self.system, self.messages, self.pictures = text.strip(), [], []
            return "new system prompt; the conversation is forgotten" if self.system else "no system prompt"
        return HELP if name == "/help" else f"unknown command {name}\n{HELP}"

    def _show(self, address: str) -> str:
        if self._vision is None:
            return f"no picture can be shown: {BLIND}"
        notes: list[str] = []
        if address:
            try:
                file = find_file(typed_path(address), Path(), address)
                self.pictures.append(open_picture(file, self._vision.tower, address, notes.append))
            except UserError as error:
                return str(error)
        shown = f"pictures that the next question shows: {len(self.pictures)}; /clear drops them"
        return "\n".join([*notes, shown])

    def _adapter(self, name: str) -> str:
        if not self._engine.adapters:
            return "there are no adapters; --adapters NAME ... loads some"
        there_are = f"there are {', '.join((OFF, *self._engine.adapters))}"
        if name not in ("", OFF, *self._engine.adapters):
            return f"there is no adapter {name}; {there_are}"
        if name:
            self.adapter = "" if name == OFF else name
        return f"answers with {self.adapter or OFF}; {there_are}"

    def ask(self, text: str) -> int:
        """Adds the user's message and drops the oldest turns until the conversation fits; the number of those.

        Raises:
            UserError: the message alone does not fit the model's context; it is not added.
        """
        messages = [*self.messages, self._question(text)]
        turns = [start for start, message in enumerate(messages) if message["role"] == "user"]
        room = self._engine.room(0)
        reserve = min(self._sampling.max_new_tokens, room // 2)  # for the answer
        for dropped, start in enumerate(turns):
            if (length := len(self._prompt(messages[start:]))) + reserve <= room:
                self.messages, self.pictures = messages[start:], []
                return dropped
        shown = f" and {len(self.pictures)} pictures, which /clear drops" if self.pictures else ""
        raise UserError(
            f"the message takes {length} tokens with its frame{shown}; "
            f"at most {room - reserve} fit beside an answer in the model's context of {room}; "
            + (f"--max_new_tokens {room - length} leaves room" if length < room else "say less, or offer fewer tools")
        )

    def _spells_marker(self, text: str) -> bool:
        return self._marker is not None and self._marker.text in text

    def _question(self, text: str) -> Message:
        """A user's message with markers in the places of the pictures that it shows."""
        if self._spells_marker(text):
            raise UserError(f"{self._marker.text} stands for pictures; leave it out")
        if not self.pictures:
            return {"role": "user", "content": text}
        [content] = with_markers([text], len(self.pictures), self._marker, "the question")
        return {"role": "user", "content": content, "images": tuple(self.pictures)}

    def answer(self) -> Iterator[Piece]:
        """Streams the answer to the last message. Give what was shown to `keep`, also when the loop was left."""
        ids = self._prompt(self.messages)
        count = min(self._sampling.max_new_tokens, self._engine.room(len(ids)))
        if count < 1:
            raise UserError(
                f"the tools' results fill the model's context of {self._engine.room(0)} tokens; the question is "
                "forgotten"
            )
        seed = self._sampling.seed + self._answers  # asked again, a question gets another answer
        self._answers += 1
        sampling = dataclasses.replace(self._sampling, max_new_tokens=count, seed=seed)
        images = tuple(picture for message in self.messages for picture in message.get("images", ()))
        yield from self._engine.stream(ids, sampling, adapter=self.adapter, images=images)

    def opens_thinking(self) -> bool:
        """Whether the prompt of the next answer ends in an open think block."""
        tokenizer = self._engine.tokenizer
        return tokenizer.prompt_opens_thinking(self._whole(self.messages), self._schemas, self.thinking)

    def keep(self, answer: str, thinking: str) -> None:
        """Adds the model's message, its calls as it wrote them. If it said nothing, the question is forgotten: silence
        would teach it silence."""
        if not (answer + thinking).strip():
            self.forget_question()
            return
        message = {"role": "assistant", "content": answer.strip()}
        if thinking.strip():
            message["reasoning_content"] = thinking.strip()
        self.messages.append(message)

    def forget_question(self) -> None:
        """Takes the last question away, and all that came of it; its pictures wait for the next."""
        last = max(n for n, message in enumerate(self.messages) if message["role"] == "user")
        self.pictures = list(self.messages[last].get("images", ()))
        del self.messages[last:]

    def calls_in(self, answer: str) -> list[Call]:
        """What the answer calls, if there are tools."""
        return parse_calls(answer)[1] if self._tools else []

    def use_tools(self, calls: list[Call]) -> list[Observation]:
        """Carries out calls, and adds what comes of them to the messages."""
        results = carry_out(calls, self._tools)
        self.messages += [{"role": "tool", "content": result.text} for result in results]
        return results

    def warm_up(self) -> None:
        """Compiles what a first short message needs, so that the speed shown is the model's."""
        ids = self._prompt([{"role": "user", "content": "hi"}])
        if self._engine.room(len(ids)) >= self._sampling.max_new_tokens:
            for pieces, _ in enumerate(self._engine.stream(ids, self._sampling)):
                if pieces == 1:
                    return

    def _prompt(self, messages: list[Message]) -> list[int]:
        return encode_prompt(self._engine.tokenizer, self._whole(messages), self._schemas, self.thinking)

    @property
    def _schemas(self) -> list[dict[str, Any]] | None:
        return self._tools.schemas if self._tools else None

    def _whole(self, messages: list[Message]) -> list[Message]:
        """The messages behind the system prompt, as a template takes them."""
        words = [{name: value for name, value in message.items() if name != "images"} for message in messages]
        return [*([{"role": "system", "content": self.system}] if self.system else []), *words]


def _answer(conversation: Dialogue, text: str, console: Console, config: ChatConfig) -> None:
    """Answers one message, and carries out the calls in the answer until there are none."""
    try:
        dropped = conversation.ask(text)
    except UserError as error:
        console.print(str(error), style="red")
        return
    if dropped:
        console.print(f"({dropped} of the oldest turns no longer fit and are forgotten)", style="dim")
    try:
        for _ in range(config.tool_rounds):
            calls = conversation.calls_in(_stream(conversation, console, config.show_speed))
            if not calls:
                return
            for call, result in zip(calls, conversation.use_tools(calls), strict=True):
                console.print(f"{call.name or 'call'} -> {result.text}", style="dim", soft_wrap=True)
        if conversation.calls_in(_stream(conversation, console, config.show_speed)):
            console.print(f"(not carried out: tool_rounds is {config.tool_rounds})", style="dim")
    except KeyboardInterrupt:
        console.print("(stopped)", style="dim")
    except UserError as error:
        conversation.forget_question()
        console.print(str(error), style="red")


def _stream(conversation: Dialogue, console: Console, show_speed: bool) -> str:
    """Streams an answer to the messages, thinking dim, and ends it early at Ctrl-C; the answer, if it is whole."""
    splitter, said = AnswerSplitter(conversation.opens_thinking()), []
    clock, note = Clock(), ""
    try:
        for piece in conversation.answer():
            clock.count(len(piece.tokens))
            _show(splitter.push(piece.text), said, console)
            if piece.answer.finish_reason == "length":
                note = " (cut off: max_new_tokens or the context is used up)"
    except KeyboardInterrupt:
        note = " (stopped)"
    _show(splitter.finish(), said, console)
    answer = "".join(part.content for part in said)
    conversation.keep(answer, "".join(part.reasoning for part in said))
    if conversation.pictures:
        note += f" (nothing was said; the next question shows its pictures: {len(conversation.pictures)})"
    console.print()
    if show_speed or note:
        console.print(f"{clock if show_speed else ''}{note}".strip(), style="dim", soft_wrap=True)
    return "" if note else answer


def _show(parts: list[Part], said: list[Part], console: Console) -> None:
    """Shows what is said next, a line below the thinking before it."""
    for part in parts:
        if part.content and said and said[-1].reasoning:
            console.print("\n")
        said.append(part)
        style = "dim italic" if part.reasoning else None
        console.print(part.reasoning or part.content, end="", style=style, soft_wrap=True)


class Clock:
    """Speed of an answer; the first token, which waits for the prompt to be read, is timed apart."""

    def __init__(self):
        self._start = self._first = self._last = time.perf_counter()
        self._tokens = self._early = 0  # all, and those that came at once with the first

    def count(self, tokens: int) -> None:
        if tokens:
            self._last = time.perf_counter()
            if not self._tokens:
                self._first, self._early = self._last, tokens
            self._tokens += tokens

    def __str__(self) -> str:
        first = f"first after {self._first - self._start:.2f} s"
        if self._last == self._first:
            return f"[{self._tokens} tokens, {first}]"
        speed = (self._tokens - self._early) / (self._last - self._first)
        return f"[{self._tokens} tokens, {speed:.1f} tokens/s, {first}]"

"""Conversations as text: our chat template, which words of it are trained, and foreign templates.

`chat_template.jinja` is what exported models carry. `render_segments` has it write marks where messages begin and end,
so that the trained spans never come from searching token ids, where text that looks like a header or a token that runs
across a boundary hides or invents spans.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np

from minimind_jax.data.messages import ROLES, Conversation, Message, without_marks
from minimind_jax.errors import TemplateFault, UserError, explained
from minimind_jax.seeds import named_seed

TEMPLATE_FILE = Path(__file__).with_name("chat_template.jinja")
CHAT_TEMPLATE = TEMPLATE_FILE.read_text(encoding="utf-8").rstrip("\n")
_IMAGES = TEMPLATE_FILE.with_name("images_in_chat.jinja").read_text(encoding="utf-8")
_IMAGES_END = "{#- So much for images. #}"

# Ours with marks where an answer begins and ends. No text of whole characters holds one.
_MARK = "\udfff\ud800"
_MARKED = CHAT_TEMPLATE.replace(r"assistant\n<think>\n' + reasoning", r"assistant\n' + mark + '<think>\n' + reasoning")
_MARKED = _MARKED.replace("\n        {{- '<|im_end|>\\n' }}", "\n        {{- '<|im_end|>\\n' + mark }}")

OPENED_THINK, EMPTY_THINK = "<think>\n", "<think>\n\n</think>\n\n"  # what a generation prompt ends in

SYSTEM_PROMPTS = (
    "你是一个乐于助人的中文助手，回答要准确、简洁。",
    "请认真阅读用户的问题，并给出清楚的回答。",
    "你是一个小型语言模型，会尽自己所能帮助用户。",
    "你是一位耐心的助手，不确定时请如实说明。",
    "请用友好、自然的语气与用户交流。",
    "You are a helpful assistant. Answer accurately and briefly.",
    "Read the question with care and give a clear answer.",
    "You are a small language model that helps as well as it can.",
    "You are a patient assistant. Say so when you are not sure.",
    "Talk with the user in a friendly, natural way.",
)


@dataclasses.dataclass(frozen=True)
class Segment:
    """A piece of a rendered conversation that is tokenised by itself."""

    text: str
    trained: bool  # the model learns to write this piece
    turn: int  # counts from 0; a turn ends after the assistant has spoken


def render(messages: Sequence[Message], *how: Any, **more: Any) -> str:
    """The conversation as our template writes it, of which `render_segments` makes the pieces."""
    return "".join(segment.text for segment in render_segments(messages, *how, **more))


def render_segments(
    messages: Sequence[Message],
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
    open_thinking: bool | None = None,
    keep_empty_think: bool = True,
) -> list[Segment]:
    """The conversation in pieces whose texts join to what `chat_template.jinja` renders.

    Trained is everything after an assistant header up to and including <|im_end|> and the newline, but of messages with
    `train` False. Pieces end wherever a prompt ends at inference (after the header, after "<think>\\n", after an empty
    think block), so that tokenising each by itself gives the model in training the very tokens it sees in use.
    open_thinking: whether the generation prompt opens a think block; else the block is empty.
    keep_empty_think: False leaves out the empty think blocks of the assistant's messages.
    Raises UserError for an unknown role.
    """
    variables = {"add_generation_prompt": add_generation_prompt, "open_thinking": open_thinking, "mark": _MARK}
    pending, *pieces = render_jinja(_MARKED, messages, tools, **variables).split(_MARK)
    segments: list[Segment] = []
    turn = 0
    for index, message in enumerate(messages):
        if message["role"] not in ROLES:
            raise UserError(f"messages[{index}]: unknown role {message['role']!r}; expected one of {', '.join(ROLES)}")
        if message["role"] == "assistant":
            segments.append(Segment(pending, False, turn))
            answer, pending, *pieces = pieces
            opening = EMPTY_THINK if answer.startswith(EMPTY_THINK) else OPENED_THINK
            parts = [opening] * (keep_empty_think or opening == OPENED_THINK) + [answer.removeprefix(opening)]
            segments += [Segment(text, message.get("train", True), turn) for text in parts]
        elif index and messages[index - 1]["role"] == "assistant":
            turn += 1
    return [*segments, Segment(pending, False, turn)] if pending else segments


def text_of(message: Message) -> str:
    """The words of a content, which may be a list of parts."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    parts = [part if isinstance(part, str) else part.get("text") for part in content]
    return "".join(part for part in parts if isinstance(part, str))


# Of a conversation it makes what the template writes, and whether its empty think blocks stay.
Roll = Callable[[Conversation], tuple[Conversation, bool]]


def unchanged(conversation: Conversation) -> tuple[Conversation, bool]:
    """The `Roll` of a record for which nothing is drawn."""
    return conversation, True


@dataclasses.dataclass(frozen=True)
class Dice:
    """MiniMind's two random changes, drawn for each record from (seed, epoch, number of the record).

    With system_prompt_probability a conversation without tools and system message gets one of SYSTEM_PROMPTS; with
    empty_think_removal all its empty think blocks go.
    """

    seed: int
    epoch: int
    system_prompt_probability: float
    empty_think_removal: float

    def roll(self, record_index: int) -> Roll:
        """What is drawn for a record; all its conversations get the same draws. There are three whatever they hold, so
        one setting does not move the other's."""
        rng = np.random.default_rng(named_seed(self.seed, "dice", record_index, self.epoch))
        adds_prompt, choice, removes_think = rng.random(3)

        def changed(conversation: Conversation) -> tuple[Conversation, bool]:
            is_bare = not conversation.tools and conversation.messages[0]["role"] != "system"
            if is_bare and adds_prompt < self.system_prompt_probability:
                prompt = {"role": "system", "content": SYSTEM_PROMPTS[int(choice * len(SYSTEM_PROMPTS))]}
                conversation = dataclasses.replace(conversation, messages=[prompt, *conversation.messages])
            return conversation, not removes_think < self.empty_think_removal

        return changed


class _GenerationTag(jinja2.ext.Extension):
    """transformers' {% generation %} block, which marks and does not change the text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    """As transformers compiles chat templates: sandboxed, block lines leave no white space, JSON keeps Unicode."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def render_jinja(source: str, messages: Sequence[Message], tools: Sequence[Any] | None = None, **variables: Any) -> str:
    """A conversation through any Jinja chat template. Raises UserError with what the template complains about."""
    with explained("the chat template cannot render these messages", Exception):  # it is a program
        return _compile(source).render(messages=messages, tools=tools, **{"add_generation_prompt": False, **variables})


def template_with_images(source: str, marker: str) -> str:
    """A template as models that see carry it, whatever it makes of lists of parts itself: an image among them is one
    `marker`, of which processors make as many as the image has tokens."""
    return _IMAGES.replace("MARKER", json.dumps(marker)) + _IMAGES_END + template_without_images(source)


def template_without_images(source: str) -> str:
    """What `template_with_images` was given; another template as it is."""
    return source.partition(_IMAGES_END)[2] or source


def renders_as_ours(source: str) -> bool:
    """Whether a template writes a set of probing conversations exactly as ours does (MiniMind's own does)."""
    try:
        return all(
            render_jinja(source, messages, tools, add_generation_prompt=prompt, open_thinking=thinking)
            == render(messages, tools, prompt, thinking)
            for messages, tools in _PROBES
            for prompt, thinking in ((False, False), (True, False), (True, True))
        )
    except UserError:
        return False


_PROBE_TALK = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "x", "reasoning_content": "r", "tool_calls": [{"name": "f", "arguments": {}}]},
    {"role": "tool", "content": "1"},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "<think>\nt\n</think>\n\ny"},
    {"role": "system", "content": "later"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "\n\nz\n"},
]
_PROBES: tuple[tuple[list[Message], list[Any] | None], ...] = (
    (_PROBE_TALK, None),
    (_PROBE_TALK, [{"type": "function", "function": {"name": "f", "description": "中"}}]),
    (_PROBE_TALK[1:], [{"name": "f"}]),
    (_PROBE_TALK[1:], None),
)


def rendering_fingerprint() -> str:
    """Changes with what this module makes of a conversation: texts, trained pieces, turns, system prompts and draws."""
    segments = [
        render_segments(messages, tools, keep_empty_think=keep) for messages, tools in _PROBES for keep in (True, False)
    ]
    segments.append(prefix_segments(CHAT_TEMPLATE, _PROBE_TALK[-3:], None, {}))
    drawn = [Dice(0, 0, 0.5, 0.5).roll(record)(Conversation(_PROBE_TALK[1:])) for record in range(16)]
    made = [
        [[dataclasses.astuple(segment) for segment in pieces] for pieces in segments],
        [(conversation.messages[0], keeps_think) for conversation, keeps_think in drawn],
        SYSTEM_PROMPTS,
    ]
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16]


def prefix_segments(
    source: str, messages: Sequence[Message], tools: Sequence[Any] | None, variables: Mapping[str, Any]
) -> list[Segment]:
    """Segments of a conversation under another model's template, by rendering it message by message.

    Trained is what an assistant message adds to the rendering of the messages before it with a generation prompt.
    Raises TemplateFault if the template writes earlier messages differently once more follow (not prefix-consistent),
    for then there is no text of which one part is the prompt and the other the answer.
    """
    shown = without_marks(messages)
    whole = render_jinja(source, shown, tools, **variables)
    spans: list[tuple[int, int, int]] = []
    for index, message in enumerate(shown):
        if message["role"] != "assistant":
            continue
        prompt = render_jinja(source, shown[:index], tools, **{**variables, "add_generation_prompt": True})
        answered = render_jinja(source, shown[: index + 1], tools, **variables)
        done = spans[-1][2] if spans else 0
        if not (answered.startswith(prompt) and whole.startswith(answered) and done <= len(prompt)):
            raise TemplateFault(
                "the model's chat template is not prefix-consistent: it writes the conversation up to message "
                f"{index + 1} of {len(messages)} differently when more follows, so its answers cannot be told from its "
                f"prompts. Copy {TEMPLATE_FILE} into the model's folder as chat_template.jinja to train with ours"
            )
        spans.append((index, len(prompt), len(answered)))
    return segments_of_spans(whole, messages, spans)


def segments_of_spans(whole: str, messages: Sequence[Message], spans: Sequence[tuple[int, int, int]]) -> list[Segment]:
    """The segments of a rendering, of which spans (message, start, end) are the assistant's."""
    segments: list[Segment] = []
    done, turn = 0, 0
    for index, start, end in spans:
        if start > done:
            turn += index > 0 and messages[index - 1]["role"] != "assistant" and bool(segments)
            segments.append(Segment(whole[done:start], False, turn))
        segments.append(Segment(whole[start:end], messages[index].get("train", True), turn))
        done = end
    if done < len(whole):
        follows = bool(messages) and messages[-1]["role"] != "assistant" and bool(segments)
        segments.append(Segment(whole[done:], False, turn + follows))
    return segments

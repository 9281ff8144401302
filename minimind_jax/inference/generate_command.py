"""`minimind generate`: answers to prompts on the command line, or to every record of a file."""

import dataclasses
import json
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minimind_jax.config.generation import GenerateConfig
from minimind_jax.convert.load import folders_of
from minimind_jax.data import pictures
from minimind_jax.data.documents import begun, encode_prompt
from minimind_jax.data.images import Picture, open_picture
from minimind_jax.data.jsonl import Record, expand_paths, iter_records, tell
from minimind_jax.data.messages import Conversation
from minimind_jax.data.prompts import own_thinking, read_prompt, shortened
from minimind_jax.data.written import check_output, json_line
from minimind_jax.errors import UserError
from minimind_jax.folders import resolve_model_folder
from minimind_jax.inference.answer_file import AGAIN, AnswerFile, what_makes
from minimind_jax.inference.constrain import Grammars
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.grammar import choice, json_schema, regex
from minimind_jax.inference.image_encoder import BLIND
from minimind_jax.inference.load import load_engine
from minimind_jax.inference.request import Answer, Constraint, Request
from minimind_jax.inference.splitter import parted
from minimind_jax.progress import first_awaited, progress
from minimind_jax.texts import read_object

NAMED = 20  # prompts that are too long, in a message


class Prompt(NamedTuple):
    """A prompt: where it came from (for error messages), its record, the conversation to be answered (None for raw
    text), its token ids, the fields of the record beside it, and whether the prompt ends in an open think block.
    with_images: the conversation with its pictures, of a model that sees. tell: hears what of these is not seen."""

    where: str
    record: dict[str, Any]
    conversation: Conversation | None
    ids: list[int]
    others: dict[str, Any]
    opens_thinking: bool = False
    with_images: pictures.ImageConversation | None = None
    tell: Callable[[str], None] = print


class TooLong(UserError):
    """A prompt that leaves no room for its answer."""


def run(config: GenerateConfig) -> None:
    """Answers the prompts or the records, as `config` says.

    Raises UserError: no such model or file, a record without a prompt, or a prompt that does not fit the model. Records
    that were answered before it stay in OUTPUT.partial, and the same command goes on behind them.
    """
    if config.output:
        complete = f" and is complete; choose another name; {AGAIN}" if config.resume == "auto" else None
        check_output(Path(config.output), expand_paths(config.input), complete=complete)
    folder = resolve_model_folder(config.model)
    engine = load_engine(str(folder), config.dtype, slots=config.batch_size)
    if config.input and config.long_prompts == "stop":
        _check_lengths(engine, config)
    if config.prompt:
        _print_answers(engine, config)
    elif config.output:
        _write_answers(engine, config, folder)
    else:
        _print_records(engine, config)


def _print_answers(engine: Engine, config: GenerateConfig) -> None:
    """Streams a single answer; several are made together and printed under their prompts."""
    names = ["--prompt"] if len(config.prompt) == 1 else [f"--prompt {n + 1}" for n in range(len(config.prompt))]
    told = Counter()
    requests = [
        _request(engine, config, Record(name, Path("--image"), line, _with_images(text, config.image), told))
        for line, (name, text) in enumerate(zip(names, config.prompt, strict=True), 1)
    ]
    if len(requests) == 1:
        sampling = config.resolve(engine.sampling)
        count = min(sampling.max_new_tokens, engine.room(len(requests[0].ids)))
        bound, images = binder(engine, config)(requests[0], count), _open(engine, requests[0])
        own = dataclasses.replace(sampling, max_new_tokens=count)
        answer = engine.stream(requests[0].ids, own, constraint=bound, images=images)
        for piece in first_awaited(answer, "compiling"):
            print(piece.text, end="", flush=True)
        print()
        return tell(told)
    answered = first_awaited(answer_requests(engine, config, iter(requests)), "answering")
    for text, (_, answer) in zip(config.prompt, answered, strict=True):
        print(f"> {text}\n{answer.text}\n")
    tell(told)


def _with_images(text: str, images: Sequence[str]) -> dict[str, Any]:
    """The record of a prompt that shows pictures where it says so, or in front."""
    if not images:
        return {"prompt": text}
    places = "" if pictures.PLACE in text else f"{pictures.PLACE}\n" * len(images)
    return {"prompt": places + text, "images": list(images)}


def _write_answers(engine: Engine, config: GenerateConfig, folder: Path) -> None:
    """Answers the records into `config.output`, from where an earlier call was cut off."""
    settings = what_makes(config, folders_of(folder))
    found, changed = Counter(), Counter()
    with AnswerFile(Path(config.output), settings, config.resume == "auto") as file:
        requests = _requests(engine, config, changed)
        for number, earlier in enumerate(file.earlier, 1):
            request = next(requests, None)
            if request is None or _question(config, earlier) != _question(config, _result(config, request)):
                asked = f"does not answer {request.where}" if request else "answers a record that is gone"
                raise UserError(
                    f"{config.output}.partial:{number} {asked}: the input has changed; put it back to go on; {AGAIN}"
                )
            _count(found, earlier)
        if file.earlier:
            print(f"going on behind {len(file.earlier)} records of {config.output}.partial")
        done = len(file.earlier)
        for request, answer in _shown(config, answer_requests(engine, config, requests, done), done):
            result = _result(config, request, answer.text, answer.finish_reason)
            file.write(result)
            _count(found, result)
        file.finish()
    notes = [f"{found['records']} records written to {config.output}"]
    notes += [f"{found['cut off']} answers were cut off (finish_reason length)"] if found["cut off"] else []
    notes += [f"{found['empty']} are empty (in training: --data.on_error skip)"] if found["empty"] else []
    print("; ".join([*notes, *_changes(changed)]))


def _count(found: Counter, result: dict[str, Any]) -> None:
    reply = result["conversations"][-1] if "completion" not in result else {"content": result["completion"].strip()}
    found["records"] += 1
    found["cut off"] += result["finish_reason"] == "length"
    found["empty"] += not (reply["content"] or reply.get("reasoning_content"))


def _print_records(engine: Engine, config: GenerateConfig) -> None:
    changed: Counter = Counter()
    for request, answer in _shown(config, answer_requests(engine, config, _requests(engine, config, changed))):
        print(json_line(_result(config, request, answer.text, answer.finish_reason)), flush=True)
    for note in _changes(changed):
        print(note, file=sys.stderr)


def _shown(
    config: GenerateConfig, answers: Iterator[tuple[Prompt, Answer]], done: int = 0
) -> Iterator[tuple[Prompt, Answer]]:
    """The answers, and how many records have one, unless that is seen on the terminal anyway; `done` had one before."""
    show = bool(config.output) or not sys.stdout.isatty()
    total = sum(1 for _ in iter_records(config.input, lambda error: None, config)) if show else None
    with progress("answering", total, show=show) as advance:
        advance(done)
        for answered in answers:
            yield answered
            advance(1)


def _requests(engine: Engine, config: GenerateConfig, changed: Counter) -> Iterator[Prompt]:
    """The prompts in order; changed: counts of those that were skipped or cut, for being too long."""
    told: Counter = Counter()
    for record in iter_records(config.input, reading=config, told=told):
        try:
            yield _request(engine, config, record)
        except TooLong:
            if config.long_prompts == "stop":
                raise
            changed[config.long_prompts] += 1
            if config.long_prompts == "cut":
                yield _request(engine, config, record, cut=True)
    tell(told)


def _check_lengths(engine: Engine, config: GenerateConfig) -> None:
    """Raises UserError, before anything is generated, that names all prompts which are too long."""
    found: list[str] = []
    for record in iter_records(config.input, lambda error: None, config):
        try:
            _request(engine, config, record)
        except TooLong as error:
            found.append(str(error))
        except UserError:  # is told when it is its turn; what comes before it is answered
            continue
    if found:
        more = f"\nand {len(found) - NAMED:,} more" if len(found) > NAMED else ""
        raise UserError(
            "\n".join(found[:NAMED]) + f"{more}\nor leave such prompts out with --long_prompts skip, or take their end "
            "with --long_prompts cut"
        )


def _changes(changed: Counter) -> list[str]:
    words = {"skip": "too long and left out", "cut": "too long and cut to their end"}
    return [f"{count:,} prompts were {words[how]}" for how, count in changed.items()]


def _result(config: GenerateConfig, request: Prompt, text: str = "", reason: str = "") -> dict[str, Any]:
    """The line that is written: the record with its answer, or as a conversation that ends with it."""
    if not config.as_conversations:
        return {**pictures.without_bytes(request.record), "completion": text, "finish_reason": reason}
    said = parted(text, request.opens_thinking)
    reply = {"role": "assistant", "content": said.content.strip()}
    if said.reasoning.strip():
        reply["reasoning_content"] = said.reasoning.strip()
    asked = request.conversation
    told = dataclasses.replace(asked, messages=[*asked.messages, reply])
    told = told if request.with_images is None else dataclasses.replace(request.with_images, conversation=told)
    return {**request.others, **told.as_record(), "finish_reason": reason}


def _question(config: GenerateConfig, result: dict[str, Any]) -> Any:
    """A result without its answer, as it is read back."""
    result = {name: value for name, value in result.items() if name not in ("completion", "finish_reason")}
    if config.as_conversations:
        result["conversations"] = result.get("conversations", [])[:-1]
    return json.loads(json_line(result))


def answer_requests(
    engine: Engine, config: GenerateConfig, prompts: Iterator[Prompt], done: int = 0
) -> Iterator[tuple[Prompt, Answer]]:
    """Each prompt with its answer, in order, behind `done` others. How many are answered at a time changes nothing."""
    sampling, bind, begun = config.resolve(engine.sampling), binder(engine, config), deque()

    def requests() -> Iterator[Request]:
        for number, prompt in enumerate(prompts, done):
            begun.append(prompt)
            count = min(sampling.max_new_tokens, engine.room(len(prompt.ids)))
            own = dataclasses.replace(sampling, max_new_tokens=count, seed=config.seed + number)
            yield Request(tuple(prompt.ids), own, constraint=bind(prompt, count), images=_open(engine, prompt))

    for answer in engine.answers(requests()):
        yield begun.popleft(), answer


def _open(engine: Engine, prompt: Prompt) -> tuple[Picture, ...]:
    """The pictures of a prompt. Raises UserError for one that cannot be read."""
    if prompt.with_images is None:
        return ()
    tower, files = engine.model.config.vision.tower, pictures.named(prompt.where, prompt.with_images.pictures)
    return tuple(open_picture(file, tower, where, prompt.tell) for where, file in files)


def binder(engine: Engine, config: GenerateConfig) -> Callable[[Prompt, int], Constraint | None]:
    """What binds the answer to a prompt, of so many tokens at most, to the form that is asked for.

    Raises UserError for a form that cannot be followed.
    """
    if config.schema:
        form, where = json_schema(read_object(Path(config.schema), "give a file with a JSON schema")), config.schema
    elif config.regex:
        form, where = regex(config.regex), "regex"
    elif config.choices:
        form, where = choice(config.choices), "choices"
    else:
        return lambda prompt, limit: None
    grammars = Grammars(engine.tokenizer, engine.model.config.vocab_size, engine.eos_ids)

    def bind(prompt: Prompt, limit: int) -> Constraint:
        may_think = "open" if prompt.opens_thinking else "may" if config.thinking and not config.raw else "no"
        return grammars.constraint(form, limit, may_think, where)

    return bind


def _request(engine: Engine, config: GenerateConfig, record: Record, cut: bool = False) -> Prompt:
    """The prompt of a record. cut: to what fits. Raises UserError; TooLong where there is no room for the answer."""
    try:
        request = _prompt(engine, config, record)
        request = request._replace(ids=engine.encode(request.ids))
    except UserError as error:
        raise error if record.where in str(error) else UserError(f"{record.where}: {error}") from error
    if cut:
        request = _cut(engine, config, request)
    ids, with_images = request.ids, request.with_images
    size = f"{len(ids)} tokens"
    if with_images and with_images.pictures:
        count = len(with_images.pictures)
        size += f" ({count * with_images.marker.tokens} of them for {count} pictures)"
    room, context = engine.room(len(ids)), engine.room(0)
    if room < 1:
        raise TooLong(
            f"{record.where}: a prompt of {size} leaves no room for an answer in the model's context of "
            f"{context}; shorten it"
        )
    if config.max_new_tokens is not None and config.max_new_tokens > room:
        raise TooLong(
            f"{record.where}: a prompt of {size} leaves {room} in the model's context of {context}, fewer "
            f"than max_new_tokens {config.max_new_tokens}; shorten it, or ask for fewer"
        )
    return request


def _cut(engine: Engine, config: GenerateConfig, request: Prompt) -> Prompt:
    """The end of a prompt that leaves room for its answer: max_new_tokens, or half of the context."""
    context, tokenizer = engine.room(0), engine.tokenizer
    room = max(1, context - (config.max_new_tokens or min(512, context // 2)))
    if request.conversation is None:
        begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return request._replace(ids=[*begin, *request.ids[len(begin) :][len(begin) - room :]])
    asked = request.conversation

    def encode(messages: list[dict[str, Any]]) -> list[int]:
        return encode_prompt(tokenizer, messages, asked.tools, _thinking(config, asked, request))

    messages = shortened(asked.messages, lambda messages: len(encode(messages)), room, tokenizer)
    if messages is None:  # its system prompt and tools alone are too long
        return request
    with_images, asked = request.with_images, dataclasses.replace(asked, messages=messages)
    if with_images and with_images.pictures:
        if messages[-1] not in request.conversation.messages:  # its question would lose pictures
            return request
        markers = sum(message["content"].count(with_images.marker.text) for message in messages)
        first = len(with_images.pictures) - markers // with_images.marker.tokens
        with_images = dataclasses.replace(with_images, pictures=with_images.pictures[first:])
    return request._replace(conversation=asked, ids=encode(messages), with_images=with_images)


def _thinking(config: GenerateConfig, asked: Conversation, source: Record | Prompt) -> bool:
    """Whether the answer may think, as the record says, or the settings. Raises UserError for other variables."""
    own = own_thinking(asked, source.where)
    return config.thinking if own is None else own


def _prompt(engine: Engine, config: GenerateConfig, record: Record) -> Prompt:
    """The conversation to be answered (None for raw text) and the prompt's token ids."""
    tokenizer, marker = engine.tokenizer, pictures.marker_of(engine.tokenizer, engine.model.config.vision)
    words, files = record, ()
    if pictures.has_pictures(record.value, config):
        if marker is None or config.raw:
            why = BLIND if marker is None else "raw continues text alone"
            raise UserError(f"{record.where}: it shows pictures, and {why}; or list their field in ignore_fields")
        words, files = pictures.take_pictures(record, config)
    text, conversation, others = read_prompt(words, config, config.raw)
    for name in others if marker else ():
        if pictures.names_picture(others[name]):
            way_out = "call the field `image`, or list it in ignore_fields"
            record.tell(f"the picture in `{name}` is not looked at; {way_out}")
    if config.raw:
        if conversation is not None:
            raise UserError(f"{record.where}: a conversation needs the chat template; drop raw")
        ids = begun(tokenizer, tokenizer.encode(text))
        return Prompt(record.where, record.value, None, ids, others)
    if conversation is None:
        system = [{"role": "system", "content": config.system}] if config.system else []
        conversation = Conversation([*system, {"role": "user", "content": text}])
    with_images = None
    if marker is not None:
        with_images = pictures.place_pictures(record, conversation, files, marker)
        conversation = with_images.conversation
    asked = (conversation.messages, conversation.tools, _thinking(config, conversation, record))
    ids, opens_thinking = encode_prompt(tokenizer, *asked), tokenizer.prompt_opens_thinking(*asked)
    return Prompt(record.where, record.value, conversation, ids, others, opens_thinking, with_images, record.tell)

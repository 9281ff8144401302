"""`minimind generate`: answers to prompts on the command line, or to every record of a file."""

import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from minimind_jax.data.documents import encode_prompt
from minimind_jax.data.jsonl import Record, iter_records
from minimind_jax.data.records import parse_conversation
from minimind_jax.errors import UserError
from minimind_jax.inference.config import GenerateConfig
from minimind_jax.inference.generate import Completion, Generator, load_generator


class Request(NamedTuple):
    """A prompt: where it came from (for messages), its record, and its token ids."""

    where: str
    record: dict[str, Any]
    ids: list[int]


def run(config: GenerateConfig) -> None:
    """Answers the prompts or the records, as `config` says.

    Raises:
        UserError: no such model or file, a record without a prompt, or a prompt that does not fit the model. Records
            that were answered before it stay in OUTPUT.partial.
    """
    if config.output:
        _check_writable(Path(config.output))
    generator = load_generator(config.model, config.dtype)
    if config.prompt:
        _print_answers(generator, config)
    elif config.output:
        count = _write_answers(generator, config)
        print(f"{count} records written to {config.output}")
    else:
        _answer_records(generator, config, sys.stdout)


def _print_answers(generator: Generator, config: GenerateConfig) -> None:
    """Streams a single answer; several are made together and printed under their prompts."""
    names = ["--prompt"] if len(config.prompt) == 1 else [f"--prompt {n + 1}" for n in range(len(config.prompt))]
    requests = [
        _request(generator, config, Record(name, Path(), line, {"prompt": text}))
        for line, (name, text) in enumerate(zip(names, config.prompt, strict=True), 1)
    ]
    if len(requests) == 1:
        sampling = config.resolve(generator.sampling)
        count = min(sampling.max_new_tokens, generator.room(len(requests[0].ids)))
        for piece in generator.stream(requests[0].ids, dataclasses.replace(sampling, max_new_tokens=count)):
            print(piece.text, end="", flush=True)
        print()
        return
    for request, answer in answer_requests(generator, config, iter(requests)):
        print(f"> {request.record['prompt']}\n{answer.text}\n")


def _check_writable(output: Path) -> None:
    """Raises UserError, before any work, for an output that could not be written at its end."""
    if not output.parent.is_dir():
        raise UserError(f"output {output}: there is no folder {output.parent}; create it first")
    if output.is_dir():
        raise UserError(f"output {output} is a folder; give the name of a file")
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"output {output}: nothing can be written into {output.parent}; choose another place")


def _write_answers(generator: Generator, config: GenerateConfig) -> int:
    output = Path(config.output)
    partial = output.with_name(output.name + ".partial")
    try:
        file = partial.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"output {output}: cannot write {partial}: {error.strerror}; choose another place") from error
    with file:
        count = _answer_records(generator, config, file)
    os.replace(partial, output)
    return count


def _answer_records(generator: Generator, config: GenerateConfig, file: TextIO) -> int:
    requests = (_request(generator, config, record) for record in iter_records(config.input))
    count = 0
    for request, answer in answer_requests(generator, config, requests):
        record = {**request.record, "completion": answer.text, "finish_reason": answer.finish_reason}
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        count += 1
    return count


def answer_requests(
    generator: Generator, config: GenerateConfig, requests: Iterator[Request]
) -> Iterator[tuple[Request, Completion]]:
    """Each request with its answer, in order. The batch size does not change the answers.

    Only neighbours that may get as many new tokens are answered at the same time: all but very long prompts.
    """
    done, sampling = 0, config.resolve(generator.sampling)

    def count(request: Request) -> int:
        return min(sampling.max_new_tokens, generator.room(len(request.ids)))

    while batch := list(itertools.islice(requests, config.batch_size)):
        for max_new_tokens, group in itertools.groupby(batch, count):
            group = list(group)
            own = dataclasses.replace(sampling, max_new_tokens=max_new_tokens, seed=config.seed + done)
            yield from zip(group, generator.generate([request.ids for request in group], own), strict=True)
            done += len(group)


def _request(generator: Generator, config: GenerateConfig, record: Record) -> Request:
    try:
        ids = generator.encode(_prompt_ids(generator, config, record))
    except UserError as error:
        raise error if record.where in str(error) else UserError(f"{record.where}: {error}") from error
    room, context = generator.room(len(ids)), generator.room(0)
    if room < 1:
        raise UserError(
            f"{record.where}: a prompt of {len(ids)} tokens leaves no room for an answer in the model's context of "
            f"{context}; shorten it"
        )
    if config.max_new_tokens is not None and config.max_new_tokens > room:
        raise UserError(
            f"{record.where}: a prompt of {len(ids)} tokens leaves {room} in the model's context of {context}, fewer "
            f"than max_new_tokens {config.max_new_tokens}; shorten it, or ask for fewer"
        )
    return Request(record.where, record.value, ids)


def _prompt_ids(generator: Generator, config: GenerateConfig, record: Record) -> list[int]:
    tokenizer = generator.tokenizer
    if "conversations" in record.value:
        if config.raw:
            raise UserError(f"{record.where}: a conversation needs the chat template; drop raw")
        conversation = parse_conversation(record, for_training=False)
        messages = conversation.messages
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise UserError(f"{record.where}: the conversation is only an assistant's message; expected a question")
        return encode_prompt(tokenizer, messages, conversation.tools, open_thinking=config.thinking)
    text = next((record.value[name] for name in ("prompt", "text") if name in record.value), None)
    if not isinstance(text, str):
        raise UserError(f"{record.where}: expected a field `prompt` or `text` (a string), or `conversations`")
    if config.raw:
        return ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(text)
    system = [{"role": "system", "content": config.system}] if config.system else []
    return encode_prompt(tokenizer, [*system, {"role": "user", "content": text}], open_thinking=config.thinking)

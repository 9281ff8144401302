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
    requests = [
        _request(generator, config, Record("--prompt", Path(), line, {"prompt": text}))
        for line, text in enumerate(config.prompt, 1)
    ]
    if len(requests) == 1:
        for piece in generator.stream(requests[0].ids, config.resolve(generator.sampling)):
            print(piece.text, end="", flush=True)
        print()
        return
    for request, answer in answer_requests(generator, config, iter(requests)):
        print(f"> {request.record['prompt']}\n{answer.text}\n")


def _write_answers(generator: Generator, config: GenerateConfig) -> int:
    output = Path(config.output)
    if not output.parent.is_dir():
        raise UserError(f"output {output}: there is no folder {output.parent}; create it first")
    partial = output.with_name(output.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
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
    """Each request with its answer, in order. The batch size does not change the answers."""
    done, sampling = 0, config.resolve(generator.sampling)
    while batch := list(itertools.islice(requests, config.batch_size)):
        seeded = dataclasses.replace(sampling, seed=config.seed + done)
        yield from zip(batch, generator.generate([request.ids for request in batch], seeded), strict=True)
        done += len(batch)


def _request(generator: Generator, config: GenerateConfig, record: Record) -> Request:
    try:
        ids = generator.encode(_prompt_ids(generator, config, record))
    except UserError as error:
        raise error if record.where in str(error) else UserError(f"{record.where}: {error}") from error
    if config.max_new_tokens > generator.room(len(ids)):
        raise UserError(
            f"{record.where}: a prompt of {len(ids)} tokens leaves {generator.room(len(ids))} in the model's context "
            f"of {generator.room(0)}, fewer than max_new_tokens {config.max_new_tokens}; shorten it, or ask for fewer"
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

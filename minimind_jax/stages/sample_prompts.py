"""Prompts of a run's samples that come from its own data."""

import dataclasses

from minimind_jax.config.sections import SampleConfig
from minimind_jax.config.stages import PretrainConfig
from minimind_jax.data.jsonl import iter_records, reading_of
from minimind_jax.data.records import parse_conversation, parse_preference, parse_text
from minimind_jax.data.tokenise import Kind
from minimind_jax.errors import UserError

LONGEST = 200  # characters of a question
BEGINNING = 40  # characters of a text, of which the last word is left out
LOOKED_AT = 200  # records


def with_prompts(config: PretrainConfig, kind: Kind) -> SampleConfig:
    """`config.samples`, with the first questions or beginnings of texts of data.val or data.train where it has none."""
    samples, data, found = config.samples, config.data, {}
    if samples.prompts or not samples.from_data:
        return samples
    reading = reading_of(data)
    for number, record in enumerate(iter_records(data.val or data.train, lambda error: None)):
        if len(found) == samples.from_data or number == LOOKED_AT:
            break
        try:
            if kind == "text":
                text = parse_text(record, reading=reading)
                prompt = text[:BEGINNING].rsplit(maxsplit=1)[0] if len(text) > BEGINNING else text.split()[0]
            else:
                talk = parse_conversation(record, reading=reading) if kind == "conversation" else None
                talk = talk or parse_preference(record, reading=reading).chosen
                prompt = next((m["content"] for m in talk.messages if m["role"] == "user"), "")
        except UserError:  # told when all records are read
            continue
        if 0 < len(prompt.strip()) and len(prompt) <= LONGEST:
            found[prompt] = None
    return dataclasses.replace(samples, prompts=tuple(found))

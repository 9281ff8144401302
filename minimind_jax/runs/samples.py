"""A run's samples: the prompts, those of its own data too, and what the model writes on them."""

import dataclasses

from minimind_jax.config.sections import SampleConfig
from minimind_jax.config.stages import WriterConfig
from minimind_jax.data.documents import begun, encode_prompt
from minimind_jax.data.jsonl import iter_records, reading_of
from minimind_jax.data.records import parse_conversation, parse_preference, parse_text
from minimind_jax.data.tokenise import Kind
from minimind_jax.errors import UserError
from minimind_jax.inference.generate import Generator
from minimind_jax.inference.sampling import SamplingConfig
from minimind_jax.model.transformer import Params
from minimind_jax.runs.parts import Run, without_others
from minimind_jax.seeds import named_seed
from minimind_jax.training.loop import SampleFn

LONGEST = 200  # characters of a question
BEGINNING = 40  # characters of a text, of which the last word is left out
LOOKED_AT = 200  # records


def with_prompts(config: WriterConfig, kind: Kind) -> SampleConfig:
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


def sampler(run: Run) -> SampleFn | None:
    """Writes on from each of the run's prompts. None without any, and of a model that cannot write.

    Raises UserError for a prompt that is empty or too long, now and not when the model could not be exported for it.
    """
    if run.kind.has_head:
        return None
    samples, tokenizer, kind = with_prompts(run.config, run.kind.records), run.tokenizer, run.kind.records
    if not samples.prompts:
        return None

    def encode(prompt: str) -> list[int]:
        if kind == "text":
            return begun(tokenizer, tokenizer.encode(prompt))
        return encode_prompt(tokenizer, [{"role": "user", "content": prompt}])

    prompts = [list(encode(prompt)) for prompt in samples.prompts]
    context = run.model.config.max_position_embeddings
    for prompt, ids in zip(samples.prompts, prompts, strict=True):
        if not ids:
            raise UserError("samples.prompts: a prompt is empty, and the tokenizer has no token to begin a text with")
        if len(ids) + samples.max_new_tokens > context:
            raise UserError(
                f"samples.prompts: the {len(ids)} tokens of {prompt[:40]!r} and samples.max_new_tokens "
                f"{samples.max_new_tokens} exceed the model's context of {context} tokens; shorten the prompt or ask "
                "for fewer"
            )
    sampling = SamplingConfig(
        max_new_tokens=samples.max_new_tokens,
        temperature=samples.temperature,
        top_p=samples.top_p,
        seed=named_seed(run.config.seed, "samples") % 2**31,
    )

    def sample(params: Params) -> list[tuple[str, str]]:
        own = without_others(run, params)
        completions = Generator(run.model, own, tokenizer).generate(prompts, sampling)
        return [(prompt, done.text) for prompt, done in zip(samples.prompts, completions, strict=True)]

    return sample

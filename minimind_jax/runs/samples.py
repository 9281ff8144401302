"""A run's samples: the prompts, those of its own data too, and what the model writes on them."""

import dataclasses
import itertools

from minimind_jax.config.sections import SampleConfig
from minimind_jax.config.stages import WriterConfig
from minimind_jax.data.jsonl import iter_records, reading_of
from minimind_jax.data.kinds import KINDS, KindName, Wanted
from minimind_jax.errors import UserError
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.sampling import SamplingConfig
from minimind_jax.model.transformer import Params
from minimind_jax.runs.parts import Run, without_others
from minimind_jax.seeds import named_seed
from minimind_jax.training.loop import SampleFn

LONGEST = 200  # characters of a question
LOOKED_AT = 200  # records


def with_prompts(config: WriterConfig, kind: KindName) -> SampleConfig:
    """`config.samples`, with the first questions or beginnings of texts of data.val or data.train where it has none."""
    samples, data, found = config.samples, config.data, {}
    if samples.prompts or not samples.from_data:
        return samples
    wanted, records = Wanted(reading_of(data)), iter_records(data.val or data.train, lambda error: None)
    for record in itertools.islice(records, LOOKED_AT):
        try:
            prompt = KINDS[kind].question(KINDS[kind].parse(record, wanted))
        except UserError:  # told when all records are read
            continue
        if prompt.strip() and len(prompt) <= LONGEST:
            found[prompt] = None
        if len(found) == samples.from_data:
            break
    return dataclasses.replace(samples, prompts=tuple(found))


def sampler(run: Run) -> SampleFn | None:
    """Writes on from each of the run's prompts. None without any, and of a stage that has none. Raises UserError for a
    prompt that is empty or too long, now and not when the model could not be exported for it."""
    is_writer = isinstance(run.config, WriterConfig)
    samples = with_prompts(run.config, run.kind.records) if is_writer else None
    if not samples or not samples.prompts:
        return None
    prompts = [KINDS[run.kind.records].prompt(run.tokenizer, prompt) for prompt in samples.prompts]
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
    seed = named_seed(run.config.seed, "samples") % 2**31
    sampling = SamplingConfig(
        max_new_tokens=samples.max_new_tokens, temperature=samples.temperature, top_p=samples.top_p, seed=seed
    )

    def sample(params: Params) -> list[tuple[str, str]]:
        engine = Engine(run.model, without_others(run, params), run.tokenizer)
        answers = engine.generate(prompts, sampling)
        return [(prompt, answer.text) for prompt, answer in zip(samples.prompts, answers, strict=True)]

    return sample

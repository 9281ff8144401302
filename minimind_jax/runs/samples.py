"""A run's samples: the prompts, those of its own data too, and what the model writes on them."""

import itertools
from pathlib import Path
from typing import NamedTuple

from minimind_jax.config.stages import SeeingConfig, WriterConfig
from minimind_jax.data.images import open_picture
from minimind_jax.data.jsonl import iter_records
from minimind_jax.data.kinds import KINDS, KindName, Wanted
from minimind_jax.data.pictures import MARKER, PLACE, ImageConversation, Marker, PictureFile, find_file, with_markers
from minimind_jax.errors import UserError, explained
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.image_encoder import check_images
from minimind_jax.inference.request import Request
from minimind_jax.inference.sampling import SamplingConfig
from minimind_jax.model.transformer import Params
from minimind_jax.runs.parts import Run, without_others
from minimind_jax.seeds import named_seed
from minimind_jax.training.loop import SampleFn

LONGEST = 200  # characters of a question
LOOKED_AT = 200  # records


class Question(NamedTuple):
    """What a sample answers or goes on from, and the pictures that it shows: where it says `<image>`, or in front."""

    text: str
    pictures: tuple[PictureFile, ...] = ()

    @property
    def told(self) -> str:
        """With the names of its pictures."""
        if not self.pictures:
            return self.text
        text = self.text if PLACE in self.text else f"{PLACE}\n" * len(self.pictures) + self.text
        for picture in self.pictures:
            text = text.replace(PLACE, f"<{picture.name}>" if isinstance(picture, Path) else "<a picture>", 1)
        return text


def questions(config: WriterConfig, kind: KindName, marker: Marker | None = None) -> list[Question]:
    """Those of `config.samples`, or the first questions or beginnings of texts of data.val or data.train where it has
    none."""
    samples, data, found = config.samples, config.data, {}
    if samples.prompts:
        paths = samples.images if isinstance(config, SeeingConfig) else ()
        pictures = tuple(find_file(path, Path(), "samples.images") for path in paths)
        return [Question(prompt, pictures) for prompt in samples.prompts]
    if not samples.from_data:
        return []
    wanted = Wanted(data, marker=marker or MARKER)
    records = iter_records(data.val or data.train, lambda error: None, data)
    for record in itertools.islice(records, LOOKED_AT):
        try:
            parsed = KINDS[kind].parse(record, wanted)
        except UserError:  # told when all records are read
            continue
        text = KINDS[kind].question(parsed)
        shown = parsed.pictures[: text.count(PLACE)] if isinstance(parsed, ImageConversation) else ()
        if text.strip() and len(text) <= LONGEST:
            found[Question(text, shown)] = None
        if len(found) == samples.from_data:
            break
    return list(found)


def sampler(run: Run) -> SampleFn | None:
    """Writes on from each of the run's prompts. None without any, and of a stage that has none.

    Raises UserError for a prompt that is empty or too long, or a picture that cannot be read: now and not when the
    model could not be exported for it.
    """
    asked = questions(run.config, run.kind.records, run.marker) if isinstance(run.config, WriterConfig) else []
    if not asked:
        return None
    samples, requests = run.config.samples, [_request(run, question) for question in asked]
    context = run.model.config.max_position_embeddings
    for question, request in zip(asked, requests, strict=True):
        if not request.prompt:
            raise UserError("samples.prompts: a prompt is empty, and the tokenizer has no token to begin a text with")
        if len(request.prompt) + samples.max_new_tokens > context:
            raise UserError(
                f"samples.prompts: the {len(request.prompt)} tokens of {question.text[:40]!r} and "
                f"samples.max_new_tokens {samples.max_new_tokens} exceed the model's context of {context} tokens; "
                "shorten the prompt or ask for fewer"
            )
    seed = named_seed(run.config.seed, "samples") % 2**31
    sampling = SamplingConfig(
        max_new_tokens=samples.max_new_tokens, temperature=samples.temperature, top_p=samples.top_p, seed=seed
    )
    prompts, images = zip(*((request.prompt, request.images) for request in requests), strict=True)

    def sample(params: Params) -> list[tuple[str, str]]:
        engine = Engine(run.model, without_others(run, params), run.tokenizer)
        answers = engine.generate(prompts, sampling, images)
        return [(question.told, answer.text) for question, answer in zip(asked, answers, strict=True)]

    return sample


def _request(run: Run, question: Question) -> Request:
    """The prompt's tokens, and its pictures. Raises UserError."""
    text, images = question.text, ()
    if question.pictures:
        [text] = with_markers([text], len(question.pictures), run.marker, "samples.prompts")
        tower = run.model.config.vision.tower
        images = tuple(open_picture(picture, tower, "samples.images") for picture in question.pictures)
    request = Request(tuple(KINDS[run.kind.records].prompt(run.tokenizer, text)), images=images)
    with explained("samples.prompts", UserError):
        check_images(request, run.model.config.vision)
    return request

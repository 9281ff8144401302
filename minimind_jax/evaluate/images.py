"""Questions about pictures: how a model that sees answers them, and how with the pictures of other questions.

What is right with other pictures, too, was guessed from the words; the difference is what the model sees.
"""

import dataclasses
import functools
import itertools
import math
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.config.sections import ReadingConfig
from minimind_jax.config.tools import EvaluateImagesConfig
from minimind_jax.convert.load import load_tokenizer
from minimind_jax.data.documents import encode_prompt
from minimind_jax.data.images import Picture, open_picture
from minimind_jax.data.jsonl import Record, expand_paths, iter_records, tell
from minimind_jax.data.kinds import parse_conversation
from minimind_jax.data.messages import Conversation
from minimind_jax.data.pictures import marker_of, named, place_pictures, take_pictures
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.data.written import check_output
from minimind_jax.errors import UserError, disk_errors
from minimind_jax.evaluate.choices import parse_question
from minimind_jax.evaluate.share import Share
from minimind_jax.folders import resolve_model_folder
from minimind_jax.inference.answer_file import PartialFile
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.image_encoder import BLIND
from minimind_jax.inference.likelihood import LikelihoodScorer
from minimind_jax.inference.load import load_model
from minimind_jax.inference.request import Request
from minimind_jax.inference.splitter import parted
from minimind_jax.model.config import Vision
from minimind_jax.model.transformer import LanguageModel, Params
from minimind_jax.progress import progress, tracked
from minimind_jax.texts import cell, table

TASK = "answers"  # of conversations
DRAWS = 20  # of other places for pictures, of which one may be found to do
MUTE = (
    "answers without a word; it is asked behind an empty thought, which models trained with data.empty_think_removal 1 "
    "have never seen"
)


class Question(NamedTuple):
    """What a model is asked about pictures.

    where: its record. task: which questions are counted together. asked: the user's last words. prompt: token ids, with
    the markers of `pictures`. pictures: their digests. answers: texts of the choices, or the right one alone. right:
    its number. opens_thinking: the prompt ends in an open think block.
    """

    where: str
    task: str
    asked: str
    prompt: list[int]
    pictures: tuple[bytes, ...]
    answers: tuple[str, ...]
    right: int = 0
    opens_thinking: bool = False

    @property
    def is_right(self) -> list[bool]:
        """Of each answer; the same choice may be there twice."""
        return [answer.strip() == self.answers[self.right].strip() for answer in self.answers]


@dataclasses.dataclass(frozen=True)
class Answers:
    """Of n questions. texts: what the model writes, greedily, without its thoughts. log_probs: of each of a question's
    answers, in nats."""

    texts: list[str]
    log_probs: list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class ImageResult:
    """Of the questions of a task. own: the answers. shuffled: those with pictures of other questions; None where these
    cannot be told apart."""

    task: str
    questions: list[Question]
    own: Answers
    shuffled: Answers | None

    @property
    def has_choices(self) -> bool:
        return len(self.questions[0].answers) > 1

    @property
    def chance(self) -> float:
        """Expected share of right choices of a guess."""
        return float(np.mean([np.mean(question.is_right) for question in self.questions]))

    def exact(self, answers: Answers) -> list[bool]:
        """Whether each text is the right answer, but for case, spaces and a full stop at its end."""
        return [
            plain(text) == plain(question.answers[question.right])
            for text, question in zip(answers.texts, self.questions, strict=True)
        ]

    def likeliest(self, answers: Answers) -> list[bool]:
        """Whether the right choice of each question is the likeliest."""
        pairs = zip(answers.log_probs, self.questions, strict=True)
        return [question.is_right[log_probs.argmax()] for log_probs, question in pairs]

    def bits_per_byte(self, answers: Answers) -> float:
        """Of the right answers: -log2 of their probability, the end of the turn included, over their UTF-8 bytes."""
        pairs = list(zip(answers.log_probs, self.questions, strict=True))
        nats = -sum(float(log_probs[question.right]) for log_probs, question in pairs)
        return nats / math.log(2) / sum(len(question.answers[question.right].encode()) for _, question in pairs)


def plain(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(".。 ")


def run(config: EvaluateImagesConfig) -> None:
    """Measures and prints what `config` asks for."""
    print(describe(evaluate_images(config)))


def evaluate_images(config: EvaluateImagesConfig) -> list[ImageResult]:
    """Results for each task in the files, in the order in which they first appear.

    A question is asked in the model's chat template. Its choices are scored as answers, the end of the turn included;
    and the model writes one, greedily. Then both once more with the pictures shuffled among the task's questions.

    Raises UserError: no such model or file, a model of texts, a broken record, or no question about a picture.
    """
    if config.output:
        check_output(Path(config.output), expand_paths(config.files))
    told = Counter()
    ask = Asker.load(config.model, config.max_new_tokens, config.batch_size)
    records = iter_records(config.files, reading=config, told=told)
    questions = ask.questions(itertools.islice(records, config.max_records or None), config, told)
    tell(told)
    if not questions:
        raise UserError(f"{', '.join(config.files)}: no record asks about a picture (`image`, `images` or parts)")
    tasks: dict[tuple[str, bool], list[Question]] = {}
    for question in questions:
        tasks.setdefault((question.task, len(question.answers) > 1), []).append(question)
    results = []
    for (task, _), asked in tasks.items():
        others = shuffled([question.pictures for question in asked], config.seed)
        own = ask(asked, [question.pictures for question in asked])
        if mute := sum(not text.strip() for text in own.texts):
            tell(Counter({(task, MUTE): mute}))
        results.append(ImageResult(task, asked, own, others and ask(asked, others)))
    if config.output:
        _write(Path(config.output), results)
    return results


class PixelFile:
    """Pictures on the disk, which may be more than the memory holds; the file has no name, and is gone with it."""

    def __init__(self):
        self._file, self._places = tempfile.TemporaryFile(), {}

    def keep(self, picture: Picture) -> bytes:
        """Its digest. Raises UserError for a full disk."""
        if picture.digest not in self._places:
            with disk_errors(f"{tempfile.gettempdir()}: cannot hold the pictures", "set TMPDIR to a larger disk"):
                self._places[picture.digest] = self._file.seek(0, os.SEEK_END), picture.pixels.shape
                self._file.write(picture.pixels.tobytes())
        return picture.digest

    def picture(self, digest: bytes) -> Picture:
        """What `keep` was given."""
        place, shape = self._places[digest]
        self._file.seek(place)
        return Picture(np.frombuffer(self._file.read(math.prod(shape)), np.uint8).reshape(shape), digest)


class Asker:
    """Asks a model questions about pictures. pictures: of the questions, which another asker of them may be given."""

    def __init__(
        self, model: LanguageModel, params: Params, tokenizer: Tokenizer, max_new_tokens: int, batch_size: int
    ):
        """max_new_tokens: of what it writes. Raises UserError for a model of texts."""
        if model.config.vision is None:
            raise UserError(BLIND)
        self.engine = Engine(model, params, tokenizer, slots=batch_size)
        self.scorer = LikelihoodScorer(model, params, batch_size)
        self.sampling = SamplingConfig(max_new_tokens=max_new_tokens, temperature=0.0)
        self.pictures = PixelFile()

    @classmethod
    def load(cls, name: str, max_new_tokens: int, batch_size: int) -> "Asker":
        """Asks the model of a run or of a folder."""
        folder = resolve_model_folder(name)
        return cls(*load_model(folder), load_tokenizer(folder), max_new_tokens, batch_size)

    def questions(
        self,
        records: Iterable[Record],
        reading: ReadingConfig,
        told: Counter,
        on_bad: Callable[[UserError], None] | None = None,
    ) -> list[Question]:
        """What records ask about pictures. told: hears which ask nothing, and which leave no room for an answer.

        on_bad: called with the error of a record that cannot be asked, which is then left out; without it the error is
        raised, a UserError with file and row.
        """
        tokenizer, vision, found = self.engine.tokenizer, self.engine.model.config.vision, []
        for record in records:
            try:
                question = parse_record(record, tokenizer, vision, reading, self.pictures.keep)
            except UserError as error:
                if on_bad is None:
                    raise
                on_bad(error)
                continue
            longest = max(len(tokenizer.encode(answer)) for answer in question.answers) + 1
            if not question.pictures:
                told[str(record.file), "records without a picture are left out"] += 1
            elif self.engine.room(len(question.prompt)) < max(longest, self.sampling.max_new_tokens):
                told[str(record.file), "records too long for the model's context, answer included, are left out"] += 1
            else:
                found.append(question)
        return found

    def __call__(self, questions: Sequence[Question], pictures: Sequence[tuple[bytes, ...]]) -> Answers:
        """The model's answers to questions that show these pictures."""
        tokenizer, requests, picture = self.engine.tokenizer, [], self.pictures.picture
        end = [] if tokenizer.turn_end_id is None else [tokenizer.turn_end_id]
        for question in questions:
            requests += [(question.prompt, tokenizer.encode(answer) + end) for answer in question.answers]
        shown = [own for question, own in zip(questions, pictures, strict=True) for _ in question.answers]
        with progress("scoring", len(requests)) as advance:
            scores = iter(self.scorer.score(requests, advance, lambda number: map(picture, shown[number])))
        log_probs = [np.array([next(scores).log_prob for _ in question.answers]) for question in questions]
        asked = (
            Request(tuple(question.prompt), self.sampling, images=tuple(map(picture, own)))
            for question, own in zip(questions, pictures, strict=True)
        )
        answers = zip(questions, tracked(self.engine.answers(asked), "answering", len(questions)), strict=True)
        texts = [parted(answer.text, question.opens_thinking).content for question, answer in answers]
        return Answers(texts, log_probs)


def shuffled(pictures: Sequence[tuple[bytes, ...]], seed: int) -> list[tuple[bytes, ...]] | None:
    """The pictures in other places, none in a question that shows it; None where no such places are found, as where
    more than half of them are the same."""
    slots, owners = [picture for own in pictures for picture in own], [own for own in pictures for _ in own]
    draw, counts = random.Random(seed), Counter(slots)
    step = max(counts.values())  # from one picture's places, which are neighbours, into those of another
    for _ in range(DRAWS if 2 * step <= len(slots) else 0):
        ranks = dict(zip(draw.sample(list(counts), len(counts)), itertools.count(), strict=False))
        order = sorted(draw.sample(range(len(slots)), len(slots)), key=lambda slot: ranks[slots[slot]])
        taken = {slot: slots[order[(n + step) % len(slots)]] for n, slot in enumerate(order)}
        for slot, own in enumerate(owners):
            if taken[slot] in own:  # of a question with several
                fits = (each for each in order if taken[each] not in own and taken[slot] not in owners[each])
                other = next(fits, slot)
                taken[slot], taken[other] = taken[other], taken[slot]
        if not any(taken[slot] in own for slot, own in enumerate(owners)):
            numbers = itertools.count()
            return [tuple(taken[next(numbers)] for _ in own) for own in pictures]
    return None


# What is asked --------------------------------------------------------------------------------------------------------


def parse_record(
    record: Record, tokenizer: Tokenizer, vision: Vision, reading: ReadingConfig, keep: Callable[[Picture], bytes]
) -> Question:
    """A question with choices (see `choices.parse_question`), or a conversation whose last message is the right answer;
    with pictures as training reads them, which are given to `keep`. Raises UserError with file and row."""
    (words, files), marker = take_pictures(record, reading), marker_of(tokenizer, vision)
    if "choices" in words.value:
        asked = parse_question(words)
        task, answers, right = asked.task, asked.choices, asked.answer
        talk = Conversation([{"role": "user", "content": asked.question}])
    else:
        task = str(words.value.pop("task", None) or TASK)
        talk = parse_conversation(words, reading=reading)
        last = talk.messages[-1]
        if last["role"] != "assistant" or not last["content"].strip():
            raise UserError(f"{record.where}: the last message is not an assistant's answer in words")
        talk, answers, right = dataclasses.replace(talk, messages=talk.messages[:-1]), (last["content"],), 0
    if any(marker.text in answer for answer in answers):
        raise UserError(f"{record.where}: an answer has {marker.text}, which stands for pictures")
    with_images = place_pictures(record, talk, files, marker)
    open_it = functools.partial(open_picture, tower=vision.tower, tell=record.tell)
    pictures = tuple(keep(open_it(file, where=where)) for where, file in named(record.where, with_images.pictures))
    messages = with_images.conversation.messages
    prompt = encode_prompt(tokenizer, messages, talk.tools, False)
    opens_thinking = tokenizer.prompt_opens_thinking(messages, talk.tools, False)
    said = next(m["content"] for m in reversed(messages) if m["role"] != "assistant")
    said = said.replace(marker.text, "").strip()
    return Question(record.where, task, said, prompt, pictures, answers, right, opens_thinking)


# What is said ---------------------------------------------------------------------------------------------------------


def describe(results: Sequence[ImageResult]) -> str:
    """Markdown: a line for each measure of each task."""
    columns, lines = ("task", "", "questions", "right", "pictures shuffled", "chance"), []
    for result in results:
        for name, own, other in _figures(result):
            chance = f"{result.chance:.1%}" if name == "likeliest choice" else ""
            lines.append((cell(result.task), name, f"{len(result.questions):,}", own, other, chance))
    return table(columns, lines, numbers=("questions", "chance"))


def _figures(result: ImageResult) -> list[tuple[str, str, str]]:
    measures = {"exact match": lambda answers: Share.of(result.exact(answers)).describe()}
    if result.has_choices:
        measures = {"likeliest choice": lambda answers: Share.of(result.likeliest(answers)).describe()} | measures
    else:
        measures |= {"bits per byte": lambda answers: f"{result.bits_per_byte(answers):.4f}"}
    both = result.own, result.shuffled
    none = "not told apart"  # the pictures, most being the same
    return [(name, *(none if answers is None else of(answers) for answers in both)) for name, of in measures.items()]


def _write(file: Path, results: Sequence[ImageResult]) -> None:
    """A line for each question: what is right, what the model says with its pictures, and with others."""
    with PartialFile(file) as written:
        for result in results:
            told = {"": result.own, "_shuffled": result.shuffled}
            for n, question in enumerate(result.questions):
                row: dict[str, Any] = {"where": question.where, "task": question.task, "question": question.asked}
                row |= {"right": question.answers[question.right]}
                for end, answers in told.items():
                    if answers is not None:
                        row |= {f"answer{end}": answers.texts[n], f"exact{end}": result.exact(answers)[n]}
                    if answers is not None and result.has_choices:
                        row[f"likeliest{end}"] = question.answers[int(answers.log_probs[n].argmax())]
                written.write(row)
        written.finish()

"""Multiple choice: which of its choices a model finds likeliest after a question."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minimind_jax.config.sections import ReadingConfig
from minimind_jax.config.tools import ChoicesConfig
from minimind_jax.convert.load import load_tokenizer
from minimind_jax.data.jsonl import Record, iter_records
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.data.values import checked_text, field_names, is_absent, json_list, kind_of
from minimind_jax.errors import UserError
from minimind_jax.folders import resolve_model_folder
from minimind_jax.inference.likelihood import Likelihood, LikelihoodScorer, Request, encode_pair
from minimind_jax.inference.load import load_model
from minimind_jax.progress import progress

ENGLISH = "Question: {question}\nAnswer:"
CHINESE = "问题：{question}\n答案："


class Question(NamedTuple):
    """answer: number of the right choice. task: which questions are counted together."""

    where: str
    task: str
    question: str
    choices: tuple[str, ...]
    answer: int


@dataclasses.dataclass(frozen=True)
class ChoiceResult:
    """Of n questions: whether the likeliest choice is right, and whether that with the highest likelihood a byte is.

    chance: expected share of right answers of a guess. cut: questions that lost their beginning for want of room in
        the model's context. alike: questions with the same choice twice, of which either is as right.
    """

    task: str
    right: np.ndarray
    right_by_length: np.ndarray
    chance: float
    cut: int = 0
    alike: int = 0

    def describe(self) -> str:
        n = len(self.right)
        accuracy, by_length = float(self.right.mean()), float(self.right_by_length.mean())
        error = math.sqrt(max(accuracy * (1 - accuracy), 1e-12) / max(n - 1, 1))
        cut = f"; {self.cut:,} of them longer than the model's context, which lost their beginning" if self.cut else ""
        alike = f"; {self.alike:,} of them have a choice twice, which is as right both times" if self.alike else ""
        return (
            f"{self.task}: {n:,} questions, accuracy {accuracy:.4f} +- {error:.4f}, "
            f"normalised by length {by_length:.4f}, by chance {self.chance:.4f}{cut}{alike}"
        )


def parse_question(record: Record) -> Question:
    """A record {"question": str, "choices": [str, ...], "answer": number from 0, letter or choice, "task"?: str}.

    Raises UserError.
    """
    value = record.value
    question, choices, answer = value.get("question"), value.get("choices"), value.get("answer")
    if isinstance(choices, str) and choices.strip().startswith("["):  # of a CSV cell
        choices = json_list(choices, f"{record.where}: choices")
    if not isinstance(question, str) or not isinstance(choices, list) or len(choices) < 2:
        raise UserError(
            f"{record.where}: expected `question` (text) and `choices` (a list of two or more), found the fields "
            f"{field_names(value)}"
        )
    if odd := [choice for choice in choices if not isinstance(choice, str | int | float)]:
        raise UserError(f"{record.where}: a choice is {kind_of(odd[0])}; expected text or a number")
    question = checked_text(question, f"{record.where}: question")
    texts = tuple(checked_text(str(choice).rstrip(), f"{record.where}: a choice") for choice in choices)
    for name, text in [("question", question), *(("a choice", text) for text in texts)]:
        if not any(map(str.isprintable, text.strip())):  # nothing, spaces, or characters without width
            raise UserError(f"{record.where}: {name} is empty")
    if len({text.strip() for text in texts}) == 1:
        raise UserError(f"{record.where}: all choices are {texts[0][:40]!r}; there is nothing to choose")
    task = value.get("task")
    task = "choices" if is_absent(task) else checked_text(str(task), f"{record.where}: task")
    return Question(record.where, task, question, texts, _number(answer, texts, record))


def _number(answer: Any, choices: Sequence[str], record: Record) -> int:
    number = int(answer) if isinstance(answer, float) and answer.is_integer() else answer
    answer = str(answer) if isinstance(answer, bool) else answer
    if isinstance(answer, str):
        named = [n for n, choice in enumerate(choices) if choice.strip() == answer.strip()]
        if named:
            return named[0]
        letter = answer.strip().upper()
        number = "ABCDEFGHIJKLMNOPQRSTUVWXYZ".find(letter) if len(letter) == 1 else -1
        number = int(letter) if letter.isdecimal() else number  # a number of a CSV cell
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(choices):
        raise UserError(
            f"{record.where}: answer is {str(answer)[:40]!r}; expected the right choice's number from 0 to "
            f"{len(choices) - 1}, its letter, or the choice itself"
        )
    return number


def run(config: ChoicesConfig) -> None:
    for result in evaluate_choices(config):
        print(result.describe())


def evaluate_choices(config: ChoicesConfig) -> list[ChoiceResult]:
    """Results for each task in the files, in the order in which they first appear.

    A choice is scored as the continuation of the prompt, " " and the choice; the space is left out where one is there
    already, and behind a Chinese colon. Spaces at the prompt's end count as the choice's, in place of its own; those at
    a choice's end are left out. The question's own answer is never among the examples.

    Raises UserError: no such model or file, a broken record, too few examples, a prompt without {question}, or a choice
    of which the tokenizer leaves nothing to score.
    """
    prompt = config.prompt.replace("\\n", "\n")
    if prompt and "{question}" not in prompt:
        raise UserError(f"prompt {prompt!r} has no {{question}}")
    reading = ReadingConfig(encoding=config.encoding)
    questions = _by_task(config.files, reading)
    examples = _by_task(config.shots_from, reading) if config.shots_from else questions
    folder = resolve_model_folder(config.model)
    scorer, tokenizer = LikelihoodScorer(*load_model(folder), config.batch_size), load_tokenizer(folder)
    questions = {task: asked[: config.max_questions or None] for task, asked in questions.items()}
    results = []
    total = sum(len(question.choices) for asked in questions.values() for question in asked)
    with progress("scoring choices", total) as advance:
        for task, asked in questions.items():
            own = [_requests(tokenizer, prompt, question, examples.get(task, []), config.shots) for question in asked]
            cut = sum(max(len(before) + len(choice) for before, choice in each) > scorer.context + 1 for each in own)
            results.append(_result(task, asked, scorer.score(list(itertools.chain(*own)), advance), cut))
    return results


def _requests(
    tokenizer: Tokenizer, prompt: str, question: Question, examples: Sequence[Question], shot_count: int
) -> list[Request]:
    """Each choice as the continuation of the question behind `shot_count` others."""
    shown = [other for other in examples if other[2:] != question[2:]][:shot_count]
    if len(shown) < shot_count:
        raise UserError(f"{question.task}: {shot_count} examples are asked for, and there are {len(shown)}")
    context = "".join(_filled(prompt, other) + _spaced(prompt, other, other.answer) + "\n\n" for other in shown)
    context += _filled(prompt, question)
    prefix, requests = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id, []
    for n in range(len(question.choices)):
        choice, where = _spaced(prompt, question, n), f"{question.where}: choice {n}"
        context_ids, own = encode_pair(tokenizer.encode, context, choice, prefix, where)
        is_begun = context_ids == [prefix] or tokenizer.bos_id is None
        requests.append((context_ids if is_begun else [prefix, *context_ids], own))
    return requests


def _by_task(files: Sequence[str], reading: ReadingConfig) -> dict[str, list[Question]]:
    found: dict[str, list[Question]] = {}
    for question in map(parse_question, iter_records(files, reading=reading)):
        found.setdefault(question.task, []).append(question)
    return found


def _filled(prompt: str, question: Question) -> str:
    text = question.question
    is_chinese = any("\u4e00" <= character <= "\u9fff" for character in text)
    return (prompt or (CHINESE if is_chinese else ENGLISH)).replace("{question}", text)


def _spaced(prompt: str, question: Question, number: int) -> str:
    """The choice as it stands behind the prompt."""
    before, choice = _filled(prompt, question), question.choices[number]
    if before[-1:].isspace():
        return choice.lstrip()
    return ("" if choice[0].isspace() or before.endswith("：") else " ") + choice


def _result(task: str, questions: list[Question], likelihoods: list[Likelihood], cut: int) -> ChoiceResult:
    """likelihoods: of all choices, question by question."""
    right, by_length, chance, alike, found = [], [], [], 0, iter(likelihoods)
    for question in questions:
        log_probs = np.array([next(found).log_prob for _ in question.choices])
        sizes = np.array([len(choice.encode()) for choice in question.choices])
        texts = [choice.strip() for choice in question.choices]
        is_right = np.array([text == texts[question.answer] for text in texts])
        right.append(is_right[log_probs.argmax()])
        by_length.append(is_right[(log_probs / sizes).argmax()])
        chance.append(is_right.mean())
        alike += len(set(texts)) < len(texts)
    return ChoiceResult(task, np.array(right), np.array(by_length), float(np.mean(chance)), cut, alike)

"""How well a model calls tools: valid calls, the right tools and arguments, the right numbers in what it says then."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.config.sections import ReadingConfig
from minimind_jax.config.tools import ToolCallsConfig
from minimind_jax.data.documents import encode_prompt
from minimind_jax.data.formats import read_record
from minimind_jax.data.jsonl import Record, expand_paths, iter_records, tell
from minimind_jax.data.messages import Message, is_trained
from minimind_jax.data.prompts import read_prompt
from minimind_jax.data.tools import Call, called, calls_in_text, comparable, parse_calls
from minimind_jax.data.values import Place, kind_of
from minimind_jax.data.written import check_output
from minimind_jax.errors import UserError
from minimind_jax.inference.answer_file import PartialFile
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.load import load_engine
from minimind_jax.inference.request import Request
from minimind_jax.inference.splitter import parted
from minimind_jax.inference.tool_use import carry_out
from minimind_jax.progress import tracked
from minimind_jax.tools.answers import numbers_in, same_number, says
from minimind_jax.tools.toolbox import Toolbox

ROWS = CALL, JSON, TOOL, ARGUMENTS, NO_CALL, GIVEN, CARRIED_OUT = (
    "a call where one is due",
    "  all of it valid",
    "  the right tools",
    "  the right arguments",
    "no call where none is due",
    "the right numbers, results given",
    "the right numbers, tools carried out",
)


class Question(NamedTuple):
    """An answer that the model is asked for.

    where: its record. messages: before it. calls: that are due; None if that is not known. numbers: that it says; empty
    if nothing can be checked. acts: its calls are carried out until it says something.
    """

    where: str
    messages: list[Message]
    tools: list[dict[str, Any]]
    calls: list[Call] | None
    numbers: tuple[Decimal, ...] = ()
    acts: bool = False


class Answer(NamedTuple):
    """text: what the model wrote last, without its thoughts. calls: those it wrote first."""

    text: str
    calls: list[Call]


def run(config: ToolCallsConfig) -> None:
    scores, notes = evaluate_tool_calls(config)
    for note, count in notes.items():
        print(f"{count:,} {note}")
    for row, marks in scores.items():
        print(f"{row:<40}{sum(marks):>8,} of {len(marks):>8,}{sum(marks) / len(marks):>9.1%}")


def evaluate_tool_calls(config: ToolCallsConfig) -> tuple[dict[str, list[bool]], Counter[str]]:
    """Marks in each of ROWS that has questions, and counts of what else there is to say.

    Every answer of a conversation with tools is asked for anew behind the record's own messages, greedily. Of a record
    with `gt` (MiniMind's agent data) there is one question: what its calls give, carried out by `config.tools`, or the
    calls themselves where `gt` holds JSON. Raises UserError for a broken record, and for files without a question.
    """
    if config.output:
        check_output(Path(config.output), expand_paths(config.files))
    questions, notes = _questions(config)
    with Toolbox(config.tools if any(question.acts for question in questions) else ()) as tools:
        answers = _answers(load_engine(config.model, slots=config.batch_size), questions, tools, config, notes)
    scores: dict[str, list[bool]] = {row: [] for row in ROWS}
    rows = []
    for question, answer in ((questions[n], answers[n]) for n in sorted(answers)):
        marks = marks_of(question, answer)
        for row, mark in marks.items():
            scores[row].append(mark)
        right = {row.strip(): mark for row, mark in marks.items()}
        found = {"answer": answer.text, "calls": [call._asdict() for call in answer.calls], "right": right}
        due = {"calls_due": [call._asdict() for call in question.calls or ()], "numbers_due": question.numbers}
        asked = {"where": question.where, "question": question.messages[-1]["content"]}
        rows.append(asked | found | due)
    if config.output:
        with PartialFile(Path(config.output)) as file:
            for row in rows:
                file.write(row)
            file.finish()
    return {row: marks for row, marks in scores.items() if marks}, +notes


# What is asked --------------------------------------------------------------------------------------------------------


def _questions(config: ToolCallsConfig) -> tuple[list[Question], Counter[str]]:
    questions, notes, told = [], Counter(), Counter()
    for record in itertools.islice(iter_records(config.files, reading=config, told=told), config.max_records or None):
        found = questions_of(record, config)
        questions += found
        if found and record.value.get("chat_template_kwargs"):
            record.tell("`chat_template_kwargs` is ignored: --thinking holds for all records")
        notes["records"] += 1
        notes["of them offer no tools, or hold nothing to check, and are left out"] += not found
    tell(told)
    if not questions:
        raise UserError(f"{', '.join(config.files)}: no record with answers offers tools (on its system message)")
    notes["answers are asked for"] = len(questions)
    return questions, notes


def questions_of(record: Record, reading: ReadingConfig) -> list[Question]:
    """The questions of a conversation with tools, in order. Raises UserError for a broken record."""
    if "gt" in record.value:
        return _with_truth(record, reading)
    conversation = read_record(record, "conversation", reading)
    questions = []
    for index, message in enumerate(conversation.messages if conversation.tools else ()):
        before = conversation.messages[:index]
        if is_trained(message) and any(earlier["role"] != "system" for earlier in before):
            calls = [called(call) for call in message.get("tool_calls", ())]
            numbers = () if calls else _numbers_due(before, message["content"])
            questions.append(Question(record.where, before, conversation.tools, calls, numbers))
    return questions


def _numbers_due(before: Sequence[Message], answer: str) -> tuple[Decimal, ...]:
    """The numbers of an answer that the tools had given since the last question."""
    recent = itertools.takewhile(lambda message: message["role"] != "user", reversed(before))
    given = [number for message in recent if message["role"] == "tool" for number in numbers_in(message["content"])]
    said = dict.fromkeys(numbers_in(answer))
    return tuple(number for number in said if any(same_number(number, other) for other in given))


def _with_truth(record: Record, reading: ReadingConfig) -> list[Question]:
    truth = record.value["gt"]
    if not isinstance(truth, list) or not truth or not all(isinstance(text, str | int | float) for text in truth):
        raise UserError(f"{record.where}: gt is {kind_of(truth)}; expected a list of texts")
    conversation = read_prompt(dataclasses.replace(record, told=Counter()), reading).conversation
    if conversation is None or not conversation.tools:
        return []
    asked = record.where, conversation.messages, conversation.tools
    if str(truth[0]).lstrip().startswith("{"):
        place = Place(f"{record.where}: gt")
        return [Question(*asked, [called(call) for text in truth for call in calls_in_text(str(text), place)])]
    numbers = tuple(numbers_in(" ".join(map(str, truth))))
    return [Question(*asked, None, numbers, acts=True)] if numbers else []


# What is answered -----------------------------------------------------------------------------------------------------


def _answers(
    engine: Engine, questions: Sequence[Question], tools: Toolbox, config: ToolCallsConfig, notes: Counter[str]
) -> dict[int, Answer]:
    """Answers by the number of their question, without those whose prompt is too long. notes: gets counts."""
    answers: dict[int, Answer] = {}
    messages = [list(question.messages) for question in questions]
    left = list(range(len(questions)))
    for _ in range(config.tool_rounds + 1):
        texts = _generate(engine, [(messages[n], questions[n].tools) for n in left], config, notes)
        acting = []
        for n, text in zip(left, texts, strict=True):
            if text is None:
                continue
            calls = parse_calls(text)[1]
            answers[n] = Answer(text, answers[n].calls if n in answers else calls)
            if calls and questions[n].acts:
                results = carry_out(calls, tools)
                notes["calls were carried out"] += len(calls)
                notes["of them failed"] += sum(result.is_error for result in results)
                messages[n] += [{"role": "assistant", "content": text}]
                messages[n] += [{"role": "tool", "content": result.text} for result in results]
                acting.append(n)
        left = acting
    return answers


def _generate(
    engine: Engine, prompts: Sequence[tuple], config: ToolCallsConfig, notes: Counter[str]
) -> list[str | None]:
    """The likeliest answers to (messages, tools), without thoughts; None where there is no room for max_new_tokens."""
    texts: list[str | None] = [None] * len(prompts)
    ids = [encode_prompt(engine.tokenizer, *prompt, config.thinking) for prompt in prompts]
    fitting = [n for n in range(len(ids)) if engine.room(len(ids[n])) >= config.max_new_tokens]
    without_room = len(ids) - len(fitting)
    notes["prompts leave no room for --max_new_tokens in the model's context and are given up"] += without_room
    sampling = SamplingConfig(max_new_tokens=config.max_new_tokens, temperature=0.0)
    requests = (Request(tuple(ids[n]), sampling) for n in fitting)
    for n, said in zip(fitting, tracked(engine.answers(requests), "answering", len(fitting)), strict=True):
        opens_thinking = engine.tokenizer.prompt_opens_thinking(*prompts[n], config.thinking)
        texts[n] = parted(said.text, opens_thinking).content.strip()
        notes["answers were cut off (--max_new_tokens)"] += said.finish_reason == "length"
    return texts


# What is right --------------------------------------------------------------------------------------------------------


def marks_of(question: Question, answer: Answer) -> dict[str, bool]:
    """Whether the answer is right, in each row that applies to the question."""
    is_call, valid = bool(answer.calls), bool(answer.calls) and not any(call.error for call in answer.calls)
    marks = {CALL: is_call, JSON: valid}
    if question.calls:
        due, found = ([comparable(call, question.tools) for call in calls] for calls in (question.calls, answer.calls))
        names, due_names = (Counter(call.name for call in calls) for calls in (answer.calls, question.calls))
        marks |= {TOOL: valid and names == due_names, ARGUMENTS: valid and Counter(found) == Counter(due)}
    elif question.calls is not None:
        marks = {NO_CALL: not is_call}
    if question.numbers:
        words, calls = parse_calls(answer.text)
        marks[CARRIED_OUT if question.acts else GIVEN] = not calls and says(words, question.numbers)
    return marks

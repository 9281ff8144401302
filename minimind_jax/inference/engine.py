"""The engine: many answers at once, each token of all of them in one step of the device.

What is answered when and where is the scheduler's; what is computed, `decode`'s. Arrays go to the device as they are
needed and come back as lists: the tokens live on the host, the keys and values of them in the cache.
"""

import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from minimind_jax.convert.hf import check_vocabulary
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.inference import decode
from minimind_jax.inference.buckets import bucket, round_up
from minimind_jax.inference.generate import unfused
from minimind_jax.inference.request import Answer, Request, Token
from minimind_jax.inference.sampling import SamplingConfig, SamplingValues
from minimind_jax.inference.scheduler import Scheduler, Task
from minimind_jax.inference.text import AnswerText
from minimind_jax.model.transformer import LanguageModel, Params

Prompt = str | Sequence[int]
DEFAULT = SamplingConfig()
GREEDY = SamplingConfig(temperature=0.0)

MOST_SLOTS = 64  # running at once, where the caller says nothing
SLOT_MULTIPLE = 128
FIRST_ROOM = 256  # new tokens a cache that grows holds at first
MOST_STEPS = 32  # tokens of a row that one call of the device makes
LATENCY = 0.04  # seconds that such a call takes at most, where someone reads along
CHUNK = {"cpu": 512}  # tokens that are read at once, padding counted
OTHER_CHUNK = 8192
BESIDE_RUNNING = 4  # the part of them that is read while others run
ENDS = 8  # tokens that end a row, known to the device; of others the host knows


class Piece(NamedTuple):
    """What came of an answer since the last piece: tokens, and text that became final."""

    text: str
    tokens: list[Token]
    answer: Answer


class Engine:
    """A model that answers.

    tokenizer: None works on token ids alone: no text in prompts, answers or stop strings. eos_ids: tokens that end an
    answer; when None, those of the model's configuration, what the tokenizer's template writes behind an answer, and
    its end-of-text token. sampling: what the model's makers mean it to be sampled with; kept for the caller, used by no
    method.
    slots: answers in the making at once. context: most tokens of a prompt and its answer; the cache is as large from
    the start. When None it is the model's, and the cache grows to what requests need. held: rows more, for prefixes of
    finished requests. queue: most requests that wait.

    Methods are called from one thread. `counts`: prompt_tokens, cached_tokens, generated_tokens, requests, prefix_hits.
    """

    def __init__(
        self,
        model: LanguageModel,
        params: Params,
        tokenizer: Tokenizer | None = None,
        eos_ids: Iterable[int] | None = None,
        sampling: SamplingConfig = DEFAULT,
        *,
        slots: int = MOST_SLOTS,
        context: int | None = None,
        held: int = 0,
        queue: int | None = None,
    ):
        if eos_ids is None:
            eos_ids = {*model.config.end_ids, *(tokenizer.end_ids if tokenizer else ())}
        if tokenizer:
            check_vocabulary(tokenizer, model.config)
        self.model, self.tokenizer = unfused(model, params), tokenizer
        self.params = self.model.unstack(params)
        self.eos_ids, self.sampling = tuple(sorted(eos_ids)), sampling
        self.context = min(context or model.config.max_position_embeddings, model.config.max_position_embeddings)
        self.slots, self._held, self._grows = slots, held, context is None
        self.counts: Counter[str] = Counter()
        scaling = model.config.rope_scaling  # with `dynamic` keys depend on the length of their prompt
        reuses = scaling is None or scaling.rope_type != "dynamic"
        self._scheduler = Scheduler(slots, 0, queue, reuses)
        self._tasks: dict[Answer, Task] = {}
        self._cache, self._length = None, 0
        self._settings: tuple[list[Task], decode.Settings] | None = None
        self._widths: set[int] = set()  # of rows that run, for which the program is compiled
        self._has_read = False  # in the last step
        self._seconds = 0.0  # that a step took last
        if not self._grows:
            self._reserve(slots + held, self.context)

    # One answer and another -------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """There are requests that are not answered."""
        return bool(self._tasks)

    @property
    def running(self) -> int:
        return len(self._scheduler.at_work)

    @property
    def waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def cache_usage(self) -> float:
        """The part of the cache that unfinished requests use."""
        used = sum(len(task.row.held) for task in self._scheduler.at_work)
        return used / max(1, len(self._scheduler.rows) * self._length)

    def submit(self, request: Request) -> Answer:
        """Takes a request: its answer grows with the steps.

        Raises UserError: a prompt that is empty, not of this vocabulary or, with its answer, longer than the context;
        Busy when the queue is full.
        """
        self._check(request)
        stop = request.sampling.stop
        if stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer, and the model was loaded without one")
        answer = Answer(request, self.eos_ids, AnswerText(self.tokenizer, stop) if self.tokenizer else None)
        task = Task(answer, list(request.prompt))
        self._scheduler.add(task)
        self._tasks[answer] = task
        self.counts["requests"] += 1
        return answer

    def cancel(self, answer: Answer) -> None:
        """Ends an answer as it is; its row is free at once. Nothing happens to one that has ended."""
        if task := self._tasks.pop(answer, None):
            answer.finish("cancelled")
            self._scheduler.drop(task)

    def step(self, patient: bool = False) -> list[Answer]:
        """One call of the device, that reads prompts or makes tokens; the answers that grew.

        patient: nobody reads along: prompts go first, and one call makes more tokens.
        """
        try:
            return self._step(patient)
        except BaseException:  # also Ctrl-C: the cache may be lost in a call that was given it
            self._recover()
            raise

    def _step(self, patient: bool) -> list[Answer]:
        self._admit()
        running = self._scheduler.running
        most = CHUNK.get(self.model.platform, OTHER_CHUNK)
        if running and not patient:
            most //= BESIDE_RUNNING
        wants_read = patient or not running or not self._has_read
        chunks = self._scheduler.chunks(most) if wants_read else []
        self._has_read = bool(chunks)
        if chunks:
            return self._read(chunks)
        return self._make(running, patient) if running else []

    # Prompts and whole answers ----------------------------------------------------------------------------------------

    def encode(self, prompt: Prompt) -> list[int]:
        """Checked token ids of a prompt: text, in which special tokens are recognised and to which none are added, or
        token ids. Raises UserError."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UserError("the prompt is text, but the model was loaded without a tokenizer; give token ids")
            ids = self.tokenizer.encode(prompt)
        else:
            ids = [int(i) for i in prompt]
        if not ids:
            raise UserError("the prompt is empty; give at least one token to continue from")
        vocabulary = self.model.config.vocab_size
        outside = [i for i in ids if not 0 <= i < vocabulary]
        if outside:
            raise UserError(f"the prompt has token id {outside[0]}; the model's ids are 0 to {vocabulary - 1}")
        return ids

    def room(self, prompt_tokens: int) -> int:
        """Tokens that may still be generated after a prompt of that length."""
        return self.context - prompt_tokens

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig = DEFAULT) -> list[Answer]:
        """An answer to each prompt; the n-th draws with seed + n. Raises as `encode` and `submit`."""
        answers: list[Answer] = []
        try:
            for n, prompt in enumerate(prompts):
                own = dataclasses.replace(sampling, seed=sampling.seed + n)
                answers.append(self.submit(Request(tuple(self.encode(prompt)), own)))
            while any(answer.finish_reason is None for answer in answers):
                self.step(patient=True)
        finally:
            for answer in answers:
                self.cancel(answer)
        return answers

    def stream(self, prompt: Prompt, sampling: SamplingConfig = DEFAULT) -> Iterator[Piece]:
        """The answer to one prompt, piece by piece: the first after one token, later ones a few tokens each.

        Gives the same tokens as `generate`. Leaving the loop ends the answer. Raises as `generate`.
        """
        answer = self.submit(Request(tuple(self.encode(prompt)), sampling))
        try:
            while answer.finish_reason is None:
                if answer in self.step():
                    tokens, text = answer.news()
                    yield Piece(text, tokens, answer)
        finally:
            self.cancel(answer)

    # One step ---------------------------------------------------------------------------------------------------------

    def _check(self, request: Request) -> None:
        self.encode(request.prompt)
        length, count = len(request.prompt), request.sampling.max_new_tokens
        if count > self.room(length):
            raise UserError(
                f"a prompt of {length} tokens and max_new_tokens {count} exceed the model's context of {self.context} "
                "tokens (max_position_embeddings); shorten the prompt or ask for fewer tokens"
            )

    def _recover(self) -> None:
        """Cancels all that is in work, and forgets what the cache held."""
        for answer in list(self._tasks):
            self.cancel(answer)
        self._scheduler.forget()
        if self._cache is not None:
            self._cache = self.model.new_cache(len(self._scheduler.rows), self._length)

    def _reserve(self, rows: int, length: int) -> None:
        """Makes the cache at least as large."""
        rows, length = max(rows, len(self._scheduler.rows)), max(length, self._length)
        if (rows, length) == (len(self._scheduler.rows), self._length):
            return
        if self._cache is None:
            self._cache = self.model.new_cache(rows, length)
        else:
            self._cache = decode.enlarge(self.model, self._cache, rows, length)
        self._scheduler.grow(rows)
        self._length = length
        self._widths, self._settings = set(), None

    def _admit(self) -> None:
        waiting = self._scheduler.waiting
        if self._grows and waiting:
            wanted = min(self.slots, len(self._scheduler.at_work) + len(waiting))
            first = [
                len(task.ids) + min(task.answer.request.sampling.max_new_tokens, FIRST_ROOM)
                for task in itertools.islice(waiting, wanted)
            ]
            self._reserve(bucket(wanted, smallest=1, multiple=16), round_up(max(first), SLOT_MULTIPLE))
        for copy in self._scheduler.admit():
            self._cache = decode.copy_row(self._cache, *map(np.int32, copy))

    def _read(self, chunks: list[tuple[Task, int]]) -> list[Answer]:
        """Reads so many more tokens of prompts; those that are read to their end get their first token."""
        tasks = [task for task, _ in chunks]
        width = bucket(max(count for _, count in chunks), smallest=16, multiple=1024)
        rows = self._width(len(tasks), reading=True)
        tokens_BP, (starts_B, counts_B, lengths_B) = np.zeros((rows, width), np.int32), np.zeros((3, rows), np.int32)
        places = self._places(tasks, rows)
        for place, (task, count) in zip(places, chunks, strict=True):
            held = task.row.held
            starts_B[place], counts_B[place], lengths_B[place] = len(held), count, len(task.ids)
            tokens_BP[place, :count] = task.ids[len(held) : len(held) + count]
            held += task.ids[len(held) : len(held) + count]
            self.counts["prompt_tokens"] += count
        settings = self._settings_of(tasks, rows)
        logits_BV, self._cache = decode.read(
            self.model, self.params, self._cache, tokens_BP, settings.rows_B, starts_B, counts_B, lengths_B
        )
        done = [len(task.row.held) == len(task.ids) for task in tasks]
        if not any(done):
            jax.block_until_ready(logits_BV)
            return []
        chosen = jax.device_get(decode.choose(logits_BV, lengths_B, settings))
        return self._take(tasks, jax.tree.map(lambda all_B: all_B[None, places], chosen), done)

    def _make(self, tasks: list[Task], patient: bool) -> list[Answer]:
        """Makes more tokens in all rows that run."""
        rows = self._width(len(tasks))
        count = self._count(tasks, patient)
        if self._grows:
            needed = max(len(task.ids) for task in tasks) + count - 1
            if needed > self._length:
                self._reserve(0, min(2 * self._length, round_up(self.context, SLOT_MULTIPLE)))
        newest_B, lengths_B = np.zeros((2, rows), np.int32)
        settings = self._settings_of(tasks, rows)
        for place, task in zip(self._places(tasks, rows), tasks, strict=True):
            newest_B[place], lengths_B[place] = task.ids[-1], len(task.ids)
        started = time.perf_counter()
        chosen, made, self._cache = decode.make(
            self.model, self.params, self._cache, newest_B, lengths_B, settings, np.int32(count), most=MOST_STEPS
        )
        chosen, made = jax.device_get((chosen, made))
        self._widths.add(rows)
        self._seconds = (time.perf_counter() - started) / int(made)
        places = self._places(tasks, rows)
        chosen = jax.tree.map(lambda all_NB: all_NB[:made, places], chosen)
        return self._take(tasks, chosen, [True] * len(tasks))

    def _take(self, tasks: list[Task], chosen: decode.Chosen, is_due: Sequence[bool]) -> list[Answer]:
        """Gives the answers of the tasks that are due their new tokens, (N, tasks), up to the one that ends them."""
        grown = []
        for task, due, ids, logprobs in zip(
            tasks, is_due, chosen.token.T.tolist(), chosen.logprob.T.tolist(), strict=True
        ):
            if not due:
                continue
            answer = task.answer
            for token in map(Token, ids, logprobs):
                answer.add(token)
                task.ids.append(token.id)
                self.counts["generated_tokens"] += 1
                if answer.finish_reason:
                    break
            task.row.held += task.ids[len(task.row.held) : -1]  # the newest is not in the cache
            if answer.finish_reason:
                self._scheduler.drop(task)
                del self._tasks[answer]
            grown.append(answer)
        return grown

    def _count(self, tasks: list[Task], patient: bool) -> int:
        """How many tokens the next call makes in each row: until a row may be free for one that waits; so few that who
        reads along sees them come."""
        left = [task.answer.room for task in tasks]
        others_wait = bool(self._scheduler.waiting) or len(tasks) < len(self._scheduler.at_work)
        count = min(MOST_STEPS, min(left) if others_wait else max(left))
        if patient:
            return count
        return max(1, min(count, int(LATENCY / self._seconds) if self._seconds else 1))

    def _width(self, tasks: int, reading: bool = False) -> int:
        """Rows of the program: a power of two, or all of the cache's; of running ones rather more than to compile."""
        every = len(self._scheduler.rows)
        fitting = [] if reading else [width for width in self._widths if width >= tasks]
        return min(fitting, default=min(bucket(tasks, smallest=1, multiple=every), every))

    def _places(self, tasks: list[Task], rows: int) -> list[int]:
        """Where tasks stand in the arrays of a program: if it takes the whole cache, as in that."""
        return [task.row.number for task in tasks] if rows == len(self._scheduler.rows) else list(range(len(tasks)))

    def _settings_of(self, tasks: list[Task], rows: int) -> decode.Settings:
        if self._settings and self._settings[0] == (tasks, rows):
            return self._settings[1]
        configs = [GREEDY] * rows
        rows_B, ends_BE = np.full(rows, len(self._scheduler.rows), np.int32), np.full((rows, ENDS), -1, np.int32)
        for place, task in zip(self._places(tasks, rows), tasks, strict=True):
            request = task.answer.request
            configs[place], rows_B[place] = request.sampling, task.row.number
            ends = (*request.stop_ids, *(() if request.sampling.ignore_eos else self.eos_ids))[:ENDS]
            ends_BE[place, : len(ends)] = ends
        settings = jax.device_put(decode.Settings(rows_B, SamplingValues.of(configs), ends_BE))
        self._settings = (tasks, rows), settings
        return settings

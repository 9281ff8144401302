"""The engine: many answers at once, each token of all of them in one step of the device.

What is answered when and where is the scheduler's; what is computed, `decode`'s. Arrays go to the device as they are
needed and come back as lists: the tokens live on the host, the keys and values of them in the cache.
"""

import dataclasses
import itertools
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from minimind_jax.convert.hf import check_vocabulary
from minimind_jax.data.images import Picture
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.inference.buckets import bucket, round_up
from minimind_jax.inference.image_encoder import check_images, signs_of
from minimind_jax.inference.programs import MOST_STEPS, Programs, patience
from minimind_jax.inference.request import Answer, Request, Token
from minimind_jax.inference.sampling import MAX_BIASES, MAX_TOP, Sampled, SamplingConfig
from minimind_jax.inference.scheduler import Scheduler, Task
from minimind_jax.inference.text import AnswerText
from minimind_jax.model import lora
from minimind_jax.model.transformer import LanguageModel, Params

Prompt = str | Sequence[int]
DEFAULT = SamplingConfig()

MOST_SLOTS = 64  # running at once, where the caller says nothing
SLOT_MULTIPLE = 128
SHORTEST_CACHE = 256  # tokens
FIRST_ROOM = 256  # new tokens a cache that grows holds at first
AHEAD = 8  # times as many requests as slots are begun behind the first one that is not answered
LATENCY = 0.04  # seconds that a call of several tokens takes at most, where someone reads along


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
    the start. When None it is the model's, and the cache grows to what requests need. queue: most requests that wait.
    adapters: low-rank adapters that requests may name (trees of the adapters alone, see `lora.stack`). sizes: numbers
    of rows below `slots` for which there is a program that makes tokens, where a context is given and nothing is warmed
    up; when empty, a few.

    Methods are called from one thread. `counts`: requests, prompt_tokens, cached_tokens (of these, that were not
    read anew) and generated_tokens so far.
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
        queue: int | None = None,
        adapters: Mapping[str, Params] | None = None,
        sizes: Sequence[int] = (),
    ):
        if eos_ids is None:
            eos_ids = {*model.config.end_ids, *(tokenizer.end_ids if tokenizer else ())}
        if tokenizer:
            check_vocabulary(tokenizer, model.config)
        self.adapters, self._stacked = tuple(adapters or ()), {}
        if adapters:
            stacked, self._stacked = lora.stack(list(adapters.values()), model.dtype)
            model = dataclasses.replace(model, adapter=stacked)
        self.model, self.tokenizer = unfused(model, params), tokenizer
        self.eos_ids, self.sampling = tuple(sorted(eos_ids)), sampling
        self.context = min(context or model.config.max_position_embeddings, model.config.max_position_embeddings)
        self.slots, self._grows = slots, context is None
        self.counts: Counter[str] = Counter()
        size = (0, 0) if self._grows else (slots, self.context)
        params = lora.join(params, self._stacked)
        self._programs = Programs(self.model, params, *size, not self._grows, self.adapters, sizes)
        scaling = model.config.rope_scaling  # with `dynamic` keys depend on the length of their prompt
        reuses = scaling is None or scaling.rope_type != "dynamic"
        self._scheduler = Scheduler(slots, size[0], queue, reuses)
        self._tasks: dict[Answer, Task] = {}
        self._has_read = False  # in the last step
        self._seconds = 0.0  # that a token of all rows took last

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
        return used / max(1, self._programs.rows * self._programs.length)

    @property
    def params(self) -> Params:
        """As they are laid out for generation."""
        return self._programs.params

    def load(self, params: Params) -> None:
        """Answers with other parameters from now on, and as a new engine would where its context was given: to the last
        bit. Raises ValueError while answers are in work."""
        if self.busy:
            raise ValueError("answers are in work; finish or cancel them before other parameters are loaded")
        self._programs.load(lora.join(params, self._stacked))
        self._scheduler.clear()
        self._has_read, self._seconds = False, 0.0

    def warm_up(self, report: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compiles all that a request may need, if the context was given; report: gets (done, of how many)."""
        if self._grows:
            raise ValueError("an engine whose cache grows compiles what it needs; give it a context")
        self._programs.warm_up(report)

    def submit(self, request: Request) -> Answer:
        """Takes a request: its answer grows with the steps.

        Raises UserError: a prompt that is empty, not of this vocabulary or, with its answer, longer than the context;
        Busy when the queue is full.
        """
        self._check(request)
        text = AnswerText(self.tokenizer, request.sampling.stop) if self.tokenizer else None
        answer = Answer(request, self.eos_ids, text)
        task = Task(answer, list(request.prompt), signs_of(request, self.model.config.vision))
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
        running, reading = self._scheduler.running, self._scheduler.reading
        if reading and (patient or not running or not self._has_read):
            self._has_read = True
            width, most = self._programs.chunk(reading[0].unread, 0 if patient else len(running))
            chunks = [(task, min(task.unread, width)) for task in reading[:most]]
            return self._read(chunks, width, self._programs.rows_for(len(chunks), reading=True))
        self._has_read = False
        if any(task.answer.request.constraint for task in running):
            return self._read([(task, 1) for task in running], 1, self._programs.rows_for(len(running)))
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

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig = DEFAULT, images: Sequence[Sequence[Picture]] = ()
    ) -> list[Answer]:
        """An answer to each prompt; the n-th draws with seed + n. images: of each prompt, where some show any.
        Raises as `encode` and `submit`."""
        samplings = [dataclasses.replace(sampling, seed=sampling.seed + n) for n in range(len(prompts))]
        asked = [
            Request(tuple(self.encode(prompt)), own, images=tuple(shown))
            for prompt, own, shown in zip(prompts, samplings, images or [()] * len(prompts), strict=True)
        ]
        for request in asked:
            self._check(request)
        return list(self.answers(asked))

    def answers(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """An answer to each request, in order. They are taken as slots come free, and some more; where the next one
        raises an error, those before are answered first."""
        requests, failed = iter(requests), None
        begun: deque[Answer] = deque()
        try:
            while True:
                try:
                    while failed is None and len(self._tasks) < 2 * self.slots and len(begun) < AHEAD * self.slots:
                        begun.append(self.submit(next(requests)))
                except (StopIteration, UserError) as error:
                    failed = error
                if not begun:
                    break
                while begun and begun[0].finish_reason:
                    yield _checked(begun.popleft())
                if begun:
                    self.step(patient=True)
        finally:
            for answer in begun:
                self.cancel(answer)
        if isinstance(failed, UserError):
            raise failed

    def stream(self, prompt: Prompt, sampling: SamplingConfig = DEFAULT, **options: Any) -> Iterator[Piece]:
        """The answer to one prompt, piece by piece: the first after one token, later ones a few tokens each.

        Gives the same tokens as `generate`. Leaving the loop ends the answer. options: of the `Request`. Raises as
        `generate`.
        """
        answer = self.submit(Request(tuple(self.encode(prompt)), sampling, **options))
        try:
            while True:  # steps for other answers, between two pieces, make this one grow too
                tokens, text = _checked(answer).news()
                if tokens:
                    yield Piece(text, tokens, answer)
                elif answer.finish_reason:
                    break
                else:
                    self.step()
        finally:
            self.cancel(answer)

    # One step ---------------------------------------------------------------------------------------------------------

    def _check(self, request: Request) -> None:
        """Raises UserError for what cannot be answered."""
        self.encode(request.prompt)
        length, count, vocabulary = len(request.prompt), request.sampling.max_new_tokens, self.model.config.vocab_size
        if count > self.room(length):
            raise UserError(
                f"a prompt of {length} tokens and max_new_tokens {count} exceed the model's context of {self.context} "
                "tokens (max_position_embeddings); shorten the prompt or ask for fewer tokens"
            )
        if request.sampling.stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer, and the model was loaded without one")
        if request.adapter and request.adapter not in self.adapters:
            there_are = ", ".join(self.adapters) or "none"
            raise UserError(f"there is no adapter {request.adapter}; there are {there_are}")
        for name, ids in (("logit_bias", (id for id, _ in request.logit_bias)), ("stop_ids", request.stop_ids)):
            if outside := [token for token in ids if not 0 <= token < vocabulary]:
                raise UserError(f"{name} has token id {outside[0]}; the model's ids are 0 to {vocabulary - 1}")
        if wrong := [(token, value) for token, value in request.logit_bias if not value < math.inf]:
            raise UserError(f"logit_bias of token {wrong[0][0]} is {wrong[0][1]}; it is a number, or -inf")
        if len(request.logit_bias) > MAX_BIASES:
            raise UserError(f"logit_bias has {len(request.logit_bias)} tokens; {MAX_BIASES} is the most")
        if not 0 <= request.top_logprobs <= MAX_TOP:
            raise UserError(f"top_logprobs is {request.top_logprobs}; it is from 0 to {MAX_TOP}")
        check_images(request, self.model.config.vision)

    def _recover(self) -> None:
        """Cancels all that is in work, and forgets what the cache held."""
        for answer in self._tasks:
            answer.finish("cancelled")
        self._tasks.clear()
        self._scheduler.clear()
        self._programs.clear()

    def _admit(self) -> None:
        if self._grows and (tasks := self._scheduler.next):
            wanted = min(self.slots, len(self._scheduler.at_work) + len(tasks))
            longest = max(
                len(task.ids) + min(task.answer.request.sampling.max_new_tokens, FIRST_ROOM) for task in tasks
            )
            rows, length = bucket(wanted, 1, 16), bucket(longest, SHORTEST_CACHE, 4096)
            self._programs.reserve(min(rows, self.slots), min(length, round_up(self.context, SLOT_MULTIPLE)))
            self._scheduler.grow(self._programs.rows)
        for copy in self._scheduler.admit():
            self._programs.copy(copy)

    def _read(self, chunks: list[tuple[Task, int]], width: int, rows: int) -> list[Answer]:
        """Reads so many more tokens; tasks that are read to their end get their next token."""
        tasks = [task for task, _ in chunks]
        logits_BV = self._programs.read(chunks, width, rows)
        for task, count in chunks:
            task.row.held += task.signs[len(task.row.held) :][:count]
        due = [task for task in tasks if len(task.row.held) == len(task.ids)]
        if not due:
            jax.block_until_ready(logits_BV)  # or calls pile up on the device
            return []
        masks, failed = {}, []
        for task in due:  # while the device reads
            if constraint := task.answer.request.constraint:
                try:
                    masks[task] = constraint.mask()
                    if not masks[task].any():
                        raise UserError("the form allows no token after what was answered")
                except Exception as error:
                    failed.append((task, error))
        sampled = self._programs.choose(tasks, due, logits_BV, masks)
        for task, error in failed:
            self._end(task, error)
        return self._take(due, sampled)

    def _make(self, tasks: list[Task], patient: bool) -> list[Answer]:
        """Makes more tokens in all rows that run."""
        count = self._count(tasks, patient)
        if max(len(task.ids) for task in tasks) + count - 1 > self._programs.length and self._grows:
            self._programs.reserve(0, min(2 * self._programs.length, round_up(self.context, SLOT_MULTIPLE)))
        started = time.perf_counter()
        sampled = self._programs.make(tasks, count)
        self._seconds = (time.perf_counter() - started) / len(sampled.token_B)
        return self._take(tasks, sampled)

    def _take(self, tasks: list[Task], sampled: Sampled) -> list[Answer]:
        """Gives the answers their new tokens, (steps, tasks), up to the one that ends them."""
        columns = [column.swapaxes(0, 1).tolist() for column in sampled[:3]]
        for n, (task, *values) in enumerate(zip(tasks, *columns, strict=True)):
            answer, tops = task.answer, task.answer.request.top_logprobs
            if answer.finish_reason:  # its constraint had no mask
                continue
            if not answer.tokens:
                self.counts += Counter(prompt_tokens=answer.prompt_tokens, cached_tokens=answer.cached_tokens)
            for step, token in enumerate(map(Token, *values)):
                if tops:
                    best = zip(
                        sampled.top_ids_BT[step, n].tolist(), sampled.top_logprobs_BT[step, n].tolist(), strict=True
                    )
                    token = token._replace(top=tuple(itertools.islice(best, tops)))
                try:
                    answer.add(token)
                except Exception as error:
                    self._end(task, error)
                    break
                task.add(token.id)
                self.counts["generated_tokens"] += 1
                if answer.finish_reason:
                    break
            if answer.error is None:
                task.row.held += task.signs[len(task.row.held) : -1]  # the newest is not in the cache
                if answer.finish_reason:
                    self._end(task)
        return [task.answer for task in tasks]

    def _end(self, task: Task, error: Exception | None = None) -> None:
        """Frees the row of a task that is finished, or whose constraint failed: that ends its own answer alone."""
        if error is not None:
            task.answer.error = error
            task.answer.finish("error")
        self._scheduler.drop(task)
        del self._tasks[task.answer]

    def _count(self, tasks: list[Task], patient: bool) -> int:
        """How many tokens the next call makes in each row; so few that who reads along sees them come."""
        count = min(MOST_STEPS, max(task.answer.room for task in tasks))
        if patient:
            return count
        if not all(task.answer.tokens for task in tasks):  # of a prompt that another row held
            return 1
        latency = LATENCY * patience(len(tasks))
        return max(1, min(count, int(latency / self._seconds) if self._seconds else 1))


def _checked(answer: Answer) -> Answer:
    """The answer; raises what made its constraint fail."""
    if answer.error is not None:
        raise answer.error
    return answer


def unfused(model: LanguageModel, params: Params) -> LanguageModel:
    """`model`, computed by plain products if its parameters lie on several devices: generation is left to the compiler,
    which can cut these and no fused attention."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if sharding is None or sharding.num_devices == 1:
        return model
    compute = dataclasses.replace(model.compute, attention="grouped", experts="reference")
    return dataclasses.replace(model, compute=compute)

"""Text from a model: whole answers for a batch of prompts, or one answer as a stream."""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from minimind_jax.convert.hf import check_vocabulary
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.inference.buckets import bucket, round_up
from minimind_jax.inference.decode import Controls, decode, grow, prefill
from minimind_jax.inference.sampling import SamplingConfig, SamplingValues
from minimind_jax.inference.text import AnswerText
from minimind_jax.model.transformer import LanguageModel, Params

Prompt = str | Sequence[int]
DEFAULT = SamplingConfig()

SLOT_MULTIPLE = 128
FIRST_ROOM = 256  # new tokens the buffers hold at first; they double when an answer is longer
STOP_CHECK_EVERY = 16  # tokens between two looks for stop strings in a batch
STREAM_SECONDS = 0.04  # a streamed chunk is made longer until it takes about so long


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer.

    text: without special tokens, and cut before a stop string. "" if the generator has no tokenizer.
    ids: the tokens made, with the end-of-text token or those of the stop string.
    logprobs: of each of ids, the model's own: log softmax of its logits, whatever the sampling.
    finish_reason: `stop` (end-of-text token or stop string) or `length`.
    prompt_tokens: length of the prompt.
    """

    text: str
    ids: list[int]
    logprobs: list[float]
    finish_reason: str
    prompt_tokens: int


class Piece(NamedTuple):
    """A step of a stream: text that became final, tokens made since the last piece, and at the end the whole."""

    text: str
    tokens: int
    completion: Completion | None = None


class Generator:
    """A model ready to generate.

    tokenizer: None works on token ids alone: no text in prompts, completions or stop strings. eos_ids: tokens that end
    an answer; when None, those of the model's configuration, what the tokenizer's template writes behind an answer, and
    its end-of-text token. sampling: what the model's makers mean it to be sampled with; kept for the caller, used by no
    method.
    """

    def __init__(
        self,
        model: LanguageModel,
        params: Params,
        tokenizer: Tokenizer | None = None,
        eos_ids: Iterable[int] | None = None,
        sampling: SamplingConfig = DEFAULT,
    ):
        if eos_ids is None:
            eos_ids = {*model.config.end_ids, *(tokenizer.end_ids if tokenizer else ())}
        if tokenizer:
            check_vocabulary(tokenizer, model.config)
        self.model, self.tokenizer = unfused(model, params), tokenizer
        self.params = self.model.unstack(params)
        self.eos_ids, self.sampling = tuple(sorted(eos_ids)), sampling

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig = DEFAULT) -> list[Completion]:
        """An answer for each prompt, all in one batch.

        prompts: text, in which special tokens are recognised and to which none are added, or token ids.
        Raises UserError: an empty prompt, ids that are not in the vocabulary, or a prompt too long for the model.
        """
        if not prompts:
            return []
        batch = _Batch(self, [self.encode(prompt) for prompt in prompts], sampling)
        texts = self._texts(len(prompts), sampling)
        while not batch.done:
            batch.run(STOP_CHECK_EVERY if sampling.stop else sampling.max_new_tokens)
            if sampling.stop:
                batch.push(texts)
        batch.push(texts)
        for text in texts:
            text.finish()
        return batch.completions(texts)

    def stream(self, prompt: Prompt, sampling: SamplingConfig = DEFAULT) -> Iterator[Piece]:
        """The answer to one prompt, piece by piece: the first after one token, later ones a few tokens each.

        Gives the same tokens as `generate`. Leaving the loop ends the generation. Raises as `generate`.
        """
        batch = _Batch(self, [self.encode(prompt)], sampling)
        texts = self._texts(1, sampling)
        chunk, seen = 1, 0
        while True:
            piece = batch.push(texts)
            made = len(batch.ids(0))
            yield Piece(piece, made - seen)
            seen = made
            if batch.done:
                break
            started = time.perf_counter()
            batch.run(chunk)
            if time.perf_counter() - started < STREAM_SECONDS / 2:
                chunk *= 2
        rest = "".join(text.finish() for text in texts)
        yield Piece(rest, 0, batch.completions(texts)[0])

    def encode(self, prompt: Prompt) -> list[int]:
        """Checked token ids of a prompt."""
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
        return self.model.config.max_position_embeddings - prompt_tokens

    def _texts(self, rows: int, sampling: SamplingConfig) -> list[AnswerText]:
        if self.tokenizer is None:
            if sampling.stop:
                raise UserError("stop strings need a tokenizer, and the model was loaded without one")
            return []
        return [AnswerText(self.tokenizer, sampling.stop) for _ in range(rows)]


class _Batch:
    """A batch in generation: its state on the device, and a copy of its tokens on the host."""

    def __init__(self, generator: Generator, prompts: list[list[int]], sampling: SamplingConfig):
        longest = self.longest = max(map(len, prompts))
        if sampling.max_new_tokens > generator.room(longest):
            raise UserError(
                f"a prompt of {longest} tokens and max_new_tokens {sampling.max_new_tokens} exceed the model's context "
                f"of {generator.room(0)} tokens (max_position_embeddings); shorten the prompt or ask for fewer tokens"
            )
        self.generator, self.sampling = generator, sampling
        self.prompt_lengths = [len(prompt) for prompt in prompts]
        self.pushed = [0] * len(prompts)
        self.stopped_at: list[int | None] = [None] * len(prompts)  # length of answers that a stop string ended
        rows = bucket(len(prompts), smallest=1, multiple=16)
        width = bucket(longest, smallest=16, multiple=1024)
        tokens_BP = np.zeros((rows, width), np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BP[row, : len(prompt)] = prompt
        self.eos_ids = (-1,) if sampling.ignore_eos else generator.eos_ids or (-1,)
        own = [dataclasses.replace(sampling, seed=sampling.seed + row) for row in range(rows)]
        self.controls = Controls(SamplingValues.of(own), np.array(self.eos_ids, np.int32))
        self.state = prefill(
            generator.model,
            generator.params,
            tokens_BP,
            np.array(self.prompt_lengths + [0] * (rows - len(prompts)), np.int32),
            self.controls,
            slots=round_up(width + min(sampling.max_new_tokens, FIRST_ROOM), SLOT_MULTIPLE),
        )
        self._read()

    @property
    def done(self) -> bool:
        return self.made >= self.sampling.max_new_tokens or bool(self.ended_B.all())

    def run(self, count: int) -> None:
        """Makes up to `count` more tokens in every row that has not ended."""
        model, params = self.generator.model, self.generator.params
        target = min(self.made + count, self.sampling.max_new_tokens)
        while self.made < target and not self.ended_B.all():
            slots = self.state.tokens_BS.shape[1]
            if self.longest + self.made == slots:
                slots *= 2
                self.state = grow(model, self.state, slots=slots)
            until = np.int32(min(target, slots - self.longest))
            self.state = decode(model, params, self.state, self.controls, until)
            self._read()

    def _read(self) -> None:
        # copies: a view of a buffer would keep the next step from reusing it
        self.made, self.lengths_B = int(self.state.made), np.array(self.state.lengths_B)
        self.tokens_BS, self.logprobs_BS = np.array(self.state.tokens_BS), np.array(self.state.logprobs_BS)
        self.ended_B = np.array(self.state.ended_B)

    def ids(self, row: int) -> list[int]:
        """The answer so far, up to and with the token that ended it."""
        ids = self.tokens_BS[row, self.prompt_lengths[row] : self.lengths_B[row]].tolist()
        end = next((n + 1 for n, token in enumerate(ids) if token in self.eos_ids), len(ids))
        return ids[: min(end, self.stopped_at[row] or end)]

    def push(self, texts: list[AnswerText]) -> str:
        """Gives new tokens to the texts and ends the rows in which a stop string was completed; the new text."""
        pieces = []
        for row, text in enumerate(texts):
            ids = self.ids(row)
            for count, token in enumerate(ids[self.pushed[row] :], self.pushed[row] + 1):
                if token not in self.eos_ids:
                    pieces.append(text.push(token))
                if text.stopped:
                    self.stopped_at[row], self.ended_B[row] = count, True
                    self.state = self.state._replace(ended_B=jnp.asarray(self.ended_B))
                    break
            self.pushed[row] = len(ids)
        return "".join(pieces)

    def completions(self, texts: list[AnswerText]) -> list[Completion]:
        answers = []
        for row, prompt_tokens in enumerate(self.prompt_lengths):
            ids = self.ids(row)
            logprobs = self.logprobs_BS[row, prompt_tokens : prompt_tokens + len(ids)].tolist()
            stopped = self.stopped_at[row] is not None or ids[-1] in self.eos_ids
            text = texts[row].text if texts else ""
            answers.append(Completion(text, ids, logprobs, "stop" if stopped else "length", prompt_tokens))
        return answers


def unfused(model: LanguageModel, params: Params) -> LanguageModel:
    """`model`, computed by plain products if its parameters lie on several devices: generation is left to the compiler,
    which can cut these and no fused attention."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if sharding is None or sharding.num_devices == 1:
        return model
    compute = dataclasses.replace(model.compute, attention="grouped", experts="reference")
    return dataclasses.replace(model, compute=compute)

"""A policy that writes on a server: its weights go there as a folder, and what it writes comes back by HTTP.

The protocol is vLLM's of /v1/completions, which SGLang and `minimind serve` have as well: token ids in, token ids and
their log-probabilities out. docs/rl_servers.md says how each of them is started.
"""

import hashlib
import math
import queue
import secrets
import threading
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from minimind_jax.agreement import exchange, on_all, on_first
from minimind_jax.config.generation import SamplingConfig
from minimind_jax.convert.hf import save_hf
from minimind_jax.data.documents import begun
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.inference.request import Answer, Request, Token
from minimind_jax.inference.text import AnswerText
from minimind_jax.model.lora import merge
from minimind_jax.model.transformer import LanguageModel, Params
from minimind_jax.paths import absolute, as_path
from minimind_jax.rl.http import NotThere, Server

MOST_AT_ONCE = 256  # requests; a server holds more back anyhow
WAIT = 0.05  # seconds that a step waits for an answer, while environments may have something to say
PROBE = "1, 2, 3, 4,"
DRAWN = SamplingConfig(max_new_tokens=16, temperature=1.0, top_p=1.0, ignore_eos=True)
_SAME_NAMES = (  # of settings, here and there
    *("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("seed", "ignore_eos"),
)
SAME = 1e-3  # nats: the log-probabilities of a few tokens at two temperatures differ by more


class RemoteWriter:
    """Answers from a server, each whole when it comes. There is one thread for each of the requests under way.

    folder: of the policy that it serves. version: of the weights, as the server tells it with its answers;
    None where it does not. knows_temperature: its log-probabilities are of the distribution that was drawn from.
    """

    def __init__(self, server: Server, folder: Path, model: LanguageModel, tokenizer: Tokenizer, slots: int):
        self._server, self._folder = server, folder
        self._tokenizer, self._vocabulary = tokenizer, model.config.vocab_size
        self._ends = tuple(sorted({*model.config.end_ids, *tokenizer.end_ids}))
        self.version: str | None = None
        self.knows_temperature = True
        self._slots, self._threads = slots, 0
        self._asked: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._come: queue.SimpleQueue[tuple[Answer, Any]] = queue.SimpleQueue()
        self._open: set[Answer] = set()

    @property
    def busy(self) -> bool:
        """There are requests that are not answered."""
        return bool(self._open)

    def submit(self, request: Request) -> Answer:
        """Takes a request: its answer comes with the steps. Raises UserError where the server's log-probabilities would
        not be of what it draws from."""
        if request.constraint or request.logit_bias or request.top_logprobs or request.adapter:
            raise ValueError("a server is asked for plain answers: no form, biases, other tokens or adapters")
        if request.sampling.temperature not in (0, 1) and not self.knows_temperature:
            raise self.fault("returns log-probabilities from before the temperature, which is not 1")
        answer = self._begin(request)
        self._open.add(answer)
        if self._threads < min(len(self._open), self._slots):
            self._threads += 1
            threading.Thread(target=self._work, name="rollout", daemon=True).start()
        self._asked.put(answer)
        return answer

    def step(self, patient: bool = False) -> list[Answer]:
        """The answers that have come since, all of them whole; none where nothing comes for a while. Raises UserError
        where the server fails or returns something else; then all answers are cancelled."""
        grown: list[Answer] = []
        try:
            while self._open:
                answer, found = self._come.get(timeout=0.0 if grown else WAIT)
                if answer in self._open:
                    if isinstance(found, Exception):
                        raise found
                    self._take(answer, found)
                    self._open.discard(answer)
                    grown.append(answer)
        except queue.Empty:
            pass
        except BaseException:
            for answer in list(self._open):
                self.cancel(answer)
            raise
        return grown

    def cancel(self, answer: Answer) -> None:
        """Ends an answer as it is; the server may still write it. Nothing happens to one that has ended."""
        if answer in self._open:
            self._open.discard(answer)
            answer.finish("cancelled")

    def ask(self, request: Request) -> tuple[Answer, dict[str, Any]]:
        """One answer, and all that the server says with it. Raises as `step`."""
        answer = self._begin(request)
        reply = self._server.post("/v1/completions", _body(answer))
        self._take(answer, reply)
        return answer, reply

    def _begin(self, request: Request) -> Answer:
        return Answer(request, self._ends, AnswerText(self._tokenizer, request.sampling.stop))

    def _work(self) -> None:
        while True:
            answer = self._asked.get()
            if answer.finish_reason:  # cancelled before it was asked for
                continue
            try:
                found = self._server.post("/v1/completions", _body(answer))
            except Exception as error:  # for who waits
                found = error
            self._come.put((answer, found))

    def _take(self, answer: Answer, reply: Any) -> None:
        """Fills the answer with the tokens of a reply."""
        try:
            choice = reply["choices"][0]
            ids, drawn = choice.get("token_ids"), choice.get("sampled_logprobs")  # ours
            logprobs = drawn or (choice.get("logprobs") or {}).get("token_logprobs")
            version = (reply.get("metadata") or {}).get("weight_version")
        except (TypeError, KeyError, IndexError, AttributeError) as error:
            raise self.fault(f"has answered {str(reply)[:200]!r}, which is no completion") from error
        if not ids or not logprobs or len(ids) != len(logprobs):
            lacks = "token ids" if not ids else "log-probabilities of its tokens"
            raise self.fault(f"returns text without {lacks}, on which nothing can be trained")
        if self.version not in (None, version):
            raise self.fault(
                f"answers with other weights than it was given ({version!r}, not {self.version!r}): it was started "
                "anew, another run uses it, or there are several at this address"
            )
        if choice.get("prompt_token_ids") not in (None, list(answer.request.prompt)):
            raise self.fault("has put other tokens before the prompt, or in it")
        for token, logprob in zip(ids, logprobs, strict=True):
            if answer.finish_reason:
                raise self.fault(f"has written on behind the token {answer.tokens[-1].id}, which ends an answer")
            is_token = isinstance(token, int) and 0 <= token < self._vocabulary
            if not is_token or not isinstance(logprob, float | int) or not math.isfinite(logprob):
                words = f"the model's ids are 0 to {self._vocabulary - 1}"
                raise self.fault(f"returns the token {token!r} with log-probability {logprob!r}; {words}")
            answer.add(Token(token, logprob, logprob))
        if not answer.finish_reason:
            raise self.fault(
                f"has ended an answer at {len(ids)} of {answer.request.sampling.max_new_tokens} tokens "
                f"({choice.get('finish_reason')!r}), and not by a token that ends one: its context is too short, or it "
                "leaves the last token out"
            )

    def fault(self, what: str) -> UserError:
        """What is wrong with the server, and how a right one is started."""
        return UserError(
            f"the server {self._server.url} {what}. Start one that serves {self._folder} (docs/rl_servers.md):\n"
            f"  minimind serve --model {self._folder} --update_weights\n"
            f"  VLLM_SERVER_DEV_MODE=1 vllm serve {self._folder} --logprobs-mode processed_logprobs\n"
            f"  python -m sglang.launch_server --model-path {self._folder}"
        )


def _body(answer: Answer) -> dict[str, Any]:
    """An answer as it is asked for: nothing is left to the model's generation_config.json."""
    sampling = answer.request.sampling
    return {
        "prompt": list(answer.request.prompt),
        **{name: getattr(sampling, name) for name in _SAME_NAMES},
        "max_tokens": sampling.max_new_tokens,
        "top_k": sampling.top_k or -1,  # off, in all versions of vLLM
        "stop": list(sampling.stop) or None,
        "stop_token_ids": list(answer.ends),
        "logprobs": 0,  # of the tokens that were drawn, and no others
        "return_token_ids": True,
    }


class RemotePolicy:
    """Writes on a server with the parameters in training.

    server: its URL, with or without /v1. folder: where the policy is written to; the server reads it under the same
    path. model, tokenizer: of the run. slots: requests at once, of this process; 0 for as many as are sensible.
    seconds, patience: see `Server`.
    """

    def __init__(
        self,
        server: str,
        folder: str | Path,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        slots: int = 0,
        seconds: float = 600.0,
        patience: float = 300.0,  # a server that was started together with the run reads its weights first
    ):
        self._server = Server(server.rstrip("/").removesuffix("/v1"), seconds, patience)
        self._folder = absolute(as_path(folder))
        self._model, self._tokenizer = model, tokenizer
        slots = min(slots or MOST_AT_ONCE, MOST_AT_ONCE)
        self._writer = RemoteWriter(self._server, self._folder, model, tokenizer, slots)
        self._name, self._loads = exchange(secrets.token_hex(4))[0], 0
        self._before: tuple[str, list[float]] | None = None  # what was written, and what the server made of it

    def load(self, params: Params) -> RemoteWriter:
        """The server with these parameters; others that stand beside the model's are left out, adapters are merged in.

        All processes call it together. Raises UserError where the server does not take them, or does not return token
        ids and log-probabilities of what they write; ValueError while answers are in work.
        """
        if self._writer.busy:
            raise ValueError("answers are in work; finish or cancel them before other parameters are loaded")
        own = {name: params[name] for name in self._model.abstract_params()}
        if jax.process_count() > 1:
            own = multihost_utils.process_allgather(own, tiled=True)
        self._loads += 1
        version = f"{self._name}-{self._loads}"
        on_first(lambda: self._hand_over(merge(own), version))
        on_all(lambda: self._check(version))
        return self._writer

    def _hand_over(self, params: Params, version: str) -> None:
        """Writes the folder, and has the server read it."""
        save_hf(self._folder, self._model.config, params, self._tokenizer, dtype=self._model.dtype.name)
        path = str(self._folder)
        try:
            self._server.post("/update_weights_from_disk", {"model_path": path, "weight_version": version})
        except NotThere:
            try:  # vLLM, where it is started for development
                self._server.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}})
                self._server.post("/reset_prefix_cache", {})
            except NotThere as error:
                raise self._writer.fault("does not take new weights") from error

    def _check(self, version: str) -> None:
        """Draws a few tokens: the server returns what is needed, has the same words, and these weights."""
        self._writer.version = None  # not known yet
        answer, reply = self._probe(DRAWN)
        shown = str(reply["choices"][0].get("text"))
        if _plain(shown) != _plain(answer.text):
            words = f"calls tokens {shown!r} that are {answer.text!r} by the run's tokenizer"
            raise self._writer.fault(f"has another tokenizer: it {words}")
        told = (reply.get("metadata") or {}).get("weight_version")
        if told is None:
            self._check_change([token.sampled_logprob for token in answer.tokens])
        elif told != version:
            raise self._writer.fault(f"answers with the weights {told!r}, and was given {version!r}")
        self._writer.version = told
        if self._loads == 1:
            is_ours = "sampled_logprobs" in reply["choices"][0]
            self._writer.knows_temperature = is_ours or self._tells_temperature()

    def _check_change(self, logprobs: list[float]) -> None:
        """For a server that tells no version: with other weights its answer is another, or it has kept the old ones
        (vLLM's issue 32718)."""
        written = hashlib.blake2b()
        for file in sorted(self._folder.glob("*.safetensors")):
            written.update(file.read_bytes())
        before, self._before = self._before, (written.hexdigest(), logprobs)
        if before and before[0] != self._before[0] and before[1] == logprobs:
            raise self._writer.fault("answers as before, though it was given other weights")

    def _tells_temperature(self) -> bool:
        """Whether log-probabilities are of what is drawn from: those of the likeliest tokens are others where it is
        warmer, or 0 where nothing else may be drawn."""
        told = []
        for temperature in (1.0, 2.0):
            sampling = SamplingConfig(max_new_tokens=8, temperature=temperature, top_k=1, top_p=1.0, ignore_eos=True)
            told.append(sum(token.sampled_logprob for token in self._probe(sampling)[0].tokens))
        return abs(told[0] - told[1]) > SAME or abs(told[0]) < SAME

    def _probe(self, sampling: SamplingConfig) -> tuple[Answer, dict[str, Any]]:
        return self._writer.ask(Request(tuple(begun(self._tokenizer, self._tokenizer.encode(PROBE))), sampling))


def _plain(text: str) -> str:
    """Without what stands for half a character, of which servers show more or less."""
    return text.replace("\N{REPLACEMENT CHARACTER}", "")

"""/v1/completions: text or token ids that are continued as they are."""

from collections.abc import Iterator
from typing import Any

from minimind_jax.config.serving import ServeConfig
from minimind_jax.data.documents import begun
from minimind_jax.inference.splitter import Part
from minimind_jax.serve import logprobs
from minimind_jax.serve.answers import Answers, Choice
from minimind_jax.serve.chat import Asked, heading
from minimind_jax.serve.drawing import count_of, extras_of, requests_of, sampling_of
from minimind_jax.serve.errors import refused
from minimind_jax.serve.forms import form_of
from minimind_jax.serve.models import Served
from minimind_jax.serve.protocol import CompletionRequest
from minimind_jax.serve.stream import Shape, event

DEFAULT_TOKENS = 16  # OpenAI's


def ask(body: CompletionRequest, served: Served, config: ServeConfig) -> Asked:
    """Raises ApiError or UserError for a bad request."""
    if body.suffix:
        raise refused("suffix: text is continued, not filled in; leave it out", "suffix")
    if body.best_of not in (None, body.n or 1):
        raise refused("best_of is not chosen from; ask for n answers and choose", "best_of")
    if body.echo and body.logprobs is not None:
        raise refused("logprobs of a prompt that is echoed are not computed; leave out one of them", "logprobs")
    requests, choices, prompts = [], [], prompts_of(body, served)
    count, form = count_of(body, len(prompts), config), form_of(body)
    for index, prompt in enumerate(prompts):
        name = f"prompt[{index}]" if len(prompts) > 1 else "prompt"
        sampling = sampling_of(body, served, prompt, body.max_tokens or DEFAULT_TOKENS, name)
        bind = form and form.binder(served.grammars, sampling.max_new_tokens)
        more = {**extras_of(body, served), "top_logprobs": body.logprobs or 0}
        choices += [Choice(len(choices) + n, prompt) for n in range(count)]
        requests += requests_of(served, prompt, sampling, count, bind, **more)
    return requests, choices


def prompts_of(body: CompletionRequest, served: Served) -> list[list[int]]:
    """The ids of every prompt: ids as they are given, text as a document begins in training."""
    prompts = token_lists(body.prompt, served, "prompt")
    if isinstance(body.prompt, str) or isinstance(body.prompt[0], str):
        prompts = [begun(served.tokenizer, ids) for ids in prompts] if body.add_special_tokens is not False else prompts
    return prompts


def token_lists(value: Any, served: Served, name: str) -> list[list[int]]:
    """The token ids of a text, a list of texts, ids, or a list of ids. Raises ApiError."""
    if isinstance(value, str) or isinstance(value[0], int):
        value = [value]
    for ids in value:
        if isinstance(ids, list) and max(ids) >= served.vocabulary:
            raise refused(f"{name}: {max(ids)} is none of the ids 0 to {served.vocabulary - 1}", name)
    return [served.tokenizer.encode(each) if isinstance(each, str) else each for each in value]


class CompletionShape(Shape):
    """The objects of one completion."""

    def __init__(self, body: CompletionRequest, served: Served):
        self._body, self._served = body, served
        self._base = heading("cmpl-", served) | {"object": "text_completion"}
        self._offsets: dict[int, int] = {}

    def whole(self, answers: Answers) -> dict[str, Any]:
        choices = [self._choice(choice, self._echo(choice) + choice.text) for choice in answers.choices]
        return {**self._base, "choices": choices, "usage": answers.usage(), **self._served.metadata}

    def begin(self, answers: Answers) -> Iterator[str]:
        for choice in answers.choices if self._body.echo else ():
            yield event({**self._base, "choices": [self._choice(choice, self._echo(choice))]})

    def grow(self, choice: Choice, parts: list[Part]) -> Iterator[str]:
        text = "".join(part.content for part in parts)
        if text or choice.finish_reason:
            yield event({**self._base, "choices": [self._choice(choice, text)]})

    def finish(self, answers: Answers) -> Iterator[str]:
        if self._body.stream_options and self._body.stream_options.include_usage:
            yield event({**self._base, "choices": [], "usage": answers.usage()})

    def _echo(self, choice: Choice) -> str:
        return self._served.tokenizer.decode(choice.prompt) if self._body.echo else ""

    def _choice(self, choice: Choice, text: str) -> dict[str, Any]:
        body, tokens = self._body, choice.fresh()
        end = {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
        shown = {"index": choice.index, "text": text, "logprobs": None, **end}
        if body.logprobs is not None:
            offset = self._offsets.get(choice.index, 0)
            shown["logprobs"] = told = logprobs.of_completion(self._served.tokenizer, tokens, body.logprobs, offset)
            self._offsets[choice.index] = offset + sum(map(len, told["tokens"]))
        if body.return_token_ids:
            shown |= {**logprobs.of_ids(tokens), "prompt_token_ids": choice.prompt}
        return shown

"""What a request asks of the engine: which answers, drawn how, within which bounds."""

import dataclasses
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BaseModel

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.config.serving import ServeConfig
from minimind_jax.inference.request import Constraint, Request
from minimind_jax.serve import log
from minimind_jax.serve.errors import refused
from minimind_jax.serve.models import Served
from minimind_jax.serve.protocol import WITHOUT_A_WORD, ChatRequest, Drawing, ResponsesRequest, Sampling

MOST_SEED = 2**63 - 1  # of a SamplingConfig
# What other servers follow, and what to do here: vLLM's; forms of answers as llama.cpp, SGLang and ollama are asked for
# them; OpenAI's old tools.
_FORM = "the form of an answer is asked for by response_format (of responses text.format) or structured_outputs"
_VLLMS = (
    "min_tokens bad_words allowed_token_ids include_stop_str_in_output truncate_prompt_tokens chat_template echo audio "
    "use_beam_search length_penalty best_of prompt_logprobs prompt_embeds documents logits_processors modalities "
    "skip_special_tokens add_generation_prompt"
)
_NOT_FOLLOWED = {
    **dict.fromkeys(_VLLMS.split(), "leave it out"),
    **dict.fromkeys("grammar json_schema regex ebnf structural_tag format".split(), _FORM),
    **dict.fromkeys(("tools", "messages"), "it is for chat completions"),
    **{"functions": "tools are offered by tools", "function_call": "call it tool_choice"},
    **{"max_output_tokens": "call it max_tokens", "prompt": "no prompts are stored here; send the words themselves"},
}
_LOGPROBS = "chat completions tell log-probabilities"
_CHAT_ALONE = ChatRequest.model_fields.keys() - ResponsesRequest.model_fields.keys() - {"return_token_ids"}
_OF_CHAT = {  # in responses
    **dict.fromkeys((*sorted(_CHAT_ALONE), "stop_sequences"), "leave it out"),
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), "call it max_output_tokens"),
    **{"response_format": "call it text.format", "messages": "call it input"},
    **dict.fromkeys(("logprobs", "top_logprobs"), _LOGPROBS),
}
_ONE = dict.fromkeys(("n", "best_of", "length_penalty"), (1,))
_NEUTRAL = {**_ONE, "modalities": [["text"]], "function_call": ["auto", "none"]}  # values that change nothing
_SETTINGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def tell_ignored(body: BaseModel) -> None:
    """Has the log say which fields of a body, and of what stands within it, change nothing."""
    for name, value in (body.model_extra or {}).items():
        if name not in WITHOUT_A_WORD and value not in (None, False, [], {}):
            log.once(f"{type(body).__name__}: field {name[:40]!r} is ignored")
    for name in type(body).model_fields:
        if isinstance(inner := getattr(body, name), BaseModel):
            tell_ignored(inner)


def refuse_others(body: BaseModel) -> None:
    """Raises ApiError for a setting that would change the answer elsewhere, and does not here."""
    extra, is_response = body.model_extra or {}, isinstance(body, ResponsesRequest)
    table = {**_NOT_FOLLOWED, **(_OF_CHAT if is_response else {})}
    given = {name for name, value in extra.items() if _changes(name, value, body)} - WITHOUT_A_WORD
    if name := next((name for name in table if name in given), None):
        raise refused(f"{name} is not followed here: {table[name]}", name)
    if is_response and "output_text.logprobs" in str(extra.get("include")):
        raise refused(f"include: {_LOGPROBS}", "include")


def _changes(name: str, value: Any, body: BaseModel) -> bool:
    """Whether a setting asks for another answer than this server's."""
    if name == "add_generation_prompt":
        return value is False and isinstance(body, ChatRequest) and not body.continue_final_message
    return value is False if name == "skip_special_tokens" else bool(value) and value not in _NEUTRAL.get(name, ())


def sampling_of(
    body: Sampling, served: Served, prompt: Sequence[int], max_tokens: int | None, name: str = "messages"
) -> SamplingConfig:
    """How each answer to a prompt is drawn; its seed is the first answer's. Raises ApiError for a prompt that leaves no
    room. max_tokens: asked for; None for all that there is room for. name: of what the prompt is made of."""
    room = served.context - len(prompt)
    if room < 1:
        raise refused(
            f"This model's maximum context length is {served.context} tokens. However, your prompt has {len(prompt)} "
            f"tokens, which leaves no room for an answer. Please reduce the length of the {name}.",
            name,
            "context_length_exceeded",
        )
    given = {name: value for name in _SETTINGS if (value := getattr(body, name)) is not None}
    given["top_k"] = max(0, given.get("top_k", served.sampling.top_k))  # -1 is vLLM's off
    stop = getattr(body, "stop", None) or ()
    return dataclasses.replace(
        served.sampling,
        max_new_tokens=min(max_tokens or room, room),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        ignore_eos=bool(getattr(body, "ignore_eos", None)),
        seed=secrets.randbelow(2**61) if body.seed is None else body.seed,
        **given,
    )


def count_of(body: Drawing, prompts: int, config: ServeConfig) -> int:
    """Answers to each of so many prompts. Raises ApiError for more than a request may ask for."""
    count = body.n or 1
    if count * prompts > config.max_n:
        raise refused(f"the request asks for {count * prompts} answers; at most {config.max_n} are made at once", "n")
    return count


def requests_of(
    served: Served,
    prompt: list[int],
    sampling: SamplingConfig,
    count: int,
    bind: Callable[[], Constraint] | None,
    **more: Any,
) -> list[Request]:
    """So many answers to a prompt: the n-th draws with seed + n, or ApiError. bind: makes what binds one of them."""
    if sampling.seed + count - 1 > MOST_SEED:
        raise refused(f"seed: the last of {count} answers would draw with more than {MOST_SEED}", "seed")
    return [
        Request(
            tuple(prompt),
            dataclasses.replace(sampling, seed=sampling.seed + n),
            constraint=bind() if bind else None,
            adapter=served.adapter,
            **more,
        )
        for n in range(count)
    ]


def extras_of(body: Drawing, served: Served) -> dict[str, Any]:
    """Stop ids and biases, as the engine takes them. Raises ApiError."""
    stop_ids = tuple(dict.fromkeys(body.stop_token_ids or ()))
    bias = body.logit_bias or {}
    for name, tokens in (("logit_bias", bias), ("stop_token_ids", map(str, stop_ids))):
        for token in tokens:
            if not (token.isascii() and token.isdecimal() and len(token) < 10 and int(token) < served.vocabulary):
                raise refused(f"{name}: {token[:20]!r} is none of the ids 0 to {served.vocabulary - 1}", name)
    return {"stop_ids": stop_ids, "logit_bias": tuple((int(token), value) for token, value in bias.items())}

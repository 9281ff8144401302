"""Log-probabilities of tokens, as chat and as plain completions tell them."""

from collections.abc import Sequence
from typing import Any

from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.inference.request import Token

LEAST = -9999.0  # for minus infinity, which JSON cannot say


def of_chat(tokenizer: Tokenizer, tokens: Sequence[Token], top: int) -> dict[str, Any]:
    """`choices[].logprobs`; the bytes of a token tell what its text cannot, where a character spans several."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        piece = _bytes(tokenizer, token)
        return {"token": piece.decode("utf-8", "replace"), "logprob": max(logprob, LEAST), "bytes": list(piece)}

    content = [
        {**entry(token.id, token.logprob), "top_logprobs": [entry(*likely) for likely in token.top[:top]]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def of_completion(tokenizer: Tokenizer, tokens: Sequence[Token], top: int, offset: int) -> dict[str, Any]:
    """The older form: lists beside each other. offset: of the first token in the text."""
    words = [_text(tokenizer, token.id) for token in tokens]
    offsets = [offset + sum(map(len, words[:n])) for n in range(len(words))]
    likely = [{_text(tokenizer, i): max(value, LEAST) for i, value in token.top[:top]} for token in tokens]
    return {
        "tokens": words,
        "token_logprobs": [max(token.logprob, LEAST) for token in tokens],
        "top_logprobs": likely if top else None,
        "text_offset": offsets,
    }


def of_ids(tokens: Sequence[Token]) -> dict[str, Any]:
    """What `return_token_ids` adds: vLLM's `token_ids`, and log-probabilities of the distribution that they were drawn
    from, where `logprobs` are of the model's own."""
    return {
        "token_ids": [token.id for token in tokens],
        "sampled_logprobs": [max(token.sampled_logprob, LEAST) for token in tokens],
    }


def _text(tokenizer: Tokenizer, token: int) -> str:
    return _bytes(tokenizer, token).decode("utf-8", "replace")


def _bytes(tokenizer: Tokenizer, token: int) -> bytes:
    return tokenizer.byte_pieces[token] if token < len(tokenizer.byte_pieces) else b""

"""/v1/embeddings, /classify and /score: what is computed without a word being made."""

import asyncio
import base64
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minimind_jax.evaluate.classification import classify_logits
from minimind_jax.inference.image_prompts import open_parts
from minimind_jax.inference.score import PictureScorer, Scorer
from minimind_jax.serve import log, pictures
from minimind_jax.serve.chat import heading
from minimind_jax.serve.completions import token_lists
from minimind_jax.serve.errors import refused
from minimind_jax.serve.models import Served
from minimind_jax.serve.prompts import read_talk
from minimind_jax.serve.protocol import ClassifyRequest, EmbeddingRequest, Json, ScoreRequest
from minimind_jax.serve.worker import Worker

TOGETHER, MOST_TOKENS = 8, 2048  # texts or pictures, and tokens, between which answers go on


async def embeddings(body: EmbeddingRequest, served: Served, worker: Worker) -> Json:
    """The means of the last hidden states, of length 1 unless `normalize` is false. Raises ApiError."""
    if served.adapter:
        raise refused(f"embeddings are the base model's, not the adapter {served.name}'s", "model")
    prompts = token_lists(body.input, served, "input")
    width = served.engine.model.config.hidden_size
    if body.dimensions not in (None, width):
        raise refused(f"dimensions: this model's vectors have {width}", "dimensions")
    if longest := max((len(ids) for ids in prompts if len(ids) > served.context), default=0):
        message = f"This model's maximum context length is {served.context} tokens. However, an input has {longest}."
        raise refused(message, "input", "context_length_exceeded")
    embedder = served.embedder
    embed, prepare = (functools.partial(work, served.engine.params) for work in (embedder.embed, embedder.prepare))
    vectors_ND = await _in_turns(embed, prompts, worker, prepare)
    if body.normalize is not False:
        vectors_ND /= np.maximum(np.linalg.norm(vectors_ND, axis=1, keepdims=True), 1e-12)
    shown = vectors_ND.tolist()
    if body.encoding_format == "base64":
        shown = [base64.b64encode(vector_D.astype("<f4").tobytes()).decode() for vector_D in vectors_ND]
    data = [{"object": "embedding", "index": n, "embedding": vector} for n, vector in enumerate(shown)]
    return {"object": "list", "model": served.name, "data": data, "usage": _usage(prompts)}


async def classify(body: ClassifyRequest, served: Served, worker: Worker, aside: Callable[..., Any]) -> Json:
    """Labels and probabilities. Long texts lose their end, as in training. aside: has a function read the request."""
    scorer = served.scorer
    if isinstance(scorer, PictureScorer):
        pixels = await aside(body, served, _pixels)
        logits, usage = await _in_turns(scorer.pixels, pixels, worker), _usage([])
    else:
        logits, usage = await _scored(scorer, await aside(body, served, _tokens), slice(scorer.max_tokens), worker)
    names, several = scorer.labels.names, scorer.labels.several
    data = [
        {
            "index": n,
            "label": names[int(np.argmax(likely))],
            **({"labels": [name for name, is_it in zip(names, found, strict=True) if is_it]} if several else {}),
            "probs": [float(share) for share in likely],
            "num_classes": len(names),
        }
        for n, (found, likely) in enumerate(zip(*classify_logits(logits, several), strict=True))
    ]
    return {**heading("classify-", served), "object": "list", "data": data, "usage": usage}


def _pixels(body: ClassifyRequest, served: Served) -> list[np.ndarray]:
    parts = pictures.shown_in(body, served)
    return [picture.pixels for picture in open_parts(parts, served.scorer.tower, pictures.content_of, log.once)]


def _tokens(body: ClassifyRequest, served: Served) -> list[list[int]]:
    texts = body.input if isinstance(body.input, list) else [body.input]
    if wrong := [n for n, text in enumerate(texts) if not isinstance(text, str)]:
        raise refused(f"input[{wrong[0]}] is no text, and this model classifies texts", "input")
    return served.tokenizer.encode_batch(texts)


async def score(body: ScoreRequest, served: Served, worker: Worker) -> Json:
    """A reward model's scores of conversations. Long ones lose their beginning, as in training."""
    scorer = served.scorer
    talks = [read_talk(served, messages, None, False) for messages in _conversations(body)]
    prompts = [scorer.conversation_ids(talk.messages) for talk in talks]
    logits, usage = await _scored(scorer, prompts, slice(-scorer.max_tokens, None), worker)
    data = [{"index": n, "object": "score", "score": float(row[0])} for n, row in enumerate(logits)]
    return {**heading("score-", served), "object": "list", "data": data, "usage": usage}


def _conversations(body: ScoreRequest) -> list[list[Json]]:
    if body.messages is not None and body.text_1 is None and body.text_2 is None:
        if all(isinstance(each, dict) for each in body.messages):
            return [body.messages]
        if all(isinstance(each, list) and each and all(isinstance(m, dict) for m in each) for each in body.messages):
            return body.messages
        raise refused("messages: expected one conversation, or a list of conversations", "messages")
    if body.messages is not None or body.text_1 is None or body.text_2 is None:
        raise refused("expected messages, or text_1 (what the user says) and text_2 (answers to it)", "messages")
    asked, said = ([text] if isinstance(text, str) else text for text in (body.text_1, body.text_2))
    if len(asked) not in (1, len(said)):
        raise refused(f"text_1 has {len(asked)} texts and text_2 {len(said)}; expected as many, or one", "text_1")
    pairs = zip(asked * (len(said) if len(asked) == 1 else 1), said, strict=True)
    return [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]


async def _scored(scorer: Scorer, prompts: Sequence[list[int]], kept: slice, worker: Worker) -> tuple[np.ndarray, Json]:
    if any(len(ids) > scorer.max_tokens for ids in prompts):
        log.once(f"texts longer than {scorer.max_tokens} tokens are cut, as in training")
    cut = [ids[kept] for ids in prompts]
    return await _in_turns(scorer.score_ids, cut, worker, scorer.prepare), _usage(cut)


async def _in_turns(
    work: Callable[[list[Any]], np.ndarray],
    items: list[Any],
    worker: Worker,
    prepare: Callable[[list[list[int]]], None] | None = None,
) -> np.ndarray:
    """What the work makes of some items at a time, with answers going on between. prepare: compiles what the work of
    these texts needs, with answers going on meanwhile."""
    rows, left = [], items
    while left:
        count = TOGETHER
        while prepare and count > 1 and count * max(map(len, left[:count])) > MOST_TOKENS:
            count //= 2
        some, left = left[:count], left[count:]
        if prepare:
            await asyncio.to_thread(prepare, some)
        rows.append(await worker.run(work, some))
    return np.concatenate(rows)


def _usage(prompts: Sequence[Sequence[int]]) -> Json:
    count = sum(map(len, prompts))
    return {"prompt_tokens": count, "total_tokens": count, "completion_tokens": 0, "prompt_tokens_details": None}

"""/v1/embeddings, /classify and /score: what is computed without a word being made."""

import base64
import time
from collections.abc import Sequence

import numpy as np

from minimind_jax.evaluate.classification import classify_logits
from minimind_jax.inference.score import Scorer
from minimind_jax.serve import log
from minimind_jax.serve.chat import new_id
from minimind_jax.serve.completions import token_lists
from minimind_jax.serve.errors import refused
from minimind_jax.serve.models import Served
from minimind_jax.serve.prompts import read_talk
from minimind_jax.serve.protocol import ClassifyRequest, EmbeddingRequest, Json, ScoreRequest
from minimind_jax.serve.worker import Worker

TOGETHER = 8  # texts between which answers go on


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
    parts = [
        await worker.run(served.embedder.embed, served.engine.params, prompts[n : n + TOGETHER])
        for n in range(0, len(prompts), TOGETHER)
    ]
    vectors_ND = np.concatenate(parts)
    if body.normalize:
        vectors_ND /= np.maximum(np.linalg.norm(vectors_ND, axis=1, keepdims=True), 1e-12)
    shown = vectors_ND.tolist()
    if body.encoding_format == "base64":
        shown = [base64.b64encode(vector_D.astype("<f4").tobytes()).decode() for vector_D in vectors_ND]
    data = [{"object": "embedding", "index": n, "embedding": vector} for n, vector in enumerate(shown)]
    return {"object": "list", "model": served.name, "data": data, "usage": _usage(prompts)}


async def classify(body: ClassifyRequest, served: Served, worker: Worker) -> Json:
    """Labels and probabilities. Long texts lose their end, as in training."""
    scorer, texts = served.scorer, [body.input] if isinstance(body.input, str) else body.input
    logits, usage = await _scored(scorer, scorer.tokenizer.encode_batch(texts), slice(scorer.max_tokens), worker)
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
    return {**_base("classify-", served), "data": data, "usage": usage}


async def score(body: ScoreRequest, served: Served, worker: Worker) -> Json:
    """A reward model's scores of conversations. Long ones lose their beginning, as in training."""
    scorer = served.scorer
    talks = [read_talk(served, messages, None, False) for messages in _conversations(body)]
    prompts = [scorer.conversation_ids(talk.messages) for talk in talks]
    logits, usage = await _scored(scorer, prompts, slice(-scorer.max_tokens, None), worker)
    data = [{"index": n, "object": "score", "score": float(row[0])} for n, row in enumerate(logits)]
    return {**_base("score-", served), "data": data, "usage": usage}


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
    rows = [await worker.run(scorer.score_ids, cut[n : n + TOGETHER]) for n in range(0, len(cut), TOGETHER)]
    return np.concatenate(rows), _usage(cut)


def _base(kind: str, served: Served) -> Json:
    return {"id": new_id(kind), "object": "list", "created": int(time.time()), "model": served.name}


def _usage(prompts: Sequence[Sequence[int]]) -> Json:
    count = sum(map(len, prompts))
    return {"prompt_tokens": count, "total_tokens": count, "completion_tokens": 0, "prompt_tokens_details": None}

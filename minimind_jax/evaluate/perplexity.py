"""How well a model predicts text or the assistant's words of conversations."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from minimind_jax.config.sections import DataConfig
from minimind_jax.config.tools import PerplexityConfig
from minimind_jax.convert.load import load_tokenizer
from minimind_jax.data.batches import Batches
from minimind_jax.data.inspect import detect_kind
from minimind_jax.data.jsonl import READING, Reading, expand_paths, reading_of
from minimind_jax.data.kinds import KINDS
from minimind_jax.data.token_cache import TokenCache, build_cache
from minimind_jax.errors import UserError
from minimind_jax.folders import resolve_model_folder
from minimind_jax.inference.load import load_model
from minimind_jax.losses.vocabulary import token_scores
from minimind_jax.model.config import RopeScaling
from minimind_jax.model.transformer import full_precision
from minimind_jax.progress import tracked

DEFAULT_SEQ_LEN = 512


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Sums over the trained tokens of all documents (the first token of a document has nothing to be predicted from).

    nll_by_position_T, tokens_by_position_T: the same sums for tokens predicted at each position of a row's documents.
    """

    nll_by_position_T: np.ndarray
    tokens_by_position_T: np.ndarray
    byte_count: int

    @property
    def tokens(self) -> int:
        return int(self.tokens_by_position_T.sum())

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of a token, in nats."""
        return float(self.nll_by_position_T.sum()) / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nll)"""
        return math.exp(self.nll)

    @property
    def bits_per_byte(self) -> float:
        """Total nll in bits over the UTF-8 bytes of the predicted tokens: comparable between tokenizers."""
        return float(self.nll_by_position_T.sum()) / math.log(2) / self.byte_count


def run(config: PerplexityConfig) -> None:
    """Measures and prints what `config` asks for."""
    found = evaluate_perplexity(
        config.model, config.files, config.seq_len,
        kind=config.kind, max_rows=config.max_rows, reading=reading_of(config),
    )  # fmt: skip
    print(
        f"{found.tokens:,} tokens: loss {found.nll:.4f}, perplexity {found.perplexity:.3f}, "
        f"bits per byte {found.bits_per_byte:.4f}"
    )


def evaluate_perplexity(
    model: str,
    paths: Sequence[str],
    seq_len: int | None = None,
    *,
    kind: Literal["text", "conversation"] | None = "text",
    min_document_tokens: int = 0,
    max_rows: int = 0,
    rows_per_step: int = 8,
    rope_scaling: RopeScaling | None = None,
    dtype: str = "auto",
    cache_dir: str = "",
    reading: Reading = READING,
) -> Perplexity:
    """Evaluates a model on records of the format that pretraining or fine-tuning reads.

    Documents longer than seq_len tokens are cut into pieces from their start on (conversations at turns), each
    predicted from itself alone; the first token of a next piece is predicted from all of the piece before it.
    Conversations are taken as they are, without the random changes of training.

    Args:
        model: a Hugging Face folder, or a run (name or path).
        paths: files, folders or globs.
        kind: found from the first record if None.
        seq_len: tokens in a row; None takes 512, or the model's context if that is less.
        min_document_tokens: shorter documents are left out; at seq_len, every piece but the last of a document is
            full, which is what a comparison of context lengths needs.
        max_rows: rows evaluated at most; 0 for all.
        reading: how files and records are read.
        rope_scaling: replaces the model's own, when given.

    Raises:
        UserError: no such model or file, a broken record, no document that is long enough, nothing to predict in the
            rows, seq_len above the model's context, or max_rows below 0.
    """
    if max_rows < 0:
        raise UserError(f"max_rows is {max_rows}; it must be at least 0 (0 for all rows)")
    folder = resolve_model_folder(model)
    files = expand_paths(paths)  # a file that is missing is told before the model is loaded
    kind = kind or detect_kind(files, reading)
    if "concat" not in KINDS[kind].packings:
        raise UserError(f"{paths[0]}: {KINDS[kind].noun}; perplexity is of texts or conversations")
    network, params = load_model(folder, dtype, rope_scaling)
    limit = network.config.max_position_embeddings
    seq_len = min(DEFAULT_SEQ_LEN, limit) if seq_len is None else seq_len
    if seq_len > limit:
        raise UserError(f"seq_len {seq_len} is above the model's context of {limit} tokens (max_position_embeddings)")
    batches = _open(folder, paths, seq_len, kind, min_document_tokens, rows_per_step, cache_dir, reading)

    @jax.jit
    def sums(params, batch):
        output = network.read_batch(params, batch)
        with full_precision(network.compute):
            kernel_VD = network.head_kernel(params)
            log_probs_BT = token_scores(output.hidden_BTD, kernel_VD, batch["targets"], network.platform).log_probs_BT
        at_position = jnp.zeros(seq_len, jnp.float32).at[batch["positions"]]
        nll_T = at_position.add(-log_probs_BT * batch["loss_weights"])
        return nll_T, at_position.add(batch["loss_weights"])

    nll_T, tokens_T, byte_count = np.zeros(seq_len), np.zeros(seq_len), 0
    for batch in tracked(batches.eval_batches(max_rows), "evaluating", batches.eval_steps(max_rows)):
        byte_count += int((batch.pop("target_bytes") * batch["loss_weights"]).sum())
        batch_nll_T, batch_tokens_T = sums(params, batch)
        nll_T += np.asarray(batch_nll_T)
        tokens_T += np.asarray(batch_tokens_T)
    if not tokens_T.any():
        raise UserError(
            f"{', '.join(map(str, paths))}: the rows evaluated hold no token to predict (of conversations, only the "
            "assistant's count); give other records, a larger seq_len, or more max_rows"
        )
    return Perplexity(nll_T, tokens_T, byte_count)


def _open(folder, paths, seq_len, kind, min_document_tokens, rows_per_step, cache_dir, reading) -> Batches:
    tokenizer = load_tokenizer(folder)
    data = DataConfig(
        train=tuple(paths),
        seq_len=seq_len,
        packing="best_fit",
        cache_dir=cache_dir,
        system_prompt_probability=0.0,
        empty_think_removal=0.0,
        **dataclasses.asdict(reading),
    )

    def long_enough(cache: TokenCache) -> np.ndarray:
        documents = np.flatnonzero(np.asarray(cache.lengths) >= min_document_tokens)
        if not len(documents):
            longest = int(np.max(cache.lengths))
            raise UserError(
                f"no document has the {min_document_tokens} tokens that min_document_tokens asks for; the longest of "
                f"{', '.join(map(str, paths))} has {longest}"
            )
        return documents

    cache = build_cache(kind, data.train, tokenizer, data, seed=0)
    return Batches(cache, data, rows_per_step, seed=0, token_bytes=tokenizer.token_bytes(), select=long_enough)

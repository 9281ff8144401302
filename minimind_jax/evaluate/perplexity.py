"""How well a model predicts text or the assistant's words of conversations."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from minimind_jax.config.sections import DataConfig
from minimind_jax.config.tools import PerplexityConfig
from minimind_jax.convert.load import load_tokenizer
from minimind_jax.data.batches import Batches
from minimind_jax.data.inspect import detect_kind
from minimind_jax.data.jsonl import expand_paths, reading_of
from minimind_jax.data.kinds import KINDS
from minimind_jax.data.token_cache import build_cache
from minimind_jax.errors import UserError
from minimind_jax.folders import resolve_model_folder
from minimind_jax.inference.load import load_model
from minimind_jax.losses.vocabulary import token_scores
from minimind_jax.model.transformer import full_precision
from minimind_jax.progress import tracked

DEFAULT_SEQ_LEN, ROWS = 512, 8  # rows that are read at once


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
        return math.exp(self.nll)

    @property
    def bits_per_byte(self) -> float:
        """Total nll in bits over the UTF-8 bytes of the predicted tokens: comparable between tokenizers."""
        return float(self.nll_by_position_T.sum()) / math.log(2) / self.byte_count


def run(config: PerplexityConfig) -> None:
    found = evaluate_perplexity(config)
    print(
        f"{found.tokens:,} tokens: loss {found.nll:.4f}, perplexity {found.perplexity:.3f}, "
        f"bits per byte {found.bits_per_byte:.4f}"
    )


def evaluate_perplexity(config: PerplexityConfig) -> Perplexity:
    """Evaluates a model on records of the format that pretraining or fine-tuning reads.

    Documents longer than seq_len tokens are cut into pieces from their start on (conversations at turns), each
    predicted from itself alone; the first token of a next piece is predicted from all of the piece before it.
    Conversations are taken as they are, without the random changes of training.

    Raises UserError: no such model or file, a broken record, nothing to predict in the rows, or seq_len above the
    model's context.
    """
    folder, max_rows = resolve_model_folder(config.model), config.max_rows
    files = expand_paths(config.files)  # a file that is missing is told before the model is loaded
    kind = config.kind or detect_kind(files, config)
    if "concat" not in KINDS[kind].packings:
        way_out = "; evaluate images gives their bits per byte" * (kind == "images")
        raise UserError(f"{config.files[0]}: {KINDS[kind].noun}; perplexity is of texts or conversations{way_out}")
    network, params = load_model(folder)
    limit = network.config.max_position_embeddings
    seq_len = min(DEFAULT_SEQ_LEN, limit) if config.seq_len is None else config.seq_len
    if seq_len > limit:
        raise UserError(f"seq_len {seq_len} is above the model's context of {limit} tokens (max_position_embeddings)")
    data = DataConfig(
        train=config.files,
        seq_len=seq_len,
        packing="best_fit",
        system_prompt_probability=0.0,
        empty_think_removal=0.0,
        **dataclasses.asdict(reading_of(config)),
    )
    tokenizer = load_tokenizer(folder)
    cache = build_cache(kind, data.train, tokenizer, data, seed=0)
    batches = Batches(cache, data, ROWS, seed=0, token_bytes=tokenizer.token_bytes())

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
            f"{', '.join(config.files)}: the rows evaluated hold no token to predict (of conversations, only the "
            "assistant's count); give other records, a larger seq_len, or more max_rows"
        )
    return Perplexity(nll_T, tokens_T, byte_count)

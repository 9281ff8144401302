"""What is computed of texts and pictures without a word being made: scores of a model with a head of them, a
classifier's logits or a reward model's score; and of texts vectors."""

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minimind_jax.convert.hf import Labels, load_labels
from minimind_jax.convert.hf_image_classifier import is_picture_classifier, load_picture_classifier
from minimind_jax.convert.load import load_tokenizer, read_config
from minimind_jax.data.images import read_image
from minimind_jax.data.pictures import PictureFile
from minimind_jax.errors import UserError
from minimind_jax.folders import is_adapter, resolve_model_folder
from minimind_jax.inference.buckets import bucket, by_length
from minimind_jax.inference.load import load_model
from minimind_jax.model.heads import SCORE, scores
from minimind_jax.model.image_model import ImageModel
from minimind_jax.model.transformer import LanguageModel, Params, compiler_options

BATCH_TOKENS = 1 << 14  # scored at once, padding included
MAX_ROWS = 64
MAX_PICTURES = 16  # scored at once


class RowsProgram:
    """A function (params, tokens_BT, lengths_B) -> (B, X) of rows of tokens, compiled for each shape that comes;
    its params are always of the same shapes and devices."""

    def __init__(self, function: Callable[..., jax.Array], options: dict[str, Any] | None = None):
        self._function, self._programs = jax.jit(function, compiler_options=options), {}
        self._lock = threading.Lock()

    def prepare(self, params: Params, prompts: Sequence[Sequence[int]]) -> None:
        """Compiles what these need; another thread may compute meanwhile."""
        for _, tokens_BT, lengths_B in by_length(prompts, _rows, multiple=256):
            with self._lock:
                if tokens_BT.shape not in self._programs:
                    lowered = self._function.lower(params, tokens_BT, lengths_B)
                    self._programs[tokens_BT.shape] = lowered.compile()

    def __call__(self, params: Params, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The indices of some prompts and their values, from the longest on; none is empty."""
        self.prepare(params, prompts)
        for chosen, tokens_BT, lengths_B in by_length(prompts, _rows, multiple=256):
            values_BX = self._programs[tokens_BT.shape](params, tokens_BT, lengths_B)
            yield chosen, np.asarray(values_BX)[: len(chosen)]


class Scorer:
    """A model with a head of scores, ready to score texts and conversations.

    name: a folder, or a run whose model/ is meant. max_tokens: longer texts are cut at their end, longer conversations
    at their beginning; None takes the length that the model was trained with, which its tokenizer_config.json says.
    deterministic: as of `ComputeConfig`. cut: how many were, so far.
    Raises UserError when it is no such model, or max_tokens is above its context.
    """

    def __init__(self, name: str, max_tokens: int | None = None, deterministic: bool = False):
        folder = resolve_model_folder(name)
        labels = None if is_adapter(folder) else load_labels(folder)
        if labels is None:
            read_config(folder)  # or it is another program's
            raise UserError(
                f"{folder} is a language model; `minimind classify` and `minimind reward` make models that score"
            )
        if is_picture_classifier(folder):
            raise UserError(f"{folder} is a classifier of pictures; ask minimind classify predict or serve")
        self.labels: Labels = labels
        self.model, self.params = load_model(folder, has_head=True, deterministic=deterministic)
        if SCORE not in self.params or self.params[SCORE]["kernel"].shape[1] != len(labels.names):
            raise UserError(f"{folder}: config.json names {len(labels.names)} labels, and the weights hold others")
        self.tokenizer = load_tokenizer(folder)
        context = self.model.config.max_position_embeddings
        if max_tokens and max_tokens > context:
            raise UserError(f"seq_len {max_tokens} is above the model's context of {context} tokens")
        self.max_tokens, self.cut = min(max_tokens or labels.max_tokens or context, context), 0

        def last_scores(params, tokens_BT, lengths_B):
            output = self.model.read_rows(params, self.model.embed(params, tokens_BT), lengths_B=lengths_B)
            last_B1D = jnp.take_along_axis(output.hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)
            return scores(params, last_B1D[:, 0])

        self._last_scores = RowsProgram(last_scores, compiler_options(self.model.compute, self.model.platform))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """(texts, labels) logits, as transformers' pipeline computes them: no special tokens are added."""
        return self._score_cut(self.tokenizer.encode_batch(texts), slice(self.max_tokens))

    def conversations(self, conversations: Sequence[tuple[list[dict], Any]]) -> np.ndarray:
        """(conversations, labels) scores of (messages, tools) in the chat template."""
        prompts = [self.conversation_ids(messages, tools) for messages, tools in conversations]
        return self._score_cut(prompts, slice(-self.max_tokens, None))

    def conversation_ids(self, messages: list[dict], tools: Any = None) -> list[int]:
        segments = self.tokenizer.segments(messages, tools)
        return [i for piece in self.tokenizer.encode_batch([s.text for s in segments]) for i in piece]

    def _score_cut(self, prompts: Sequence[Sequence[int]], kept: slice) -> np.ndarray:
        self.cut += sum(len(ids) > self.max_tokens for ids in prompts)
        return self.score_ids([ids[kept] for ids in prompts])

    def score_ids(
        self, prompts: Sequence[Sequence[int]], advance: Callable[[int], None] = lambda count: None
    ) -> np.ndarray:
        """(prompts, labels) scores of token ids. advance: hears how many more are done."""
        found = np.zeros((len(prompts), len(self.labels.names)), np.float32)
        if any(not ids for ids in prompts):
            raise UserError("a text is empty; there is nothing to score")
        for chosen, scores_BL in self._last_scores(self.params, prompts):
            found[chosen] = scores_BL
            advance(len(chosen))
        return found

    def prepare(self, prompts: Sequence[Sequence[int]]) -> None:
        """Compiles what `score_ids` of these needs, in any thread."""
        self._last_scores.prepare(self.params, prompts)


class PictureScorer:
    """A classifier of pictures. name: a folder, or a run whose model/ is meant. Raises UserError when it is none."""

    def __init__(self, name: str):
        folder = resolve_model_folder(name)
        self.labels: Labels = load_labels(folder)
        self.tower, params = load_picture_classifier(folder)
        if params[SCORE]["kernel"].shape[1] != len(self.labels.names):
            raise UserError(f"{folder}: config.json names {len(self.labels.names)} labels, and the weights hold others")
        model, self._params = ImageModel(self.tower), jax.device_put(params)
        self._scores = jax.jit(lambda params, pixels_NHWC: scores(params, model.pooled(params, pixels_NHWC)))

    def warm_up(self, most: int) -> None:
        """Compiles what up to `most` pictures at once need."""
        picture_HWC = np.zeros((self.tower.image_size, self.tower.image_size, 3), np.uint8)
        for power in range(most.bit_length()):
            self.pixels([picture_HWC] * (1 << power))

    def pictures(
        self, pictures: Iterable[tuple[PictureFile, str]], advance: Callable[[int], None] = lambda count: None
    ) -> np.ndarray:
        """(pictures, labels) logits of pictures, of each with its place for messages."""
        return self.pixels((read_image(picture, self.tower, place) for picture, place in pictures), advance)

    def pixels(
        self, pixels_HWC: Iterable[np.ndarray], advance: Callable[[int], None] = lambda count: None
    ) -> np.ndarray:
        """`pictures` of what `read_image` has read."""
        found, left = [np.zeros((0, len(self.labels.names)), np.float32)], iter(pixels_HWC)
        while some := list(itertools.islice(left, MAX_PICTURES)):
            size = bucket(len(some), smallest=1, multiple=MAX_PICTURES)
            pixels_NHWC = np.resize(np.stack(some), (size, *some[0].shape))
            found.append(np.asarray(self._scores(self._params, pixels_NHWC))[: len(some)])
            advance(len(some))
        return np.concatenate(found)


class Embedder:
    """Texts as vectors: the means of a language model's last hidden states."""

    def __init__(self, model: LanguageModel):
        def mean(params, tokens_BT, lengths_B):
            hidden_BTD = model.read_rows(params, model.embed(params, tokens_BT), lengths_B=lengths_B).hidden_BTD
            is_token_BT1 = (jnp.arange(tokens_BT.shape[1]) < lengths_B[:, None])[..., None]
            return jnp.sum(hidden_BTD.astype(jnp.float32), axis=1, where=is_token_BT1) / lengths_B[:, None]

        self._mean, self._width = RowsProgram(mean), model.config.hidden_size
        self.prepare = self._mean.prepare

    def embed(self, params: Params, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 (prompts, D): the mean over the tokens of what the last norm makes of them; no prompt is empty."""
        found_ND = np.zeros((len(prompts), self._width), np.float32)
        for chosen, means_BD in self._mean(params, prompts):
            found_ND[chosen] = means_BD
        return found_ND


def _rows(width: int, left: int) -> int:
    """As many as make BATCH_TOKENS, in powers of two: few sizes are few programs."""
    most = min(MAX_ROWS, max(1, BATCH_TOKENS // width), bucket(left, smallest=1, multiple=MAX_ROWS))
    return 1 << (most.bit_length() - 1)

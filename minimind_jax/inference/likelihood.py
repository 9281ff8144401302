"""Log-likelihoods of continuations, in batches: for multiple choice and lm_eval."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from minimind_jax.data.images import Picture
from minimind_jax.errors import UserError
from minimind_jax.inference import decode
from minimind_jax.inference.buckets import bucket, by_length
from minimind_jax.inference.image_encoder import ImageEncoder
from minimind_jax.losses.pieces import by_columns, logits
from minimind_jax.model.transformer import LanguageModel, Params, full_precision
from minimind_jax.model.vision import VISION


class Likelihood(NamedTuple):
    """log_prob: of the continuation after the context, in nats, summed over its tokens. tokens: how many they are.
    is_greedy: whether each of them is the likeliest."""

    log_prob: float
    tokens: int
    is_greedy: bool


Request = tuple[Sequence[int], Sequence[int]]  # token ids of a context, which is not empty, and of its continuation


def encode_pair(
    encode: Callable[[str], list[int]], context: str, continuation: str, prefix: int, where: str
) -> tuple[list[int], list[int]]:
    """A context and its continuation as token ids, split as lm_eval does.

    Spaces of any alphabet at the end of the context go to the continuation, with whose first word they make a token.
    Both are encoded as one text, of which the continuation has what is behind as many tokens as the context makes.
    prefix: the token that stands for a context without any.
    Raises UserError, which begins with `where`, when no token is left to score: its probability would be 1.
    """
    text = context.rstrip()
    context_ids = encode(text)
    own = encode(text + context[len(text) :] + continuation)[len(context_ids) :]
    if not context_ids:
        context_ids, own = [prefix], own[own[:1] == [prefix] :]
    if not continuation or not own:
        merged = " (its tokens merge with those before it)" if continuation else ""
        raise UserError(
            f"{where}: nothing is left to score of {continuation[:40]!r} behind {context[-40:]!r}{merged}; give it "
            "some text, or end the prompt in a space or a word"
        )
    return context_ids, own


class LikelihoodScorer:
    """A language model ready to judge continuations. The head is only applied to the tokens of a continuation.

    context: tokens that are read at most, those of the model or `max_length`.
    """

    def __init__(self, model: LanguageModel, params: Params, batch_size: int = 16, max_length: int | None = None):
        self.model, self.params, self.batch_size = model, params, batch_size
        self.context = min(max_length or (1 << 30), model.config.max_position_embeddings)

        def judge(kernels, hidden_BCD, targets_BC):
            logits_BCV = logits(hidden_BCD, *kernels, model.platform)
            log_probs_BCV = jax.nn.log_softmax(logits_BCV)
            chosen_BC = jnp.take_along_axis(log_probs_BCV, targets_BC[..., None], axis=-1)[..., 0]
            return chosen_BC, jnp.argmax(logits_BCV, axis=-1) == targets_BC

        @jax.jit
        def score(params, tokens_BT, lengths_B, targets_BC, places_BC, images_BMD):
            x_BTD = model.embed(params, tokens_BT, images_BMD)
            hidden_BTD = model.read_rows(params, x_BTD, lengths_B=lengths_B).hidden_BTD
            hidden_BCD = jnp.take_along_axis(hidden_BTD, places_BC[..., None], axis=1)
            with full_precision(model.compute):
                return by_columns(judge, (model.head_kernel(params),), hidden_BCD, targets_BC)

        self._score, vision = score, model.config.vision
        if vision is not None:
            self._image_encoder = ImageEncoder(
                vision, lambda pixels: decode.look(model, {VISION: params[VISION]}, pixels)
            )

    def score(
        self,
        requests: Sequence[Request],
        advance: Callable[[int], None] = lambda count: None,
        images: Callable[[int], Iterable[Picture]] | None = None,
    ) -> list[Likelihood]:
        """The likelihood of each continuation. advance: hears how many more are done. images: that the context
        of a request shows, by its number, in the order of their markers.

        A request longer than the model's context loses the beginning of its context (of one that shows images, which
        must not be, the markers); a continuation that is longer itself loses its own beginning, as in lm_eval. Raises
        ValueError for one that is empty, or has no context.
        """
        if not all(context and continuation for context, continuation in requests):
            raise ValueError("a context or a continuation has no tokens")
        wholes = [[*context, *continuation][-(self.context + 1) :] for context, continuation in requests]
        counts = [min(len(own), len(whole) - 1) for (_, own), whole in zip(requests, wholes, strict=True)]
        found: list[Likelihood | None] = [None] * len(requests)
        # The last token of a continuation is predicted and not read, so a row has one token fewer than the request.
        batches = by_length([whole[:-1] for whole in wholes], lambda width, left: self.batch_size, multiple=128)
        for chosen, tokens_BT, lengths_B in batches:
            most = bucket(max(counts[i] for i in chosen), smallest=4, multiple=64)
            targets_BC, places_BC = (np.zeros((self.batch_size, most), np.int32) for _ in range(2))
            for row, i in enumerate(chosen):
                targets_BC[row, : counts[i]] = wholes[i][-counts[i] :]
                places_BC[row, : counts[i]] = np.arange(lengths_B[row] - counts[i], lengths_B[row])
            images_BMD = images and self._see([tuple(images(i)) for i in chosen])
            judged = self._score(self.params, tokens_BT, lengths_B, targets_BC, places_BC, images_BMD)
            log_probs_BC, is_likeliest_BC = map(np.asarray, judged)
            for row, i in enumerate(chosen):
                total = float(log_probs_BC[row, : counts[i]].astype(np.float64).sum())
                found[i] = Likelihood(total, counts[i], bool(is_likeliest_BC[row, : counts[i]].all()))
            advance(len(chosen))
        return found

    def _see(self, images: Sequence[Sequence[Picture]]) -> np.ndarray | None:
        """Image tokens (batch_size, M, D) of the images of the first rows, zeros behind them; None without any."""
        seen = self._image_encoder.see(picture for own in images for picture in own)
        if not seen:
            return None
        tokens, D = next(iter(seen.values())).shape
        most = max(map(len, images))
        images_BMD = np.zeros((self.batch_size, most * tokens, D), next(iter(seen.values())).dtype)
        for row, own in enumerate(images):
            for place, picture in enumerate(own):
                images_BMD[row, place * tokens : (place + 1) * tokens] = seen[picture.digest]
        return images_BMD

"""How fast a run goes: tokens a second, the time that is left, and MFU (arXiv 2204.02311, appendix B), the FLOPs of its
tokens and images over what the devices can do at most."""

import contextlib
import re
import time
from collections.abc import Iterator

import jax
import numpy as np

from minimind_jax.config.stages import RunConfig
from minimind_jax.data.rows import Batch
from minimind_jax.model.config import ComputeConfig, ModelConfig, Vision
from minimind_jax.model.image_model import ImageModel
from minimind_jax.model.transformer import LanguageModel

# Dense bfloat16 FLOP/s of one device, from the makers' data sheets; the consumer cards' with float32 accumulation.
# The first entry that is part of the device kind (lower case) counts, so longer names come before shorter ones; what a
# digit follows is another device: an RTX A1000 is no A100.
PEAK_FLOPS = {
    "b200": 2250e12,
    "gh200": 989e12,
    "h200": 989e12,
    "h100 pcie": 756e12,
    "h100 nvl": 835e12,
    "h100": 989e12,
    "h800": 989e12,
    "h20": 148e12,
    "a100": 312e12,
    "a800": 312e12,
    "a10g": 70e12,
    "a10": 125e12,
    "a40": 150e12,
    "a6000": 155e12,
    "rtx 6000 ada": 364e12,
    "l40s": 362e12,
    "l40": 181e12,
    "l4": 121e12,
    "rtx 5090": 209e12,
    "rtx 4090 d": 147e12,
    "rtx 4090": 165e12,
    "rtx 4080": 97e12,
    "rtx 3090": 71e12,
    "rtx 3080": 60e12,
    "tpu v6": 918e12,
    "tpu v5 lite": 197e12,
    "tpu v5e": 197e12,
    "tpu v5": 459e12,
    "tpu v4": 275e12,
    "tpu v3": 61e12,
    "tpu v2": 23e12,
}


def flops_per_token(config: ModelConfig, seq_len: int, trained: float = 1.0, *, has_words: bool = True) -> float:
    """FLOPs of one trained token, forward and backward, nothing recomputed.

    6 (matrix parameters that a token meets, the head included and the embedding look-up not)
    + 6 L N H T for causal attention over T = seq_len positions, the upper bound when rows hold several documents.
    trained: share of the layers whose matrices have gradients, 4 in place of the first 6 for the others, and for the
        head where it is not 1; those of adapters are not counted.
    has_words: false of a model with a head of scores, which meets one token of a text and no word of the vocabulary.
    """
    width, heads_width = config.hidden_size, config.num_attention_heads * config.head_dim
    attention = 2 * width * (heads_width + config.num_key_value_heads * config.head_dim)
    if config.is_moe:
        mlp = 3 * width * config.moe_intermediate_size * config.num_experts_per_tok + width * config.num_experts
    else:
        mlp = 3 * width * config.intermediate_size
    layers, head = config.num_hidden_layers * (attention + mlp), width * config.vocab_size * has_words
    matrices = (4 + 2 * trained) * layers + (6 if trained == 1 else 4) * head
    return matrices + 6 * config.num_hidden_layers * heads_width * seq_len


def forward_flops(config: ModelConfig, seq_len: int) -> float:
    """Those of `flops_per_token` without the backward pass, of a model that the loss only asks."""
    return flops_per_token(config, seq_len) / 3


def flops_per_image(vision: Vision, width: int, passes: int) -> float:
    """FLOPs of an image on its way to its tokens, of the language model's width: 2 for each number of the tower's
    matrices and each patch and 4 P^2 W a layer for attention, `passes` times (3 of a tower that is trained, 0 of one
    whose features are kept); 6 for the projector."""
    tower, patches = vision.tower, vision.tower.grid**2
    layer = 4 * tower.hidden_size**2 + 2 * tower.hidden_size * tower.intermediate_size
    layers = tower.num_hidden_layers + 1 + vision.feature_layer  # what the projector does not read is not computed
    matrices = layers * layer + 3 * tower.patch_size**2 * tower.hidden_size
    seen = 2 * patches * matrices + 4 * patches**2 * tower.hidden_size * layers
    projector = vision.image_tokens * width * (tower.hidden_size * vision.pixel_shuffle**2 + width)
    return passes * seen + 6 * projector


def peak_flops(compute: ComputeConfig) -> float | None:
    """bfloat16 FLOP/s of all devices together; None where it is not known or the run computes in float32."""
    devices = jax.devices()
    kind = devices[0].device_kind.lower()
    if compute.dtype == "float32" or devices[0].platform == "cpu" or re.search("laptop|max-q", kind):
        return None  # a laptop's card of the same name is half as fast, or as fast as it may be warm
    for name, peak in PEAK_FLOPS.items():
        if re.search(rf"{name}(?!\d)", kind):
            # A device of TPU v2 and v3 is one of a chip's two cores; from v4 on it is a chip.
            return peak * len(devices)
    return None


class Speed:
    """Wall-clock numbers of a run: pauses (evaluation, samples, saves) and the first step, which compiles, left out.

    seconds_before: duration of the run up to the checkpoint it goes on from. has_words: as of `flops_per_token`.
    flops_beside: of a token, in other models; None for no MFU, as where steps wait for rollouts and rewards.
    """

    def __init__(
        self,
        model: LanguageModel | ImageModel,
        config: RunConfig,
        seconds_before: float,
        has_words: bool = True,
        flops_beside: float | None = 0.0,
    ):
        self._started = time.perf_counter() - seconds_before
        is_counted = isinstance(model, LanguageModel) and flops_beside is not None
        self._peak = peak_flops(model.compute) if is_counted else None
        if self._peak:
            shape, share = model.config, config.trained_share(model.config.num_hidden_layers)
            self._per_token = flops_per_token(shape, config.data.seq_len, share, has_words=has_words) + flops_beside
            self._vision = shape.vision
            self._per_image = self._vision and flops_per_image(self._vision, shape.hidden_size, config.tower_passes)
        self._since: float | None = None  # start of the window that `read` ends
        self._tokens = self._flops = self._window_steps = 0
        self._steps, self._active = 0, 0.0  # of the windows before it

    def seconds(self) -> float:
        """Since the run was first started, pauses included, time between a kill and the resume not."""
        return time.perf_counter() - self._started

    @property
    def has_begun(self) -> bool:
        """Whether a step was added."""
        return self._since is not None

    def size_of(self, batch: Batch) -> np.ndarray:
        """(2,) of a step: tokens, padding not counted, and FLOPs where the devices' peak is known."""
        tokens, flops = np.count_nonzero(batch["segment_ids"]), 0.0
        if self._peak:
            flops = tokens * self._per_token
            if self._vision:
                markers = np.count_nonzero(batch["tokens"] == self._vision.marker_id)
                flops += markers / self._vision.image_tokens * self._per_image
        return np.array([tokens, flops])

    def add(self, size: np.ndarray) -> None:
        """A step of this `size_of` is done."""
        if self._since is None:
            self._since = time.perf_counter()
            return
        self._tokens, self._flops = np.add((self._tokens, self._flops), size).tolist()
        self._window_steps += 1

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self._since is not None:
            self._since += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """seconds, tokens_per_second and mfu over the steps since the last reading; starts a new window."""
        numbers = {"seconds": round(self.seconds(), 3), **self._rates()}
        if self._window_steps:
            now = time.perf_counter()
            self._steps, self._active = self._steps + self._window_steps, self._active + now - self._since
            self._since, self._tokens, self._flops, self._window_steps = now, 0, 0, 0
        return numbers

    def forecast(self, steps_left: int) -> dict[str, float]:
        """What a progress bar shows between two readings."""
        if not (steps := self._steps + self._window_steps):
            return {}
        active = self._active + time.perf_counter() - self._since
        return {"seconds_left": active / steps * steps_left, **self._rates()}

    def _rates(self) -> dict[str, float]:
        """Of the window's steps; {} where there is none yet."""
        if not self._window_steps:
            return {}
        seconds = time.perf_counter() - self._since
        mfu = {"mfu": round(self._flops / seconds / self._peak, 4)} if self._peak else {}
        return {"tokens_per_second": round(self._tokens / seconds, 1), **mfu}

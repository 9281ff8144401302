"""What a model is: its architecture (`ModelConfig`, with `Vision` where it sees), named presets, and how it is computed
(`ComputeConfig`)."""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

from minimind_jax.rules import ABOVE_0, BELOW_1, Settings, at_least, setting

Platform = Literal["cpu", "gpu", "tpu"]  # where a network is computed, as JAX calls its backends


@dataclasses.dataclass(frozen=True)
class RopeScaling(Settings):
    """Scaling of the rotary position embedding, under the names Hugging Face uses.

    rope_type: `linear` divides positions by `factor`; `dynamic` (NTK) raises theta once a sequence is longer than
        `original_max_position_embeddings`; `yarn` interpolates low frequencies only (arXiv 2309.00071).
    factor: how many times longer the context becomes.
    original_max_position_embeddings: the context the model was trained at.
    attention_factor: what yarn multiplies the cos and sin tables by; null derives the paper's 0.1 ln(factor) + 1.
        MiniMind's is 1.
    beta_fast, beta_slow: rotations per context that bound yarn's ramp.
    """

    OWNER: ClassVar[str] = "rope_scaling."

    rope_type: Literal["linear", "dynamic", "yarn"]
    factor: float = setting(must=at_least(1))
    original_max_position_embeddings: int
    attention_factor: float | None = setting(None, must=ABOVE_0)
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.attention_factor is None:  # resolved here, so that no reader of an export has to guess it
            derived = yarn_attention_factor(self.factor) if self.rope_type == "yarn" else 1.0
            object.__setattr__(self, "attention_factor", derived)
        if self.rope_type != "yarn" and self.attention_factor != 1:
            raise ValueError(f"rope_scaling.attention_factor is for yarn; leave it out with {self.rope_type}")


def yarn_attention_factor(factor: float, multiplier: float = 1.0) -> float:
    """0.1 * multiplier * ln(factor) + 1, from 3.4 of the paper; DeepSeek added the multiplier (`mscale`)."""
    return 0.1 * multiplier * math.log(factor) + 1


Activation = Literal["gelu", "gelu_pytorch_tanh"]


@dataclasses.dataclass(frozen=True)
class TowerConfig(Settings):
    """A SigLIP or SigLIP2 vision tower of fixed resolution, under its Hugging Face names, and the pixels that it reads:
    a picture resized to image_size x image_size, then (value * rescale_factor - image_mean) / image_std.

    image_size: pixels a side; what is left of it beside whole patches is not seen, as in SigLIP-so400m (384 and 14).
    resample: the filter of the resizing, by Pillow's number: 2 is bilinear, 3 bicubic.
    """

    OWNER: ClassVar[str] = "the tower's "

    hidden_size: int = setting(must=at_least(1))
    intermediate_size: int = setting(must=at_least(1))
    num_hidden_layers: int = setting(must=at_least(1))
    num_attention_heads: int = setting(must=at_least(1))
    image_size: int
    patch_size: int = setting(must=at_least(1))
    layer_norm_eps: float = 1e-6
    hidden_act: Activation = "gelu_pytorch_tanh"
    resample: int = 3
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        super().__post_init__()
        if self.image_size < self.patch_size:
            raise ValueError(f"the tower's image_size {self.image_size} is below its patch_size {self.patch_size}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"the tower's hidden_size {self.hidden_size} does not divide by its num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if not all(std > 0 for std in self.image_std):
            raise ValueError(f"the tower's image_std is {self.image_std}; every channel's must be above 0")

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class Vision(Settings):
    """How a language model sees: a tower, and the projector that makes tokens of what it says of an image.

    marker_id: the token in whose place, `image_tokens` times, an image stands among the words.
    projector: `llava` (linear, GELU, linear, on hidden states before the tower's last norm) or `minimind_v` (a norm
        before these, on what comes out of the tower's last norm).
    pixel_shuffle: patches a side that become one token, side by side; 1 for a token a patch.
    projector_act: of the projector. feature_layer: of `llava`, the hidden states that it reads: -1 what the last layer
        makes, -2 what the one before makes.
    """

    tower: TowerConfig
    marker_id: int
    projector: Literal["llava", "minimind_v"] = "llava"
    pixel_shuffle: int = 1
    projector_act: Activation = "gelu"
    feature_layer: int = -1

    def __post_init__(self):
        super().__post_init__()
        if self.pixel_shuffle < 1 or self.tower.grid % self.pixel_shuffle:
            raise ValueError(
                f"pixel_shuffle {self.pixel_shuffle} does not divide the {self.tower.grid} patches of an image's side"
            )
        deepest = self.tower.num_hidden_layers if self.projector == "llava" else 1
        if not -deepest <= self.feature_layer <= -1:
            raise ValueError(f"feature_layer is {self.feature_layer}; it must be between -{deepest} and -1")

    @property
    def image_tokens(self) -> int:
        """Of an image."""
        return (self.tower.grid // self.pixel_shuffle) ** 2


@dataclasses.dataclass(frozen=True)
class ModelConfig(Settings):
    """Architecture of a Qwen3 (dense) or Qwen3-MoE (`num_experts` > 0) model; the defaults are MiniMind-3.

    Fields have their Hugging Face names. Derived when None: `head_dim` = hidden_size / num_attention_heads,
    `intermediate_size` = ceil(hidden_size * pi / 64) * 64, `moe_intermediate_size` = intermediate_size.
    zero_init_outputs: the projections that add to the residual stream (o_proj, down_proj) start at 0, so that a fresh
        layer changes nothing; the other kernels start at N(0, initializer_range).
    router_gradient: how the language-model loss reaches a renormalised top-1 router, whose weight is always 1.
        `straight_through`: the weight is p / stop_gradient(p), 1 in value with p's gradient. `none`: MiniMind's, no
        gradient. Only used when norm_topk_prob is true and num_experts_per_tok is 1.
    eos_token_id: the token that ends an answer, or several: a number for one, so that equal models are equal.
    vision: of a model that reads images among its words.
    """

    vocab_size: int = setting(6400, must=at_least(1))
    hidden_size: int = setting(768, must=at_least(1))
    intermediate_size: int | None = setting(None, must=at_least(1))
    num_hidden_layers: int = setting(8, must=at_least(1))
    num_attention_heads: int = setting(8, must=at_least(1))
    num_key_value_heads: int = 4
    head_dim: int | None = setting(None, must=at_least(1))
    max_position_embeddings: int = setting(32768, must=at_least(1))
    rope_theta: float = setting(1e6, must=ABOVE_0)
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = setting(1e-6, must=ABOVE_0)
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    zero_init_outputs: bool = False
    dropout: float = setting(0.0, must=BELOW_1)
    num_experts: int = 0
    num_experts_per_tok: int = 1
    moe_intermediate_size: int | None = setting(None, must=at_least(1))
    norm_topk_prob: bool = True
    router_gradient: Literal["straight_through", "none"] = "straight_through"
    router_aux_loss_coef: float = 5e-4
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = 0
    vision: Vision | None = None

    def __post_init__(self):
        def derive(name, value):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        super().__post_init__()
        if self.hidden_size % self.num_attention_heads and self.head_dim is None:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not divide by num_attention_heads {self.num_attention_heads}; "
                "choose sizes that divide, or set head_dim"
            )
        derive("head_dim", self.hidden_size // self.num_attention_heads)
        derive("intermediate_size", math.ceil(self.hidden_size * math.pi / 64) * 64)
        derive("moe_intermediate_size", self.intermediate_size)
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide by "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; the rotary embedding needs an even one")
        if self.is_moe and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is not between 1 and num_experts {self.num_experts}"
            )
        if self.vision is not None and not 0 <= self.vision.marker_id < self.vocab_size:
            raise ValueError(f"the image's marker {self.vision.marker_id} is no token: vocab_size is {self.vocab_size}")

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens of eos_token_id."""
        return id_tuple(self.eos_token_id)


def id_tuple(ids: int | Sequence[int] | None) -> tuple[int, ...]:
    """Token ids in the forms that configurations have for none, one and several."""
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)


def union_of_ids(*groups: int | Sequence[int] | None) -> int | tuple[int, ...] | None:
    """The ids of all groups in their order, each once; a number if it is one, None if there are none."""
    ids = tuple(dict.fromkeys(token for group in groups for token in id_tuple(group)))
    return ids if len(ids) > 1 else ids[0] if ids else None


PRESETS: dict[str, dict] = {
    # 63,912,192 parameters
    "minimind-3": {},
    # 198,416,640 parameters, 63.9M of them used for a token
    "minimind-3-moe": {"num_experts": 4, "num_experts_per_tok": 1},
    # the shapes of MiniMind2 (25.8M and 104M), with Qwen3's query and key norms
    "minimind2-small": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_key_value_heads": 2,
    },
    "minimind2": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "num_key_value_heads": 2},
    "qwen3-0.6b": {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "pad_token_id": 151643,
    },
}


@dataclasses.dataclass(frozen=True)
class ComputeConfig(Settings):
    """How the network is computed; none of it changes what a model is.

    dtype: of activations and matrix products; `auto` is bfloat16 on GPU and TPU, float32 on CPU. Parameters stay
        float32; norms, softmax and losses are always float32.
    remat: `none` keeps activations for the backward pass, `full` recomputes each layer, `dots` keeps matrix products.
    scan_unroll: layers unrolled per step of the scan over layers, 0 for all of them; None is all if they are at most
        32 and remat is not `full`, else 1. A loop keeps more for the backward pass than one long program (twice the
        temporaries, and on an H100 two fifths more time); the long program compiles longer.
    attention: the attention path; `auto` is cuDNN's flash attention on a GPU (`cudnn`), splash attention on a TPU
        (`splash`), and elsewhere, or where these cannot run, `grouped`: blocks of queries below the causal diagonal.
        `cudnn_packed` (Hopper and newer) and `tokamax` (Hopper, data-centre Blackwell; an extra) need no mask of
        documents, and no GPU has run them yet. `reference` is the plain formula.
    experts: the path of a mixture of experts; `auto` is `blocked` on CPU, `tiled` on GPU and `ragged` on TPU, all
        sorting the tokens by expert, and `reference` (every expert on every token) for few tokens.
    deterministic: training steps and rollouts on a GPU add up in a fixed order, so that a resumed run is bit for bit
        the one that was not cut off, as it is on a CPU and a TPU anyway. Slower: `auto` attention is `grouped`, and no
        kernel is chosen by trying (docs/performance.md says the price).
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: Literal["none", "full", "dots"] = "none"
    scan_unroll: int | None = setting(None, must=at_least(0))
    attention: Literal["auto", "reference", "grouped", "cudnn", "cudnn_packed", "tokamax", "splash"] = "auto"
    experts: Literal["auto", "reference", "ragged", "tiled", "blocked"] = "auto"
    deterministic: bool = False

"""A network that reads pictures alone: a SigLIP tower and the mean of what it says, for a head of scores (`heads`).

As in transformers' SiglipForImageClassification the mean is over the patches, after the tower's last norm.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from minimind_jax.model.config import ComputeConfig, Platform, TowerConfig, Vision
from minimind_jax.model.transformer import ModelOutput, Params, compute_dtype, in_full_precision
from minimind_jax.model.vision import VISION, features, init_vision, row_features, vision_axes


@dataclasses.dataclass(frozen=True)
class ImageModel:
    """What a `transformer.LanguageModel` is of texts: pure functions of parameters, {"vision": {"tower": ...}}.

    In the rows of a batch every token is a picture and a document of its own.
    """

    config: TowerConfig
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    platform: Platform = dataclasses.field(default_factory=jax.default_backend)
    adapter: ClassVar[None] = None

    @property
    def dtype(self) -> jnp.dtype:
        return compute_dtype(self.compute, self.platform)

    @property
    def vision(self) -> Vision:
        """The tower as `vision` reads rows by it: with all patches of a picture behind one token, and the last norm."""
        return Vision(self.config, marker_id=0, projector="minimind_v", pixel_shuffle=self.config.grid)

    def abstract_params(self) -> Params:
        """Shapes and dtypes of the parameters, without making them."""
        shapes = jax.eval_shape(lambda key: init_vision(self.vision, 1, 0.02, key), jax.random.key(0))
        return {VISION: {"tower": shapes["tower"]}}

    def logical_axes(self) -> Params:
        return {VISION: {"tower": vision_axes(self.vision)["tower"]}}

    @in_full_precision
    def pooled(self, params: Params, pixels_NHWC: Array) -> Array:
        """What the head reads of N pictures, float32 (N, W)."""
        return _mean(features(self.vision, params[VISION]["tower"], pixels_NHWC, self.dtype, self.platform))

    @in_full_precision
    def read_batch(self, params: Params, batch: dict[str, Array], dropout_key: Array | None = None) -> ModelOutput:
        """`pooled` of the T pictures of each row: the batch's `features` (B, T, W), made before, or of its `pixels`."""
        found_BTW = batch.get("features")
        if found_BTW is None:
            tower, pixels_BTHWC, is_there_BT = params[VISION]["tower"], batch["pixels"], batch["segment_ids"] > 0
            how = self.dtype, self.platform, self.compute
            found_BTW = _mean(row_features(self.vision, tower, pixels_BTHWC, is_there_BT, *how))
        return ModelOutput(found_BTW, jnp.zeros((), jnp.float32))


def _mean(features_XPW: Array) -> Array:
    return jnp.mean(features_XPW.astype(jnp.float32), axis=-2)

"""Tensors of a SigLIP tower and of a projector, under the names that LLaVA models have for them, used both ways.

`hf_weights` names a language model's tensors as if it stood alone; in the files of a model that sees they are those of
`model.language_model`.
"""

import math
import re
from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from minimind_jax.model.transformer import Params
from minimind_jax.model.vision import CHANNELS

Tensor = TypeVar("Tensor")

# transformers 4.57 leaves a tower without `vision_model` random; 5 reads both.
TOWER, PROJECTOR = "model.vision_tower.vision_model.", "model.multi_modal_projector."

_MODULES = {"embeddings.patch_embedding": "patch", "post_layernorm": "post_norm"}
_LAYER_MODULES = {
    "layer_norm1": "norm1",
    **{f"self_attn.{name}": name for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
    "layer_norm2": "norm2",
    **{f"mlp.{name}": name for name in ("fc1", "fc2")},
}
_PROJECTOR_MODULES = {"layer_norm": "norm", "linear_1": "linear_1", "linear_2": "linear_2"}
_PLAIN_NAMES = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(language_model\.model|model\.language_model)\.", "model."),
    (r"^(model\.)?multi_modal_projector\.", PROJECTOR),
    (r"^(model\.)?vision_tower\.(vision_model\.)?", TOWER),
)


def vision_tensors(vision: Params) -> dict[str, np.ndarray]:
    """Every tensor of a tower and a projector in torch's layout, as views of NumPy arrays (see `hf_weights`)."""
    modules = {PROJECTOR + name: vision["projector"].get(key) for name, key in _PROJECTOR_MODULES.items()}
    return tower_tensors(vision["tower"]) | _tensors(modules)


def tower_tensors(tower: Params) -> dict[str, np.ndarray]:
    """`vision_tensors` of a tower alone."""
    modules = {TOWER + name: tower[key] for name, key in _MODULES.items()}
    for layer in range(len(tower["layers"]["norm1"]["scale"])):
        for name, key in _LAYER_MODULES.items():
            stacked = tower["layers"][key]
            modules[f"{TOWER}encoder.layers.{layer}.{name}"] = {leaf: array[layer] for leaf, array in stacked.items()}
    tensors = _tensors(modules)
    patch = f"{TOWER}embeddings.patch_embedding.weight"
    flat_OI = tensors[patch]
    size = math.isqrt(flat_OI.shape[1] // CHANNELS)
    tensors[patch] = flat_OI.T.reshape(size, size, CHANNELS, -1).transpose(3, 2, 0, 1)  # of a convolution
    return tensors | {f"{TOWER}embeddings.position_embedding.weight": tower["position"]["embedding"]}


def _tensors(modules: Mapping[str, Params | None]) -> dict[str, np.ndarray]:
    tensors = {}
    for name, leaves in modules.items():
        if leaves is not None:
            tensors[f"{name}.weight"] = leaves["kernel"].T if "kernel" in leaves else leaves["scale"]
            tensors[f"{name}.bias"] = leaves["bias"]
    return tensors


def names_in_files(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model that sees under the names that its files have."""
    seeing = re.compile(rf"^(?!{re.escape(TOWER)}|{re.escape(PROJECTOR)})model\.")
    return {seeing.sub("model.language_model.", name): tensor for name, tensor in tensors.items()}


def names_of_files(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other way, from the names of transformers before and since 4.52. Left out is the head that pools patches into
    one, which no projector reads."""
    found = {}
    for name, tensor in stored.items():
        for pattern, plain in _PLAIN_NAMES:
            name = re.sub(pattern, plain, name)
        if not name.startswith(f"{TOWER}head."):
            found[name] = tensor
    return found


def tower_names(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the tensors of any folder those of a SigLIP tower, without that head, under the names of `tower_tensors`."""
    own = re.compile(r"(?:model\.)?(?:vision_tower\.)?(?:vision_model\.)?((?:embeddings|encoder|post_layernorm)\..*)")
    return {TOWER + match[1]: tensor for name, tensor in stored.items() if (match := own.fullmatch(name))}

"""Folders of models that see, and of SigLIP towers: `config.json` and the settings of the processors, both ways.

A model with LLaVA's projector is a `LlavaForConditionalGeneration`, which transformers and others load as it is. For
another projector, and for shuffled pixels, there is no such class; then the folder has the same form and a `model_type`
of our own, which other programs refuse.
"""

import dataclasses
import functools
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minimind_jax.convert.hf_config import from_hf_config, to_hf_config
from minimind_jax.convert.hf_weights import StoredTensor, check_names_and_shapes
from minimind_jax.convert.torch_file import read_weights
from minimind_jax.convert.vision_weights import tower_names, tower_tensors
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError, explained
from minimind_jax.model.config import ModelConfig, TowerConfig, Vision
from minimind_jax.model.transformer import Params
from minimind_jax.model.vision import empty_tower
from minimind_jax.paths import as_path, local_folder
from minimind_jax.texts import is_there, read_object, write_json

LLAVA = "llava"
OWN = "minimind_jax_vlm"
ARCHITECTURES = {LLAVA: "LlavaForConditionalGeneration", OWN: "MiniMindJaxVLM"}
# What an absent key means in a SigLIP folder: Google's say only what differs.
_TOWER_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}
_NAMED = {  # width, width between, layers, heads
    "base": (768, 3072, 12, 12),
    "large": (1024, 4096, 24, 16),
    "so400m": (1152, 4304, 27, 16),
    "giant-opt": (1536, 6144, 40, 16),
}
_PIXEL_DEFAULTS = {"resample": 3, "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


class Tower(NamedTuple):
    """A tower of a folder. tensors: under the names of `vision_weights`."""

    config: TowerConfig
    tensors: dict[str, StoredTensor]

    def params(self) -> Params:
        """In float32, NumPy."""
        params = empty_tower(self.config)
        for name, view in tower_tensors(params).items():
            view[...] = self.tensors[name].read(...)
        return params


def open_tower(folder: str | Path) -> Tower:
    """The tower of a SigLIP or SigLIP2 folder, of a classifier over one, or of a model that sees; nothing is read yet.
    Raises UserError: it has none, or one of a kind that is not computed here."""
    place = local_folder(as_path(folder))
    config = read_tower_config(place)
    tensors = tower_names(read_weights(place))
    expected = {name: view.shape for name, view in tower_tensors(empty_tower(config)).items()}
    check_names_and_shapes(expected, tensors, str(folder))
    return Tower(config, tensors)


def read_tower_config(folder: Path) -> TowerConfig:
    """That of a folder as `open_tower` takes it, whose weights may not be there yet."""
    file = folder / "config.json"
    if not is_there(file):
        raise UserError(f"{file}: no such file; expected the folder of a SigLIP model")
    values = read_object(file)
    described = values.get("vision_config", values)
    if values.get("model_type") == "siglip":
        described = {"model_type": "siglip_vision_model", **(described or {})}
    return _read_tower(described, folder)


def tower_named(name: str) -> TowerConfig | None:
    """The shape of a tower of Google's, of which nothing but its name is here; None for other names."""
    match = re.search(r"siglip2?-([\w-]+?)-patch(\d+)-(\d+)", name)
    if match is None or match[1] not in _NAMED:
        return None
    return TowerConfig(*_NAMED[match[1]], image_size=int(match[3]), patch_size=int(match[2]))


def sees(values: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is that of a model that sees, as this module writes them."""
    return values.get("model_type") in (LLAVA, OWN)


def read_seeing_config(values: Mapping[str, Any], folder: Path) -> ModelConfig:
    """The configuration of such a folder. Raises UserError for what is not computed here."""
    where = str(folder / "config.json")
    refused = {
        "vision_feature_select_strategy": values.get("vision_feature_select_strategy") != "full",
        "vision_feature_layer": not isinstance(values.get("vision_feature_layer"), int),
        "multimodal_projector_bias": values.get("multimodal_projector_bias") is False,
        "text_config": not isinstance(values.get("text_config"), dict),
        "vision_config": not isinstance(values.get("vision_config"), dict),
    }
    for name, bad in refused.items():
        if bad:
            raise UserError(
                f"{where}: {name} is {values.get(name)!r}, which is not supported: expected all patches (full) of one "
                "layer of a SigLIP tower, and a projector with biases"
            )
    tied = values.get("tie_word_embeddings") or values["text_config"].get("tie_word_embeddings")
    text = from_hf_config({**values["text_config"], "tie_word_embeddings": bool(tied)}, f"{where}: text_config")
    tower = _read_tower(values["vision_config"], folder)
    layer = values["vision_feature_layer"]
    with explained(where, ValueError):
        vision = Vision(
            tower,
            marker_id=_int(values.get("image_token_index", values.get("image_token_id"))),
            projector=values.get("projector_type", "llava"),
            pixel_shuffle=_int(values.get("pixel_shuffle", 1)),
            projector_act=values.get("projector_hidden_act", "gelu"),
            feature_layer=layer if layer < 0 else layer - tower.num_hidden_layers - 1,
        )
        return dataclasses.replace(text, vision=vision)


def to_seeing_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model that sees whose tensors are stored as `dtype`."""
    text, vision = to_hf_config(config, dtype), config.vision
    is_stock = vision.projector == "llava" and vision.pixel_shuffle == 1
    model_type = LLAVA if is_stock else OWN
    own = {} if is_stock else {"projector_type": vision.projector, "pixel_shuffle": vision.pixel_shuffle}
    ids = {name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "image_token_index": vision.marker_id,
        "image_token_id": vision.marker_id,
        "image_seq_length": vision.image_tokens,
        "vision_feature_layer": vision.feature_layer,
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": vision.projector_act,
        "multimodal_projector_bias": True,
        **own,
        "tie_word_embeddings": config.tie_word_embeddings,
        **ids,
        "torch_dtype": dtype,
        "dtype": dtype,
        "text_config": text,
        "vision_config": to_tower_config(vision.tower, dtype),
    }


def to_tower_config(tower: TowerConfig, dtype: str) -> dict[str, Any]:
    """The `vision_config` of a tower without the head that pools patches."""
    return {
        "model_type": "siglip_vision_model",
        **{name: getattr(tower, name) for name in _TOWER_DEFAULTS},
        "num_channels": 3,
        "attention_dropout": 0.0,
        "vision_use_head": False,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def write_processors(folder: Path, vision: Vision, tokenizer: Tokenizer | None) -> None:
    """`preprocessor_config.json` and, where there is a tokenizer, `processor_config.json`, for transformers."""
    tower = vision.tower
    write_image_processor(folder, tower, processor_class="LlavaProcessor")
    if tokenizer is not None:
        settings = {
            "processor_class": "LlavaProcessor",
            "image_token": tokenizer.decode([vision.marker_id], skip_special_tokens=False),
            "patch_size": tower.patch_size * vision.pixel_shuffle,
            "num_additional_image_tokens": 0,
            "vision_feature_select_strategy": "full",
        }
        write_json(folder / "processor_config.json", settings)


def write_image_processor(folder: Path, tower: TowerConfig, **more: Any) -> None:
    """`preprocessor_config.json`."""
    side = {"height": tower.image_size, "width": tower.image_size}
    flags = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True)
    pixels = {name: getattr(tower, name) for name in _PIXEL_DEFAULTS}
    kind = {"image_processor_type": "SiglipImageProcessor", **more}
    write_json(folder / "preprocessor_config.json", {**kind, **flags, "size": side, **pixels})


def _read_tower(values: Mapping[str, Any], folder: Path) -> TowerConfig:
    """Of a vision_config, and of the processor's settings beside it."""
    where = folder / "config.json"
    kind = values.get("model_type")
    if kind != "siglip_vision_model":
        hint = "; NaFlex models, of no fixed resolution, are not read" if str(kind).startswith("siglip2") else ""
        raise UserError(f"{where}: the tower's model_type is {kind!r}; it must be siglip_vision_model{hint}")
    found = {name: values.get(name, default) for name, default in _TOWER_DEFAULTS.items()}
    for name in ("image_size", "patch_size"):  # transformers 5 may write both sides
        if isinstance(found[name], list) and len(set(found[name])) == 1:
            found[name] = found[name][0]
    with explained(str(where), ValueError, TypeError):
        kinds = {"hidden_act": str, "layer_norm_eps": float}
        numbers = {name: kinds.get(name, _int)(value) for name, value in found.items()}
        return TowerConfig(**numbers, **_read_pixels(folder, numbers["image_size"]))


def _read_pixels(folder: Path, image_size: int) -> dict[str, Any]:
    """The fields of a TowerConfig that say how pictures are resized and normalised.

    They are in preprocessor_config.json, or in the image_processor of processor_config.json, where transformers 5
    writes them; without either they are SigLIP's.
    """
    file, nested = folder / "preprocessor_config.json", folder / "processor_config.json"
    values = read_object(file) if is_there(file) else {}
    if not values and is_there(nested):
        file, values = nested, read_object(nested).get("image_processor") or {}
    if not values:
        _tell_guess(folder)
    kind = str(values.get("image_processor_type", "SiglipImageProcessor"))
    if not kind.startswith("SiglipImageProcessor"):
        raise UserError(f"{file}: image_processor_type is {kind!r}; it must be SiglipImageProcessor")
    size = values.get("size", image_size)
    size = {"height": size, "width": size} if isinstance(size, int) else size
    if size != {"height": image_size, "width": image_size}:
        raise UserError(
            f"{file}: size is {size}, and the tower reads images of {image_size} x {image_size} (config.json); they do "
            "not belong together"
        )
    if values.get("do_center_crop") or values.get("do_resize") is False:
        raise UserError(f"{file}: pictures that are cropped, or not resized, are not supported")
    found = {name: values.get(name, default) for name, default in _PIXEL_DEFAULTS.items()}
    if values.get("do_rescale") is False:
        found["rescale_factor"] = 1.0
    if values.get("do_normalize") is False:
        found |= {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    for name in ("image_mean", "image_std"):
        channels = found[name] if isinstance(found[name], list) else [found[name]] * 3
        if len(channels) != 3:
            raise UserError(f"{file}: {name} is {found[name]!r}; expected three numbers")
        found[name] = tuple(float(channel) for channel in channels)
    return found


@functools.cache
def _tell_guess(folder: Path) -> None:
    print(
        f"warning: {folder} does not say how its tower reads pictures (preprocessor_config.json, or image_processor in "
        "processor_config.json): they are resized by a bicubic filter and normalised with mean and deviation 0.5, as "
        "SigLIP's are; SigLIP2's filter is bilinear. Put the tower's own file there",
        file=sys.stderr,
    )


def _int(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is no whole number, where the size or the token of an image should be")
    return value

"""The tower and the projector of a model that sees as llama.cpp reads them: an mmproj file beside the text model's.

llama.cpp knows graphs by name. `mlp` is LLaVA's projector over a tower without its last norm; an image's tokens stand
where the media marker is, with none around them, and are read causally, all as here. Its graphs that shuffle pixels or
have a norm in front of the projector (lfm2, idefics3, internvl, ...) are of other towers, or put tokens of their own
around an image, so there is none for ours. GELU is its tanh formula in all of them.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf

from minimind_jax.convert.gguf_file import FILE_TYPES, Tensor, plan_tensor, write_gguf_file
from minimind_jax.convert.hf_weights import StoredTensor
from minimind_jax.convert.vision_weights import PROJECTOR, TOWER
from minimind_jax.errors import UserError
from minimind_jax.model.config import ModelConfig, Vision

KIND = gguf.MODEL_ARCH.MMPROJ
BICUBIC = 3  # Pillow's number of the filter that llama.cpp resizes with
_PROJECTOR_NAMES = {f"{PROJECTOR}linear_1": "mm.0", f"{PROJECTOR}linear_2": "mm.2"}


def check_seen_alike(vision: Vision, where: str) -> list[str]:
    """What llama.cpp sees otherwise within limits. Raises UserError for a projector that it has not."""
    has = "a projector with a norm in front (minimind_v)" * (vision.projector != "llava")
    has = has or f"pixel_shuffle {vision.pixel_shuffle}" * (vision.pixel_shuffle > 1)
    if has:
        raise UserError(
            f"{where}: the model has {has}, and llama.cpp no graph that computes it; --text_only writes the half that "
            "reads and writes words, minimind serve answers about images, and a model trained with --vision.projector "
            "llava --vision.pixel_shuffle 1 can be written whole"
        )
    notes = []
    if "gelu" in (vision.projector_act, vision.tower.hidden_act):
        notes.append("llama.cpp computes GELU by its tanh formula, up to 0.0005 from what this model was trained with")
    if vision.tower.resample != BICUBIC:
        side = vision.tower.image_size
        notes.append(
            "llama.cpp resizes pictures with a bicubic filter, and this tower has another; pictures of "
            f"{side} x {side} pixels are seen alike"
        )
    return notes


def write_mmproj(path: Path, name: str, config: ModelConfig, tensors: Mapping[str, StoredTensor], dtype: str) -> None:
    """Writes the tower and projector. tensors: of the whole model, as `hf_tensors` names them."""
    planned = _tensors(config.vision, tensors, dtype)
    write_gguf_file(path, KIND, lambda writer: _describe(writer, name, config, dtype), planned)


def _tensors(vision: Vision, tensors: Mapping[str, StoredTensor], dtype: str) -> Iterator[Tensor]:
    """Those that the projector sees something of, under llama.cpp's names."""
    depth = _depth(vision)
    name_of = gguf.get_tensor_name_map(KIND, depth).get_name
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        found = name_of(module.removeprefix("model.")) if name.startswith(TOWER) else _PROJECTOR_NAMES.get(module)
        if found not in (None, "v.post_ln"):
            yield plan_tensor(f"{found}.{leaf}", tensor.shape, dtype, tensor.read)


def _describe(writer: gguf.GGUFWriter, name: str, config: ModelConfig, dtype: str) -> None:
    vision, tower = config.vision, config.vision.tower
    depth, scale = _depth(vision), 1 / (255 * tower.rescale_factor)  # llama.cpp always divides pixels by 255
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_use_gelu(True)
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_patch_size(tower.patch_size)
    writer.add_vision_embedding_length(tower.hidden_size)
    writer.add_vision_feed_forward_length(tower.intermediate_size)
    writer.add_vision_block_count(depth)
    writer.add_vision_head_count(tower.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(tower.layer_norm_eps)
    writer.add_vision_projection_dim(config.hidden_size)
    writer.add_vision_image_mean([mean * scale for mean in tower.image_mean])
    writer.add_vision_image_std([std * scale for std in tower.image_std])
    writer.add_array("clip.vision.feature_layer", [depth])  # without it the last block is left out
    # Tiles of no size: the whole picture alone, stretched to a square. Without, it would be one with grey margins.
    writer.add_array("clip.vision.image_grid_pinpoints", [0, 0])


def _depth(vision: Vision) -> int:
    """Layers of the tower up to the one that the projector reads."""
    return vision.tower.num_hidden_layers + 1 + vision.feature_layer

"""`config.json` of a Hugging Face folder: written so that every reader finds its keys, read in every form in use.

Readers disagree on a few keys, and a missing one is often not an error but a wrong model (transformers 4.57 takes
theta 10000 when there are only `rope_parameters`). So both spellings of each are written:
`rope_theta` and `rope_parameters`, `num_experts` and `num_local_experts`, `torch_dtype` and `dtype`.
"""

import typing
from collections.abc import Mapping, Sequence
from typing import Any

from minimind_jax.errors import UserError, explained
from minimind_jax.model.config import ModelConfig, RopeScaling, id_tuple, union_of_ids, yarn_attention_factor
from minimind_jax.values import convert, is_optional

ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "minimind": "MiniMindForCausalLM"}
# With a head of scores in place of the language model's: reward models and classifiers.
HEADED = {
    "qwen3": "Qwen3ForSequenceClassification",
    "qwen3_moe": "Qwen3MoeForSequenceClassification",
    "siglip": "SiglipForImageClassification",
}
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
# What an absent key means to the library that wrote the file.
_QWEN3_DEFAULTS = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_MINIMIND_DEFAULTS = {
    **_QWEN3_DEFAULTS,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rope_theta": 1e6,
}
# MiniMind's own yarn, which its `inference_rope_scaling` switches on.
MINIMIND_YARN = RopeScaling("yarn", 16.0, 2048, attention_factor=1.0, beta_fast=32.0, beta_slow=1.0)
# Of our own: the context of a model with linear or dynamic scaling, where it is not what readers make of the others.
_CONTEXT_KEY = "extended_max_position_embeddings"


def to_hf_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model whose tensors are stored as `dtype` (float32, bfloat16 or float16).

    With `linear` and `dynamic` scaling the written `max_position_embeddings` is the original context, because that is
    where transformers looks for it, and readers multiply it by the factor; a model with another context has it in a
    key of its own, which they ignore. With `yarn` it is the extended one. Dropout and the router's gradient are
    matters of training and are not written.
    """
    scaling = config.rope_scaling
    extended_by_reader = _is_extended_by_reader(scaling)
    rope = {"rope_type": "default"} if scaling is None else _rope_dict(scaling)
    model_type = "qwen3_moe" if config.is_moe else "qwen3"
    values = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        **{name: getattr(config, name) for name in SIZES},
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": (
            scaling.original_max_position_embeddings if extended_by_reader else config.max_position_embeddings
        ),
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": float(config.rope_theta),
        "rope_scaling": None if scaling is None else {"type": rope["rope_type"], **rope},
        "rope_parameters": {"rope_theta": float(config.rope_theta), **rope},
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": config.num_hidden_layers,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": _ids_json(config.eos_token_id),
        "pad_token_id": config.pad_token_id,
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
    }
    if config.is_moe:
        values |= {
            "num_experts": config.num_experts,
            "num_local_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "moe_intermediate_size": config.moe_intermediate_size,
            "norm_topk_prob": config.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "router_aux_loss_coef": config.router_aux_loss_coef,
            "output_router_logits": False,
        }
    if extended_by_reader and config.max_position_embeddings != _extended_context(scaling):
        values[_CONTEXT_KEY] = config.max_position_embeddings
    return values


def _is_extended_by_reader(scaling: RopeScaling | None) -> bool:
    return scaling is not None and scaling.rope_type in ("linear", "dynamic")


def _extended_context(scaling: RopeScaling) -> int:
    return int(scaling.original_max_position_embeddings * scaling.factor)


def head_config(model_type: str, labels: Sequence[str], several: bool) -> dict[str, Any]:
    """What the `config.json` of a model with a head of scores has beside what is there without one, and instead of it.

    model_type: of `HEADED`. labels: of the scores. several: a text may have any number of them.
    """
    kind = "multi_label_classification" if several else "single_label_classification"
    return {
        "architectures": [HEADED[model_type]],
        "num_labels": len(labels),
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
        "problem_type": kind if len(labels) > 1 else "regression",
    }


def read_labels(values: Mapping[str, Any]) -> tuple[tuple[str, ...], bool] | None:
    """(labels, whether a text may have several) of the `config.json` of a model with a head of scores; else None."""
    if not set(values.get("architectures") or ()) & set(HEADED.values()):
        return None
    labels = {int(number): str(label) for number, label in (values.get("id2label") or {}).items()}
    several = values.get("problem_type") == "multi_label_classification"
    return tuple(labels[number] for number in sorted(labels)), several


def to_generation_config(config: ModelConfig, source: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The `generation_config.json`: the model's token ids and either `source`'s settings or MiniMind's sampling.

    Every token that ends an answer of the model ends one there, and so does every one of `source`.
    """
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ids["eos_token_id"] = _ids_json(config.eos_token_id)
    if source is None:
        return {**ids, "do_sample": True, "temperature": 0.85, "top_p": 0.85, "top_k": 50}
    kept = {
        k: v for k, v in source.items() if v is not None and k not in ("transformers_version", "_from_model_config")
    }
    theirs = id_tuple(kept.get("eos_token_id"))
    ends = theirs if set(config.end_ids) <= set(theirs) else (*config.end_ids, *theirs)
    return {**ids, **kept, "eos_token_id": _ids_json(union_of_ids(ends))}


def from_hf_config(values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The architecture a `config.json` describes: model_type `qwen3`, `qwen3_moe` or MiniMind's own `minimind`.

    Fields that only training uses get their defaults.

    Raises UserError: a key is missing, or the model has a feature that this project does not compute.
    """
    what, way_out = f"{where} does not describe a model", "put back the copy it came with"
    with explained(what, ValueError, TypeError, AttributeError, ArithmeticError, way_out=way_out):
        return _from_hf_config(values, where)


def _from_hf_config(values: Mapping[str, Any], where: str) -> ModelConfig:
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        hint = " (SigLIP models are for --vision.tower and classify predict)" if model_type == "siglip" else ""
        raise UserError(
            f"{where}: model_type {model_type!r} is not supported{hint}; it must be {_either(ARCHITECTURES)}"
        )
    _refuse_unsupported(values, where)
    defaults = _MINIMIND_DEFAULTS if model_type == "minimind" else _QWEN3_DEFAULTS
    fields = {name: _required(values, name, where) for name in SIZES}
    fields |= {name: values.get(name, default) for name, default in defaults.items()}
    fields["eos_token_id"] = union_of_ids(checked_ids(fields["eos_token_id"], where))
    if model_type == "qwen3_moe" or values.get("use_moe"):
        fields |= _moe_fields(values, where)
    fields["head_dim"] = values.get("head_dim")
    fields = {name: _typed(name, value, where) for name, value in fields.items()}
    if not fields["head_dim"] and fields["num_attention_heads"] > 0:
        of_width = fields["hidden_size"] // fields["num_attention_heads"]
        fields["head_dim"] = 128 if model_type == "qwen3" else of_width
    fields["rope_theta"], fields["rope_scaling"] = _read_rope(values, fields, where)
    if _is_extended_by_reader(fields["rope_scaling"]):  # see to_hf_config
        fields["max_position_embeddings"] = values.get(_CONTEXT_KEY) or _extended_context(fields["rope_scaling"])
    with explained(where, ValueError):
        return ModelConfig(**fields)


def _typed(name: str, value: Any, where: str) -> Any:
    """A JSON value in the type of a model's field; text stands for no number and no truth."""
    kind = typing.get_type_hints(ModelConfig).get(name, float)
    if name == "eos_token_id" or (value is None and is_optional(kind)):  # ids are checked where they are read
        return value
    try:
        if isinstance(value, bool | int | float):
            return convert(kind, value)
    except (ValueError, TypeError, ArithmeticError):
        pass
    kind = next((k for k in typing.get_args(kind)), kind)
    expected = {int: "a whole number", bool: "true or false"}.get(kind, "a number")
    raise UserError(f"{where}: {name} is {value!r}; expected {expected}")


def _moe_fields(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    minimind = values["model_type"] == "minimind"
    num_experts = values.get("num_experts", values.get("num_local_experts"))
    if num_experts is None:
        raise UserError(f"{where}: num_experts is missing (num_local_experts, too)")
    if values.get("num_local_experts", num_experts) != num_experts:
        raise UserError(
            f"{where}: num_experts {num_experts} and num_local_experts {values['num_local_experts']} must be equal"
        )
    return {
        "num_experts": num_experts,
        "num_experts_per_tok": _required(values, "num_experts_per_tok", where),
        "moe_intermediate_size": _required(values, "moe_intermediate_size", where),
        "norm_topk_prob": values.get("norm_topk_prob", minimind),
        "router_aux_loss_coef": values.get("router_aux_loss_coef", 5e-4 if minimind else 1e-3),
    }


def _refuse_unsupported(values: Mapping[str, Any], where: str):
    """Raises UserError for anything that changes what the network computes and that this project lacks."""
    refused = {
        "use_sliding_window": bool(values.get("use_sliding_window")),
        "layer_types": any(kind != "full_attention" for kind in values.get("layer_types") or ()),
        "attention_bias": bool(values.get("attention_bias")),
        "hidden_act": values.get("hidden_act", "silu") != "silu",
        "mlp_only_layers": bool(values.get("mlp_only_layers")),
        "decoder_sparse_step": values.get("decoder_sparse_step", 1) != 1,
        "partial_rotary_factor": values.get("partial_rotary_factor") not in (None, 1.0),
        "quantization_config": bool(values.get("quantization_config")),
        "architectures": any(
            name not in (*ARCHITECTURES.values(), *HEADED.values()) for name in values.get("architectures") or ()
        ),
    } | {name: bool(value) for name, value in values.items() if "shared_expert" in name}
    for name, bad in refused.items():
        if bad:
            raise UserError(
                f"{where}: {name} is {values[name]!r}, which is not supported: the model must be a "
                f"{_either(ARCHITECTURES.values())} with full attention, silu, no biases and all layers alike"
            )


def _rope_dict(scaling: RopeScaling) -> dict[str, Any]:
    """`scaling` under Hugging Face's keys; only yarn has more than a factor there."""
    values = {"rope_type": scaling.rope_type, "factor": float(scaling.factor)}
    if scaling.rope_type == "yarn":
        values |= {
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
            "attention_factor": float(scaling.attention_factor),
            "beta_fast": float(scaling.beta_fast),
            "beta_slow": float(scaling.beta_slow),
        }
    return values


def _read_rope(values: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from `rope_theta` + `rope_scaling` (transformers 4), `rope_parameters` (5), or both."""
    new = dict(values.get("rope_parameters") or {})
    old = dict(values.get("rope_scaling") or {})
    if values["model_type"] == "minimind" and values.get("inference_rope_scaling"):
        old = _rope_dict(MINIMIND_YARN)
    thetas = [t for t in (values.get("rope_theta"), old.pop("rope_theta", None), new.pop("rope_theta", None)) if t]
    if not thetas:
        thetas = [_required(fields, "rope_theta", where)]
    forms = [_read_scaling(form, fields, where) for form in (old, new) if form] or [None]
    if "rope_scaling" in values and values["rope_scaling"] is None and not old and new:
        forms = [None, *forms]
    if len(set(thetas)) > 1 or len(set(forms)) > 1:
        raise UserError(
            f"{where}: rope_theta / rope_scaling and rope_parameters contradict each other; keep one of them"
        )
    return float(thetas[0]), forms[0]


def _read_scaling(rope: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> RopeScaling | None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return None
    if rope_type not in ("linear", "dynamic", "yarn"):
        raise UserError(
            f"{where}: rope_type {rope_type!r} is not supported; it must be default, linear, dynamic or yarn"
        )
    if rope.get("truncate") is False or rope.get("partial_rotary_factor") not in (None, 1.0):
        raise UserError(f"{where}: rope scaling with truncate or partial_rotary_factor is not supported: {dict(rope)}")
    factor = float(_required(rope, "factor", f"{where}: rope scaling"))
    context = fields["max_position_embeddings"]
    if rope_type != "yarn":
        return RopeScaling(rope_type, factor, context)
    attention_factor, mscales = rope.get("attention_factor"), (rope.get("mscale"), rope.get("mscale_all_dim"))
    if attention_factor is None and all(mscales):  # as transformers does; without them RopeScaling derives it
        attention_factor = yarn_attention_factor(factor, mscales[0]) / yarn_attention_factor(factor, mscales[1])
    return RopeScaling(
        rope_type="yarn",
        factor=factor,
        original_max_position_embeddings=rope.get("original_max_position_embeddings") or context,
        attention_factor=attention_factor if attention_factor is None else float(attention_factor),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
    )


def _required(values: Mapping[str, Any], name: str, where: str) -> Any:
    if values.get(name) is None:
        raise UserError(f"{where}: {name} is missing")
    return values[name]


def checked_ids(ids: Any, where: str) -> tuple[int, ...]:
    """A JSON value of eos_token_id: an id, a list of them or null. Raises UserError for anything else."""
    found = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(isinstance(token, int) for token in found):
        raise UserError(f"{where}: eos_token_id is {ids!r}; expected a token's id, or a list of ids")
    return tuple(found)


def _ids_json(ids: int | tuple[int, ...] | None) -> int | list[int] | None:
    return list(ids) if isinstance(ids, tuple) else ids


def _either(names) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}"

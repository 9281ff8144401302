"""Low-rank adapters as the folders that `peft` writes and reads: adapter_config.json and adapter_model.safetensors.

An adapter is small and useless without its base model, whose folder its configuration names.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from minimind_jax.convert.hf_weights import StoredTensor, read_safetensors_file
from minimind_jax.convert.replace import replacing
from minimind_jax.convert.vision_weights import PROJECTOR, TOWER, names_in_files, names_of_files
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError, explained
from minimind_jax.folders import ADAPTER_CONFIG
from minimind_jax.hub import origin_of
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.lora import LEAVES, PROJECTIONS, Params, RankTable, scale_of
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.paths import absolute, as_path, local_folder
from minimind_jax.texts import read_object, write_json

WEIGHTS = "adapter_model.safetensors"
ALL_LINEAR = "all-linear"
PRESETS = {"minimind": ("q_proj", "o_proj")}  # what MiniMind's rule, square matrices only, means at its sizes
_PREFIX = "base_model.model."
_BLOCKS = {"attention": "self_attn", "mlp": "mlp"}
# Features of peft whose absence is expected, and the values that mean it.
_UNSUPPORTED = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # others change the base model's weights
}


class StoredAdapter(NamedTuple):
    """An adapter as it lies in a folder."""

    base: str  # folder of the model it belongs to, as its configuration names it
    table: RankTable  # its ranks
    tree: Params  # its parameters, of which `lora_scale` is a number for each layer (NumPy, float32; see `model.lora`)
    rslora: bool  # of its training


# Which projections, and their ranks -----------------------------------------------------------------------------------


def module_name(layer: int, projection: str) -> str:
    """What transformers calls a projection: model.layers.3.self_attn.q_proj."""
    return f"model.layers.{layer}.{_BLOCKS[PROJECTIONS[projection]]}.{projection}"


def rank_table(config: ModelConfig, rank: int, targets: Sequence[str], ranks: Mapping[str, int]) -> RankTable:
    """The rank of every projection in every layer, 0 where it has no adapter.

    targets: `all-linear`, `minimind`, or whole words of a module's name (`q_proj`, `layers.3`, `layers.3.mlp.up_proj`),
    or regular expressions for them. ranks: others than `rank`, for modules that such a pattern stands for.

    Raises UserError for a target that is nowhere in the model. The experts of a MoE have no adapters.
    """
    there = _projections(config)
    layers = range(config.num_hidden_layers)
    wanted = [name for target in targets for name in PRESETS.get(target, (target,))]
    _check_targets([*wanted, *ranks], [module_name(layer, name) for layer in layers for name in there], config)

    def rank_of(layer: int, name: str) -> int:
        module = module_name(layer, name)
        if not any(target == ALL_LINEAR or _matches(target, module) for target in wanted):
            return 0
        return next((r for pattern, r in ranks.items() if _matches(pattern, module)), rank)

    return {name: tuple(rank_of(layer, name) for layer in layers) for name in there}


def _projections(config: ModelConfig) -> list[str]:
    """Those of a model that can have adapters."""
    return [name for name, block in PROJECTIONS.items() if block == "attention" or not config.is_moe]


def _matches(target: str, module: str) -> bool:
    """Whether `target`, a name or a pattern, stands for the module or for something that the module is in."""
    return f".{target}." in f".{module}." or re.fullmatch(rf"(.*\.)?({target})(\..*)?", module) is not None


def _check_targets(targets: Sequence[str], modules: Sequence[str], config: ModelConfig) -> None:
    for target in targets:
        with explained(f"lora: {target!r} is neither a name nor a regular expression", re.error):
            if target == ALL_LINEAR or any(_matches(target, module) for module in modules):
                continue
        names = sorted({module.rpartition(".")[2] for module in modules})
        experts = "; the experts of a mixture have no adapters" if config.is_moe else ""
        raise UserError(
            f"lora: {target!r} is no projection of this model; there are {', '.join(names)}, in "
            f"{config.num_hidden_layers} layers ({modules[0]} ...){experts}"
        )


# Writing --------------------------------------------------------------------------------------------------------------


def save_peft(
    folder: str | Path,
    params: Params,
    table: RankTable,
    *,
    base: str | Path,
    tokenizer: Tokenizer | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    sees: bool = False,
    generation_config: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the adapters in `params`, in float32; an older model there is replaced only when this is complete.

    table: their ranks. base: the folder of the model they were trained over. rslora: whether alpha is to be divided by
    the root of the rank; the scales themselves are those in `params`. sees: whether the base is a model that sees, of
    which the language model has the adapters. generation_config: the file of that name.
    Raises UserError as `convert.hf.save_hf` does.
    """
    tensors, ranks, alphas = {}, {}, {}
    for module, a, b, scale in low_rank_pairs(params, table):
        module = _name_in_files(module, sees)
        ranks[module] = len(a)
        alphas[module] = float(f"{scale / scale_of(len(a), 1, rslora):.6g}")
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(a, np.float32)
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(b, np.float32)
    named, revision = origin_of(Path(base)) or (str(base), None)  # others have another cache of the hub
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": named,
        "revision": revision,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "lora_dropout": dropout,
        "target_modules": list(ranks) if sees else _target_names(table),  # a tower has projections of these names, too
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    folder = as_path(folder)
    if absolute(folder) == absolute(as_path(base)):
        raise UserError(f"{folder} is the base model's own folder, which the adapter needs; choose another output")
    with replacing(folder) as partial:
        write_json(partial / ADAPTER_CONFIG, config)
        if generation_config is not None:
            write_json(partial / "generation_config.json", generation_config)
        if tokenizer is not None:
            tokenizer.save(partial)
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
    return folder


def _name_in_files(module: str, sees: bool) -> str:
    """What transformers calls a projection of a language model that is the half of one that sees."""
    return next(iter(names_in_files({module: None}))) if sees else module


def _modules(table: RankTable):
    """(layer, projection, rank) of every adapter, layer by layer."""
    for layer in range(len(next(iter(table.values())))):
        for name, ranks in table.items():
            if ranks[layer]:
                yield layer, name, ranks[layer]


def low_rank_pairs(params: Params, table: RankTable) -> Iterator[tuple[str, np.ndarray, np.ndarray, float]]:
    """(module, A (r, in), B (out, r), scale) of every adapter in `params`: torch's layout, W changes by scale B A."""
    for layer, name, rank in _modules(table):
        block = PROJECTIONS[name]
        a, b, scale = (np.asarray(params["layers"][block][name][leaf])[layer] for leaf in LEAVES)
        yield module_name(layer, name), a[:, :rank].T, b[:rank].T, float(scale)


def _target_names(table: RankTable) -> list[str]:
    """Names as peft takes them: of the projection where all its layers have an adapter, of the modules where not."""
    whole = [name for name, ranks in table.items() if all(ranks)]
    return whole + [module_name(layer, name) for layer, name, _ in _modules(table) if name not in whole]


# Reading --------------------------------------------------------------------------------------------------------------


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """adapter_config.json. Raises UserError when it is no LoRA, or has a feature that is not supported."""
    file = local_folder(as_path(folder)) / ADAPTER_CONFIG
    config = read_object(file)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type is {config.get('peft_type')!r}; only LORA adapters are supported")
    for name, absent in _UNSUPPORTED.items():
        if config.get(name, absent[0]) not in absent:
            raise UserError(f"{file}: {name} {config[name]!r} is not supported; only plain LoRA is")
    for name, value in config.items():
        if value is True and name.startswith("use_") and name != "use_rslora":
            raise UserError(f"{file}: {name} is not supported; only plain LoRA is")
    _check_numbers(config, file)
    if not isinstance(config.get("base_model_name_or_path"), str):
        raise UserError(f"{file}: base_model_name_or_path does not name the model that the adapter belongs to")
    return config


def _check_numbers(config: Mapping[str, Any], file: Path) -> None:
    """Raises UserError for a value that is to be a number and is none, or a pattern that is none."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{file}: alpha_pattern is {patterns!r}; expected an object of numbers")
    for key in patterns:
        with explained(f"{file}: alpha_pattern {key!r} is not a regular expression", re.error):
            re.compile(key)
    numbers = {name: config[name] for name in ("lora_alpha", "lora_dropout") if name in config}
    for name, value in {**numbers, **{f"alpha_pattern {key!r}": alpha for key, alpha in patterns.items()}}.items():
        if not isinstance(value, int | float):
            raise UserError(f"{file}: {name} is {value!r}; expected a number")


def load_peft(folder: str | Path, config: ModelConfig) -> StoredAdapter:
    """The adapter in a folder, for a model of that configuration. Raises UserError when a file is missing or damaged,
    or the adapter belongs to a model of another shape."""
    folder = local_folder(as_path(folder))
    settings = read_adapter_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder / WEIGHTS}: no such file, but {ADAPTER_CONFIG} is there; download or train it again")
    stored = read_safetensors_file(folder / WEIGHTS)
    if config.vision is not None:
        plain = names_of_files({name.removeprefix(_PREFIX): tensor for name, tensor in stored.items()})
        stored = {_PREFIX + name: tensor for name, tensor in plain.items()}
    where, layers = str(folder), range(config.num_hidden_layers)
    pairs = {
        (layer, name): [stored.pop(f"{_PREFIX}{module_name(layer, name)}.lora_{part}.weight", None) for part in "AB"]
        for layer in layers
        for name in _projections(config)
    }
    if outside := [name for name in stored if "embed_tokens" in name or "lm_head" in name]:
        raise UserError(f"{where}: {outside[0]} is not supported; only projections of the layers have adapters")
    if outside := [name for name in stored if name.startswith((_PREFIX + TOWER, _PREFIX + PROJECTOR))]:
        raise UserError(
            f"{where}: {outside[0]} is not supported; of a model that sees only the language model has adapters. Merge "
            "this one in peft (merge_and_unload), save the whole model (save_pretrained) and take that"
        )
    if stored:
        raise UserError(
            f"{where}: {next(iter(stored))} fits no projection of a base model of {config.num_hidden_layers} layers of "
            f"width {config.hidden_size}; the adapter belongs to {settings['base_model_name_or_path']}"
        )
    there = {place: pair for place, pair in pairs.items() if any(pair)}
    if not there:
        raise UserError(f"{where}: {WEIGHTS} holds no adapter")
    table = {
        name: tuple(_rank(there.get((layer, name)), layer, name, config, where) for layer in layers)
        for name in _projections(config)
        if any((layer, name) in there for layer in layers)
    }
    tree: Params = {}
    for name, ranks in table.items():
        block = PROJECTIONS[name]
        tree.setdefault(block, {})[name] = _stack(there, name, ranks, config, settings)
    return StoredAdapter(settings["base_model_name_or_path"], table, {"layers": tree}, bool(settings.get("use_rslora")))


def _rank(pair: list[StoredTensor | None] | None, layer: int, name: str, config: ModelConfig, where: str) -> int:
    if pair is None:
        return 0
    width, out = _shape(name, config)
    found = [tensor and tensor.shape for tensor in pair]
    rank = found[0][0] if found[0] else 0
    if found != [(rank, width), (out, rank)] or not rank:
        raise UserError(
            f"{where}: {module_name(layer, name)} has the adapter shapes {found}; this base model's projection is "
            f"{width} to {out}, so (rank, {width}) and ({out}, rank) are expected: the adapter belongs to another model"
        )
    return rank


def _shape(name: str, config: ModelConfig) -> tuple[int, int]:
    """(in, out) of a projection."""
    layers = LanguageModel(config).abstract_params()["layers"]
    return layers[PROJECTIONS[name]][name]["kernel"].shape[1:]


def _stack(there: Mapping, name: str, ranks: tuple[int, ...], config: ModelConfig, settings: Mapping) -> Params:
    L, rank, (width, out) = len(ranks), max(ranks), _shape(name, config)
    a, b = np.zeros((L, width, rank), np.float32), np.zeros((L, rank, out), np.float32)
    scales = np.zeros(L, np.float32)
    patterns = settings.get("alpha_pattern") or {}
    for layer, own in enumerate(ranks):
        if own:
            tensors = there[layer, name]
            a[layer, :, :own], b[layer, :own] = (np.asarray(tensor.read(...), np.float32).T for tensor in tensors)
            module = _name_in_files(module_name(layer, name), config.vision is not None)
            named = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", module))  # as peft does
            alpha = next(named, settings.get("lora_alpha", 8))
            scales[layer] = scale_of(own, alpha, bool(settings.get("use_rslora")))
    return {"lora_a": a, "lora_b": b, "lora_scale": scales}

"""What a run will do, known before its first step: what is printed at the start, and what is warned of."""

import math

import jax
import numpy as np
from jax.sharding import Mesh

from minimind_jax.config.sections import OptimizerConfig
from minimind_jax.config.stages import RunConfig
from minimind_jax.losses.vocabulary import piece_size
from minimind_jax.model import attention, moe
from minimind_jax.model.image_model import ImageModel
from minimind_jax.model.lora import split, without_adapters
from minimind_jax.model.transformer import LanguageModel, count_parameters
from minimind_jax.model.vision import VISION
from minimind_jax.sharding import row_shards
from minimind_jax.training.optimizer import make_schedule
from minimind_jax.training.source import Recipe
from minimind_jax.training.state import Parameters, is_adapter


def few_steps(steps: int, config: RunConfig) -> str | None:
    """What so short a run means, and the settings that make it longer; None for one that is long enough."""
    if steps >= config.SHORTEST:
        return None
    rows = f", or {config.SMALLER_STEPS.format(config.data.seq_len)}"
    return (
        f"{steps} step{'s' * (steps != 1)} in all: a model learns little in fewer than {config.SHORTEST}. For more "
        f"steps: --training.epochs N, --training.steps N{rows * (config.rows_per_step > 1)}, or more data; to learn "
        f"more in each: a higher --optimizer.learning_rate than {config.optimizer.learning_rate:g}"
    )


def schedule_change(optimizer: OptimizerConfig, step: int, before: int, now: int) -> str | None:
    """What a run that goes on at `step` with another length must know: a schedule is over the whole length, so the
    learning rate jumps. None where it does not. before, now: steps of the run."""
    if before == now:
        return None
    old = float(make_schedule(optimizer, max(before, (optimizer.warmup_steps or 0) + 1))(step))
    new = float(make_schedule(optimizer, now)(step))
    if abs(new - old) <= 0.01 * max(new, old):
        return None
    return (
        f"the run was planned for {before:,} steps and is now for {now:,}. Its {optimizer.schedule} schedule is over "
        f"the whole length, so the learning rate goes from {old:.2e} to {new:.2e} at step {step + 1:,}. To train on "
        "without a jump, start another run from this one's model (--init_from, another --run) with the rate you want"
    )


def run_facts(
    config: RunConfig,
    recipe: Recipe,
    stage: str,
    model: LanguageModel | ImageModel,
    mesh: Mesh,
    parts: int,
    total_steps: int,
    has_words: bool = True,
) -> dict[str, str]:
    """What is printed at the start and kept in environment.json. parts: micro-batches of a step. has_words: false of a
    model with a head of scores, which makes no logits of words."""
    devices, asked = mesh.devices.ravel(), config.training.accumulation_steps
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    in_parts = f" in {parts} parts" * (asked > 1)
    if parts < asked:
        in_parts += f", not {asked}: a device has {config.rows_per_step // row_shards(mesh)} rows of a step"
    tell = _text_facts if isinstance(model, LanguageModel) else _picture_facts
    return {
        "stage": stage,
        **tell(config, model, mesh, parts, has_words),
        **_group_facts(recipe.parameters),
        "devices": f"{devices.size} x {devices[0].device_kind}{f' ({sizes})' if sizes else ''}",
        "batch": f"{config.rows_per_step} rows of {config.data.seq_len} {config.unit}{in_parts}",
        **recipe.source.facts(total_steps),
        "validation data": recipe.evaluation.describe() if recipe.evaluation is not None else "none",
    }


def _picture_facts(config: RunConfig, model: ImageModel, mesh: Mesh, parts: int, has_words: bool) -> dict[str, str]:
    size, tower = count_parameters(model.abstract_params()), model.config
    return {
        "model": f"{size:,} parameters ({tower.num_hidden_layers} layers of width {tower.hidden_size}, pictures of "
        f"{tower.image_size} x {tower.image_size} pixels)",
        "compute": model.dtype.name,
    }


def _text_facts(config: RunConfig, model: LanguageModel, mesh: Mesh, parts: int, has_words: bool) -> dict[str, str]:
    shape, size = model.config, count_parameters(without_adapters(model.abstract_params()))
    experts = f", {shape.num_experts} experts, {shape.num_experts_per_tok} used" if shape.is_moe else ""
    rows = (config.rows_per_step // parts, config.data.seq_len, shape.num_attention_heads, shape.head_dim)
    own = model.dtype, model.platform, mesh, model.compute.deterministic
    path, reason = attention.choose_path(model.compute.attention, rows, shape.num_key_value_heads, *own)
    vocab = shape.vocab_size // mesh.shape["tensor"]
    tokens = rows[0] * config.data.seq_len // row_shards(mesh)  # of a micro-batch on a device
    piece = piece_size(tokens, vocab)
    return {
        "model": f"{size:,} parameters ({shape.num_hidden_layers} layers of width {shape.hidden_size}, "
        f"{shape.vocab_size:,} tokens{experts})",
        **_adapter_facts(model, size),
        "compute": f"{model.dtype.name}, attention path: {path}{f' ({reason})' if reason else ''}, "
        + f"experts path: {moe.choose_path(model.compute.experts, tokens, model.platform)}, " * shape.is_moe
        + f"remat {model.compute.remat}",
        **({"loss": f"logits of {piece:,} of {vocab:,} words at once on a device"} if has_words else {}),
    }


def _group_facts(parameters: Parameters) -> dict[str, str]:
    """Parts of the model that are trained in another way than the rest."""
    trained, masks = parameters.split(parameters.abstract)[0], parameters.layer_masks()
    facts = {}
    if masks is not None:
        share = jax.tree.map(lambda mask, leaf: round(np.mean(mask) * math.prod(leaf.shape)), masks, trained)
        facts["layers"] = f"some are kept as they are; {sum(jax.tree.leaves(share)):,} parameters trained"
    elif VISION in parameters.abstract:
        facts["trained"] = f"{count_parameters(trained):,} parameters"
    for group in parameters.groups:
        size = count_parameters(split(trained, group.takes)[0])
        facts[f"optimizer of {group.name}"] = (
            f"{size:,} parameters, {group.config.name} at {group.config.learning_rate:g}, gradient norm "
            f"{group.max_grad_norm:g}"
        )
    return facts


def _adapter_facts(model: LanguageModel, parameters: int) -> dict[str, str]:
    if model.adapter is None:
        return {}
    trained = count_parameters(split(model.abstract_params(), is_adapter)[0])
    ranks = ", ".join(f"{name} {rank}" for name, rank in model.adapter.ranks)
    return {"adapters": f"ranks {ranks}; {trained:,} parameters trained ({trained / parameters:.2%})"}

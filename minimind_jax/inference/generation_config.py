"""`generation_config.json` of a model's folder: how its makers sample it, and which tokens end an answer."""

import dataclasses
import sys
from pathlib import Path
from typing import NamedTuple

from minimind_jax.config.generation import FROM_MODEL, SamplingConfig
from minimind_jax.convert.hf_config import checked_ids
from minimind_jax.errors import explained
from minimind_jax.texts import is_there, read_object

# Keys without a say in what is generated here, and values of the others that change nothing.
_WITHOUT_EFFECT = {*FROM_MODEL, "do_sample", "bos_token_id", "eos_token_id", "pad_token_id"}
_WITHOUT_EFFECT |= {"transformers_version", "use_cache", "cache_implementation", "max_length"}
_NEUTRAL = {"num_beams": 1, "num_beam_groups": 1, "typical_p": 1.0, "epsilon_cutoff": 0, "eta_cutoff": 0}
_NEUTRAL |= {"length_penalty": 1.0, "encoder_repetition_penalty": 1.0, "num_return_sequences": 1, "top_h": 1.0}


class GenerationConfig(NamedTuple):
    """sampling: our defaults with the file's values; greedy if it says `do_sample: false`. eos_ids: the file's."""

    sampling: SamplingConfig
    eos_ids: frozenset[int]


def read_generation_config(*folders: Path) -> GenerationConfig:
    """The file of the first of the folders that has one, or our defaults. Keys that would change the text and are not
    followed are named. Raises UserError when it is no JSON object or holds a value that makes no sense."""
    files = [folder / "generation_config.json" for folder in folders]
    file = next(filter(is_there, files), files[0])
    values = read_object(file) if is_there(file) else {}
    ignored = [
        f"{name} {value!r}"
        for name, value in values.items()
        if name not in _WITHOUT_EFFECT and not name.startswith("_") and value and value != _NEUTRAL.get(name)
    ]
    if ignored:
        followed = f"followed are do_sample, eos_token_id, {', '.join(FROM_MODEL)}"
        print(f"note: {file}: not followed: {', '.join(ignored)} ({followed})", file=sys.stderr)
    given = {name: values[name] for name in FROM_MODEL if values.get(name) is not None}
    if values.get("do_sample") is False:
        given["temperature"] = 0.0
    with explained(str(file), ValueError, TypeError):
        sampling = dataclasses.replace(SamplingConfig(), **given)
    return GenerationConfig(sampling, frozenset(checked_ids(values.get("eos_token_id"), str(file))))

"""Low-rank adapters over one base model, which requests to one engine name."""

from collections.abc import Sequence
from pathlib import Path

from minimind_jax.convert.load import base_folder, load_tokenizer
from minimind_jax.convert.peft import load_peft
from minimind_jax.errors import UserError
from minimind_jax.folders import is_adapter, moved_with_run, resolve_model_folder
from minimind_jax.inference.generation_config import read_generation_config
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.transformer import Params

OFF = "off"  # what a person calls the base model by itself


def load_adapters(folder: Path, config: ModelConfig, names: Sequence[str]) -> tuple[dict[str, Params], set[int]]:
    """Adapters (folders or runs) of the base model in a folder, by their short names: their parameters; and the tokens
    that end an answer of any of them. Raises UserError for a folder that is no adapter, two of one name, an adapter
    that belongs to another model, and numbers that are not finite."""
    if names and is_adapter(folder):
        raise UserError(
            f"model {folder} is an adapter itself; name its base model {base_folder(folder)}, and it among the adapters"
        )
    trees: dict[str, Params] = {}
    ends: set[int] = set()
    for name in names:
        place = resolve_model_folder(name, "adapters")
        if not is_adapter(place):
            raise UserError(f"adapters: {place} is a whole model, not an adapter")
        # Of a run its name, of a folder the last part that is not `model`.
        short = next((part for part in reversed(Path(name).parts) if part not in ("model", "/")), name)
        if short in trees or short == OFF:
            raise UserError(f"adapters: two are called {short}; rename a folder")
        stored = load_peft(place, config)
        words = load_tokenizer(place, base=str(folder))  # refused when they are not the base model's
        ends |= {*read_generation_config(place).eos_ids, *words.end_ids}
        its_base = moved_with_run(stored.base, place) or Path(stored.base)
        if folder.resolve() not in (its_base.resolve(), Path(stored.base).resolve()):
            print(f"warning: the adapter {short} was trained over {stored.base}, not over {folder}")
        trees[short] = stored.tree
    return trees, ends

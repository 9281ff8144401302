"""Several low-rank adapters over one base model, switched between answers without a program being compiled anew."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from minimind_jax.convert.load import base_folder, load_tokenizer
from minimind_jax.convert.peft import StoredAdapter, load_peft
from minimind_jax.errors import UserError
from minimind_jax.folders import is_adapter, moved_with_run, resolve_model_folder
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.generation_config import read_generation_config
from minimind_jax.inference.load import load_engine
from minimind_jax.model.lora import PROJECTIONS, Adapter, join
from minimind_jax.model.transformer import LanguageModel, Params

OFF = "off"  # the name of the base model by itself


class SwitchedEngine(Engine):
    """An engine whose adapters can be chosen by name; `off` is the base model by itself.

    adapters: name -> its parameters, all of the shapes that `model.adapter` says.
    """

    def __init__(self, base: Engine, adapters: dict[str, Params], adapter: Adapter):
        model = LanguageModel(base.model.config, base.model.compute, adapter)
        self._base, self.adapters, self.active = base.params, adapters, OFF
        super().__init__(model, base.params, base.tokenizer, base.eos_ids, base.sampling, slots=1)
        self.use(OFF)

    def use(self, name: str) -> None:
        """Answers come from this adapter from now on. Raises UserError for a name that is not there."""
        if name not in self.adapters:
            raise UserError(f"there is no adapter {name}; there are {', '.join(self.adapters)}")
        layers = zip(self._base["layers"], self.adapters[name]["layers"], strict=True)
        self.load({**self._base, "layers": tuple(join(below, own) for below, own in layers)})
        self.active = name


def load_switched(model: str, names: Sequence[str], dtype: str = "auto") -> SwitchedEngine:
    """A base model with these adapters (folders or runs), the first of them in use.

    Raises UserError for a folder that is no adapter, two of one name, and an adapter that belongs to another model.
    """
    engine = load_engine(model, dtype)
    folder = resolve_model_folder(model)
    if is_adapter(folder):
        raise UserError(
            f"model {model} is an adapter itself; name its base model {base_folder(folder)}, and it among the adapters"
        )
    stored: dict[str, StoredAdapter] = {}
    for name in names:
        place = resolve_model_folder(name, "adapters")
        if not is_adapter(place):
            raise UserError(f"adapters: {place} is a whole model, not an adapter")
        # Of a run its name, of a folder the last part that is not `model`.
        short = next((part for part in reversed(Path(name).parts) if part not in ("model", "/")), name)
        if short in stored or short == OFF:
            raise UserError(f"adapters: two are called {short}; rename a folder")
        stored[short] = load_peft(place, engine.model.config)
        words = load_tokenizer(place, base=str(folder))  # refused when they are not the base model's
        ends = {*engine.eos_ids, *read_generation_config(place).eos_ids, *words.end_ids}
        engine.eos_ids = tuple(sorted(ends))
        its_base = moved_with_run(stored[short].base, place) or Path(stored[short].base)
        if folder.resolve() not in (its_base.resolve(), Path(stored[short].base).resolve()):
            print(f"warning: the adapter {short} was trained over {stored[short].base}, not over {folder}")
    return switched(engine, stored)


def switched(engine: Engine, stored: dict[str, StoredAdapter]) -> SwitchedEngine:
    """The engine with adapters: of different ranks and places, they are filled up with zeros to one shape."""
    ranks = {
        name: max(max(each.table.get(name, (0,))) for each in stored.values())
        for name in PROJECTIONS
        if any(name in each.table for each in stored.values())
    }
    model = engine.model
    shapes = LanguageModel(model.config, adapter=Adapter(tuple(ranks.items()))).abstract_params()
    trees = {OFF: None, **{name: each.tree for name, each in stored.items()}}
    adapters = {name: model.unstack(_filled(tree, shapes, ranks, model.dtype)) for name, tree in trees.items()}
    made = SwitchedEngine(engine, adapters, Adapter(tuple(ranks.items())))
    made.use(next(iter(stored)))
    return made


def _filled(tree: Params | None, shapes: Params, ranks: dict[str, int], dtype: Any) -> Params:
    """An adapter's parameters in the common shapes; zeros for None."""
    layers: Params = {}
    for name in ranks:
        block = PROJECTIONS[name]
        own = (tree or {"layers": {}})["layers"].get(block, {}).get(name, {})
        leaves = {}
        for key in ("lora_a", "lora_b", "lora_scale"):
            found = np.zeros(shapes["layers"][block][name][key].shape, np.float32)
            if own:
                found[tuple(slice(size) for size in own[key].shape)] = own[key]
            leaves[key] = jnp.asarray(found, jnp.float32 if key == "lora_scale" else dtype)
        layers.setdefault(block, {})[name] = leaves
    return {"layers": layers}

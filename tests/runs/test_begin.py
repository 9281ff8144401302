"""A run is begun once: what it is made of is found once and passed down."""

import sys
from collections import Counter

from run_helpers import with_chats

from minimind_jax import folders, sharding
from minimind_jax.config.stages import SFTConfig
from minimind_jax.data.batches import open_data
from minimind_jax.runs.adapters import plan_adapters
from minimind_jax.stages import start
from minimind_jax.training.run import RunFolder

ONCE = [sharding.make_mesh, folders.resolve_model_folder, RunFolder.changed_settings, open_data, plan_adapters]


def test_what_a_run_is_made_of_is_found_once(make, world, tmp_path, monkeypatch):
    counts = Counter()

    def counted(function):
        def call(*args, **kwargs):
            counts[function] += 1
            return function(*args, **kwargs)

        return call

    for function in ONCE:
        places = [*(module for name, module in sys.modules.items() if name.startswith("minimind_jax")), RunFolder]
        for place in places:
            if getattr(place, function.__name__, None) is function:
                monkeypatch.setattr(place, function.__name__, counted(function))
    start(with_chats(make(SFTConfig, tmp_path / "run", "sft", data={"train": ()}, training={"steps": 1}), world))
    assert counts == dict.fromkeys(ONCE, 1)

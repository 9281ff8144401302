"""Settings that change nothing since another one turns them off: told, or refused."""

from collections.abc import Callable
from typing import NamedTuple

from minimind_jax.config.stages import RunConfig, WriterConfig
from minimind_jax.errors import UserError
from minimind_jax.sharding import announce
from minimind_jax.training.run import flat, plain


class Off(NamedTuple):
    """keys: settings, or whole sections (which end with a dot), without effect where `is_off`; why says so.

    is_refused: not only told, since who sets them cannot mean what happens.
    """

    keys: tuple[str, ...]
    is_off: Callable[[RunConfig], bool]
    why: str
    is_refused: bool = False


TURNED_OFF = (
    Off(("lora.",), lambda c: not c.lora.rank, "lora.rank is 0, which trains the whole model", is_refused=True),
    Off(("optimizer.muon_learning_rate", "optimizer.momentum"), lambda c: c.optimizer.name != "muon", "of Muon"),
    Off(("optimizer.decay_fraction",), lambda c: c.optimizer.schedule != "wsd", "it is of the schedule wsd"),
    Off(("optimizer.final_fraction",), lambda c: c.optimizer.schedule == "constant", "the schedule is constant"),
    Off(("training.profile_start",), lambda c: not c.training.profile_steps, "training.profile_steps is 0"),
    Off(
        ("training.sample_every", "samples."),
        lambda c: not (c.samples.prompts or c.samples.from_data),
        "samples.prompts is empty",
    ),
    Off(("data.val_fraction",), lambda c: bool(c.data.val), "data.val is set"),
    Off(("tracking.project",), lambda c: not c.tracking.loggers, "tracking.loggers is empty"),
    Off(
        ("model.initializer_range", "model.zero_init_outputs"),
        lambda c: bool(c.init_from),
        "the weights come from init_from",
    ),
    Off(("teacher.jsd_beta",), lambda c: c.teacher.divergence != "jsd", "teacher.divergence is not jsd"),
    Off(("preference.gamma",), lambda c: c.preference.loss != "simpo", "preference.loss is not simpo"),
)


def check_effect(config: RunConfig) -> None:
    """Says which settings that differ from their defaults change nothing, since another one turns them off.

    Raises UserError, naming them, for those that cannot mean what happens.
    """
    if config.lora.rank and isinstance(config, WriterConfig) and config.export_dtype == "float16":
        raise UserError("export_dtype float16: adapters (lora.rank) are always written in float32; leave it out")
    for off in TURNED_OFF:
        if not (keys := _changed(config, off.keys)) or not off.is_off(config):
            continue
        if off.is_refused:
            raise UserError(f"{', '.join(keys)}: without effect, for {off.why}; set that, or leave them out")
        announce(f"without effect: {', '.join(keys)} ({off.why})")


def _changed(config: RunConfig, keys: tuple[str, ...]) -> list[str]:
    """The settings among `keys` (names, or whole sections) that differ from their defaults, with their values."""
    found, default = flat(plain(config)), flat(plain(type(config)()))
    return [f"{key} {value}" for key, value in found.items() if key.startswith(keys) and value != default[key]]

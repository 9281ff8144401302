"""Settings that change nothing since another one turns them off: told, or refused."""

from minimind_jax.config.stages import RunConfig, WriterConfig
from minimind_jax.errors import UserError
from minimind_jax.sharding import announce
from minimind_jax.training.run import flat, plain

# Settings, or whole sections (which end with a dot); when they are without effect; and why.
TURNED_OFF = (
    (("optimizer.muon_learning_rate", "optimizer.momentum"), lambda c: c.optimizer.name != "muon", "of Muon"),
    (("optimizer.decay_fraction",), lambda c: c.optimizer.schedule != "wsd", "it is of the schedule wsd"),
    (("optimizer.final_fraction",), lambda c: c.optimizer.schedule == "constant", "the schedule is constant"),
    (("training.profile_start",), lambda c: not c.training.profile_steps, "training.profile_steps is 0"),
    (
        ("training.sample_every", "samples."),
        lambda c: not (c.samples.prompts or c.samples.from_data),
        "samples.prompts is empty",
    ),
    (("data.val_fraction",), lambda c: bool(c.data.val), "data.val is set"),
    (("tracking.project",), lambda c: not c.tracking.loggers, "tracking.loggers is empty"),
    (
        ("model.initializer_range", "model.zero_init_outputs"),
        lambda c: bool(c.init_from),
        "the weights come from init_from",
    ),
    (("teacher.jsd_beta",), lambda c: c.teacher.divergence != "jsd", "teacher.divergence is not jsd"),
    (("preference.gamma",), lambda c: c.preference.loss != "simpo", "preference.loss is not simpo"),
)


def check_effect(config: RunConfig) -> None:
    """Says which settings that differ from their defaults change nothing, since another one turns them off.

    Raises UserError, naming them, where who sets them cannot mean what happens.
    """
    default = flat(plain(type(config)()))
    changed = {key: f"{key} {value}" for key, value in flat(plain(config)).items() if value != default[key]}

    def among(keys: tuple[str, ...]) -> str:
        return ", ".join(told for key, told in changed.items() if key.startswith(keys))

    if config.lora.rank and isinstance(config, WriterConfig) and config.export_dtype == "float16":
        raise UserError("export_dtype float16: adapters (lora.rank) are always written in float32; leave it out")
    if not config.lora.rank and (told := among(("lora.",))):
        raise UserError(
            f"{told}: without effect, for lora.rank is 0, which trains the whole model; set that, or leave them out"
        )
    for keys, is_off, why in TURNED_OFF:
        if (told := among(keys)) and is_off(config):
            announce(f"without effect: {told} ({why})")

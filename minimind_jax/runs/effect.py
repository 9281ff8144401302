"""Settings that change nothing since another one turns them off: told, or refused."""

from minimind_jax.config.classify import ClassifyConfig
from minimind_jax.config.rl import RLConfig
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
    (("vision.train",), lambda c: isinstance(c, ClassifyConfig) and not c.of_pictures, "vision.tower is empty"),
    (("teacher.jsd_beta",), lambda c: c.teacher.divergence != "jsd", "teacher.divergence is not jsd"),
    (("preference.gamma",), lambda c: c.preference.loss != "simpo", "preference.loss is not simpo"),
    (("rollout.server_model",), lambda c: not c.rollout.server, "rollout.server is empty"),
    (("rollout.correction_cap",), lambda c: c.rollout.correction == "none", "rollout.correction is none"),
    (("critic.",), lambda c: not c.has_critic, "policy.advantage is not gae"),
    (("policy.epsilon_",), lambda c: c.policy.loss != "clip", "they are of policy.loss clip"),
    (("policy.ddof",), lambda c: c.policy.scale == "none", "policy.scale is none"),
    (("policy.kl_",), lambda c: not c.policy.beta, "policy.beta is 0"),
    (("policy.kl_horizon",), lambda c: not c.policy.kl_target, "policy.kl_target is 0"),
    (
        ("policy.epsilon_", "policy.dual_clip", "policy.level", "policy.max_kl"),
        lambda c: c.stride == 1 and not c.rollout.ahead,
        "each rollout is trained on in one step: policy.updates x policy.minibatches is 1",
    ),
    (
        ("agent.tools", "agent.tool_", "agent.observation_tokens"),
        lambda c: c.agent.environment != "tools",
        "agent.environment is not tools",
    ),
    (
        ("data.shuffle", "data.tokenizer_workers", "data.loader_workers"),
        lambda c: isinstance(c, RLConfig),
        "prompts are few, and always drawn anew",
    ),
)


def check_effect(config: RunConfig) -> None:
    """Says which settings that differ from their defaults change nothing, since another one turns them off. Raises
    UserError, naming them, where who sets them cannot mean what happens."""
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

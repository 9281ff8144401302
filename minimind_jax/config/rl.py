"""The settings of learning from reward: how the policy writes, what it is rewarded for, and how that trains it."""

# ruff: noqa: RUF009 - sections are frozen, so that one may be the default of all

import dataclasses
from typing import ClassVar, Literal

from minimind_jax.config import sections
from minimind_jax.config.stages import Figures, RunConfig
from minimind_jax.rules import ABOVE_0, SHARE, TOP_P, Rule, Settings, at_least, setting

CRITIC = "critic"  # the branch of the value model among a run's parameters
TEMPERATURE = Rule(lambda value: value > 0, "above 0: who only takes the likeliest token learns nothing")


@dataclasses.dataclass(frozen=True)
class RolloutConfig(Settings):
    """How the policy writes what it is trained on.

    prompts: of one rollout, over all processes.
    completions: of each prompt, a group.
    max_new_tokens: of a completion; of an agent, of each of its turns.
    temperature: logits are divided by it, in the rollout and in the loss alike.
    top_k, top_p: only so many, or so probable, tokens may be drawn; 0 and 1 are off. The loss knows nothing of them, so
        what is drawn then comes of another distribution than what is trained, and the run says so.
    thinking: chance that a group's prompt opens a think block; drawn once for a group.
    long_prompts: one that leaves no room for max_new_tokens in data.seq_len stops the run before its first step, is
        left out (skip), or loses its oldest turns (cut).
    slots: completions in the making at once; 0 for all.
    ahead: 1 writes each rollout with the parameters of before the update that comes first, so that a server writes
        while this machine trains.
    server: the URL of an OpenAI-compatible server that writes in place of this machine, and returns token ids and their
        log-probabilities (vLLM, SGLang, minimind serve); empty for none.
    server_model: the folder that the policy is written to for the server, before each rollout.
    correction: of the difference between the sampler's log-probabilities and the trainer's, by a truncated importance
        weight of each token or of the sequence.
    correction_cap: where that weight is cut.
    """

    prompts: int = setting(8, must=at_least(1))
    completions: int = setting(8, must=at_least(1))
    max_new_tokens: int = setting(256, must=at_least(1))
    temperature: float = setting(1.0, must=TEMPERATURE)
    top_k: int = setting(0, must=at_least(0))
    top_p: float = setting(1.0, must=TOP_P)
    thinking: float = setting(0.0, must=SHARE)
    long_prompts: Literal["stop", "skip", "cut"] = "stop"
    slots: int = setting(0, must=at_least(0))
    ahead: int = setting(0, must=Rule((0, 1).__contains__, "0 or 1"))
    server: str = ""
    server_model: str = setting("", names="place")
    correction: Literal["none", "token", "sequence"] = "none"
    correction_cap: float = setting(2.0, must=at_least(1))

    @property
    def sequences(self) -> int:
        """Completions of a rollout."""
        return self.prompts * self.completions

    def __post_init__(self):
        super().__post_init__()
        if self.server and not self.server_model:
            raise ValueError("rollout.server is set without rollout.server_model, the folder it reads the policy from")


@dataclasses.dataclass(frozen=True)
class RewardsConfig(Settings):
    """What a completion is rewarded for.

    use: reward functions and their weights, such as `answer`, `0.5 * length(20, 800)`, `model(runs/reward)`, or
        `my_rewards.py:score` of your own (docs/rl_rewards.md lists them). The reward is their weighted sum.
    success: the function whose value of at least 1 counts as success in evaluations; empty takes the first of use.
    on_error: a function that fails or hangs stops the run; or what it fails on is counted and is not trained on, nor
        compared with (`skip`), or goes without its reward (`count`).
    seconds: that one function may take for a rollout.
    """

    use: tuple[str, ...] = setting((), is_text=True)
    success: str = ""
    on_error: Literal["stop", "skip", "count"] = "stop"
    seconds: float = setting(60.0, must=ABOVE_0)


@dataclasses.dataclass(frozen=True)
class PolicyConfig(Settings):
    """How rewards train the policy; the formulas are in losses/policy.py and rl/advantages.py.

    advantage: of a completion: its reward less its group's mean (`group`, GRPO), less the mean of the others in its
        group (`leave_one_out`, RLOO), less the mean of the rollout (`batch`, REINFORCE++); or `gae`, of each token, by
        a value model (PPO).
    scale: advantages are divided by the standard deviation of the group's rewards, of all the rollout's, or by nothing;
        those of tokens (`gae`, and `batch` with a divergence in the reward) by their own, about their mean.
    ddof: 1 for the sample's standard deviation (TRL, verl), 0 for the population's (MiniMind).
    loss: `clip` is PPO's clipped ratio; `cispo` weighs the log-probability by a capped ratio; `sapo` has a soft gate.
    level: of the ratio: each `token`, the whole `sequence` (GSPO), or `sequence_token` (GSPO-token).
    epsilon_low, epsilon_high: the ratio is clipped to 1 - epsilon_low .. 1 + epsilon_high.
    cap: the highest ratio of cispo, and with clip the highest before clipping (INTELLECT-2's delta); 0 for none.
    dual_clip: with a negative advantage the loss is at most so many times it; 0 for none.
    reduction: a mean over the `token`s of all completions (DAPO), over completions of the mean of each (`sequence`,
        GRPO), over prompts of the mean over the tokens of its completions (`prompt`, ScaleRL), or over completions of
        the sum of each, divided by rollout.max_new_tokens (`constant`, Dr. GRPO).
    updates: times that a rollout is trained on.
    minibatches: parts of a rollout, each an optimizer step.
    beta: weight of the divergence from the model at the start; 0 for none, and no second model in memory.
    kl_estimator: k1, k2 or k3 (Schulman); where it is a loss, k2 has the right gradient, and k1 has none.
    kl_placement: a term of the `loss`, or taken off the `reward`, which is of k1.
    kl_target: beta is moved so that the divergence of a completion, the sum over its tokens (the metric objective/kl),
        comes to this; 0 leaves it as it is.
    kl_horizon: completions over which it is moved.
    entropy: weight of the mean entropy, which is added to what is maximised.
    max_kl: an update whose approximate divergence from the rollout's policy is above this is not made, nor are those
        behind it of the same rollout; 0 for no limit.
    overlong: completions that were cut off are trained on like others (`keep`), or not at all (`mask`, DAPO).
    refill: groups whose rewards are all equal teach nothing: they are replaced by other prompts, asked at most so many
        times (DAPO's dynamic sampling); 0 keeps them.
    """

    advantage: Literal["group", "leave_one_out", "batch", "gae"] = "group"
    scale: Literal["none", "group", "batch"] = "group"
    ddof: int = setting(1, must=Rule((0, 1).__contains__, "0 or 1"))
    loss: Literal["clip", "cispo", "sapo"] = "clip"
    level: Literal["token", "sequence", "sequence_token"] = "token"
    epsilon_low: float = setting(0.2, must=at_least(0))
    epsilon_high: float = setting(0.2, must=at_least(0))
    cap: float = setting(0.0, must=at_least(0))
    dual_clip: float = setting(0.0, must=Rule(lambda ratio: ratio == 0 or ratio > 1, "0, or above 1 such as 3"))
    reduction: Literal["token", "sequence", "prompt", "constant"] = "token"
    updates: int = setting(1, must=at_least(1))
    minibatches: int = setting(1, must=at_least(1))
    beta: float = setting(0.0, must=at_least(0))
    kl_estimator: Literal["k1", "k2", "k3"] = "k2"
    kl_placement: Literal["loss", "reward"] = "loss"
    kl_target: float = setting(0.0, must=at_least(0))
    kl_horizon: float = setting(10_000.0, must=ABOVE_0)
    entropy: float = 0.0
    max_kl: float = setting(0.0, must=at_least(0))
    overlong: Literal["keep", "mask"] = "keep"
    refill: int = setting(0, must=at_least(0))

    def __post_init__(self):
        super().__post_init__()
        if self.loss == "cispo" and not self.cap:
            raise ValueError("policy.cap is 0, and the loss cispo needs the highest ratio; ScaleRL takes 5")
        if self.loss != "clip" and self.dual_clip:
            raise ValueError(f"policy.dual_clip is set, and is of the loss clip, not of {self.loss}")
        if self.loss == "sapo" and (self.cap or self.level != "token"):
            raise ValueError("policy.cap and policy.level are set, and the loss sapo has none; leave them out")
        if self.loss == "clip" and 0 < self.cap <= 1 + self.epsilon_high:
            raise ValueError(
                f"policy.cap is {self.cap}, and ratios are clipped at 1 + policy.epsilon_high {self.epsilon_high} "
                "already; it is above that, such as 4"
            )
        if self.kl_placement == "reward" and self.kl_estimator != "k1":
            raise ValueError(
                f"policy.kl_placement is reward with the estimator {self.kl_estimator}; taken off the reward, k1 is "
                "the divergence: set policy.kl_estimator k1"
            )
        if self.beta and self.kl_placement == "loss" and self.kl_estimator == "k1":
            raise ValueError("policy.kl_estimator k1 has no gradient as a loss; take k2, or policy.kl_placement reward")
        if self.kl_target and not self.beta:
            raise ValueError(
                "policy.kl_target is set and policy.beta is 0; beta is the weight to begin with, such as 0.1"
            )
        if self.advantage in ("batch", "gae") and self.scale == "group":
            raise ValueError(f"policy.scale is group, and policy.advantage {self.advantage} is not; take batch or none")


@dataclasses.dataclass(frozen=True)
class CriticConfig(Settings):
    """The value model of policy.advantage gae: a copy of the policy with a head of one score.

    init_from: a model, or a reward model, whose head is taken too; empty takes the model that the run starts from,
        with a head of zeros.
    learning_rate: its own; null takes the policy's times 2.
    max_grad_norm: of its gradient alone.
    gamma, gae_lambda: of the generalised advantage estimation (arXiv 1506.02438).
    clip: a value may differ by so much from that of the rollout, in its loss; 0 for no limit.
    weight: of its loss, half the squared error.
    warmup: rollouts on which it is trained alone; weight decay and the balance of experts go on in the policy, too.
    """

    init_from: str = setting("", names="model")
    learning_rate: float | None = setting(None, must=at_least(0))
    max_grad_norm: float = setting(1.0, must=at_least(0))
    gamma: float = setting(1.0, must=SHARE)
    gae_lambda: float = setting(0.95, must=SHARE)
    clip: float = setting(0.2, must=at_least(0))
    weight: float = setting(0.5, must=ABOVE_0)
    warmup: int = setting(0, must=at_least(0))


@dataclasses.dataclass(frozen=True)
class PromptsConfig(sections.FilesConfig):
    """Files of prompts: conversations whose last answer is left out, with what rewards are checked against.

    seq_len: tokens of a prompt and all that follows it.
    system_prompt_probability: chance that a prompt without system prompt and tools gets one of MiniMind's ten.
    """

    seq_len: int = setting(768, must=at_least(4))
    system_prompt_probability: float = setting(0.0, must=SHARE)


@dataclasses.dataclass(frozen=True)
class HeldOutConfig(Settings):
    """How the policy is judged on held-out prompts, of which there are training.eval_rows.

    completions: of each prompt, drawn as in the rollout, for pass@k; 0 leaves that out. A greedy one comes beside
        them.
    """

    completions: int = setting(4, must=at_least(0))


@dataclasses.dataclass(frozen=True)
class RLConfig(RunConfig):
    """Learning from reward: the policy writes, what it wrote is rewarded, and that trains it.

    debug: show one whole episode and its rewards in the terminal before anything is trained.
    pages: episodes of a rollout that are written to the run's rollouts/ at each evaluation.
    """

    FIGURES: ClassVar[Figures] = Figures(8192, 1, 1e-5, few_rate=1e-5, lora_rate=1e-4, val_fraction=0.05, eval_every=20)
    SHORTEST = 10
    SMALLER_STEPS = "rollouts of fewer prompts (--rollout.prompts)"

    run: str = "grpo"
    init_from: str = setting("sft", names="model")
    data: PromptsConfig = PromptsConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig = RewardsConfig()
    policy: PolicyConfig = PolicyConfig()
    critic: CriticConfig = CriticConfig()
    held_out: HeldOutConfig = HeldOutConfig()
    training: sections.LoopConfig = sections.LoopConfig(eval_every=20, eval_rows=64, watch="max reward")
    optimizer: sections.OptimizerConfig = sections.OptimizerConfig(weight_decay=0.0)
    checkpoint: sections.CheckpointConfig = sections.CheckpointConfig(every=20)
    pages: int = setting(4, must=at_least(0))
    debug: bool = False

    def __post_init__(self):
        steps = self.policy.minibatches
        if self.rollout.sequences % steps:
            raise ValueError(
                f"rollout.prompts x rollout.completions = {self.rollout.sequences} completions do not divide by "
                f"policy.minibatches {steps}"
            )
        rows = self.rollout.sequences // steps
        if self.training.batch_tokens not in (None, rows * self.data.seq_len):
            raise ValueError(
                f"training.batch_tokens {self.training.batch_tokens}: it follows from rollout.prompts x completions / "
                f"policy.minibatches x data.seq_len and is {rows * self.data.seq_len}; leave it out, or null"
            )
        if rows % self.training.accumulation_steps:
            raise ValueError(
                f"the {rows} completions of a step do not divide by training.accumulation_steps "
                f"{self.training.accumulation_steps}"
            )
        super().__post_init__()
        if self.rollout.max_new_tokens >= self.data.seq_len:
            raise ValueError(
                f"rollout.max_new_tokens {self.rollout.max_new_tokens} leaves no room for a prompt in data.seq_len "
                f"{self.data.seq_len}"
            )
        if self.training.tokens is not None:
            raise ValueError("training.tokens: what a policy will write is not known; set training.steps or epochs")
        if self.policy.advantage in ("group", "leave_one_out") and self.rollout.completions < 2:
            raise ValueError(
                f"policy.advantage {self.policy.advantage} compares rollout.completions, of which there is 1"
            )
        if self.policy.refill and self.policy.advantage not in ("group", "leave_one_out"):
            raise ValueError("policy.refill is of groups, which policy.advantage does not compare")

    @property
    def figures(self) -> Figures:
        tokens = self.rollout.sequences // self.policy.minibatches * self.data.seq_len
        return super().figures._replace(batch_tokens=tokens)

    @property
    def has_critic(self) -> bool:
        return self.policy.advantage == "gae"

    @property
    def stride(self) -> int:
        """Optimizer steps of a rollout."""
        return self.policy.updates * self.policy.minibatches


@dataclasses.dataclass(frozen=True)
class GRPOConfig(RLConfig):
    """Learning from reward by groups of answers to the same prompt: GRPO, CISPO, DAPO, GSPO, RLOO, ..."""


@dataclasses.dataclass(frozen=True)
class PPOConfig(RLConfig):
    """Learning from reward with a value model: PPO."""

    run: str = "ppo"
    rollout: RolloutConfig = RolloutConfig(prompts=32, completions=1)
    policy: PolicyConfig = PolicyConfig(advantage="gae", scale="batch", updates=2)


@dataclasses.dataclass(frozen=True)
class AgentSettings(Settings):
    """What an agent acts in.

    environment: `tools`, or one of your own as `module:Class` or `FILE.py:Class`
        (docs/rl_agents.md).
    tools: what it may call, of those that its prompt offers: calculator, time, units, random, text, all of these, or
        functions of your own as module:function or FILE.py:function.
    turns: answers of an episode at most.
    seconds: that an episode may take; 0 for no limit. A limit that is reached depends on the machine, and such a run is
        not repeatable.
    tool_seconds, tool_memory: of a call; MiB.
    observation_tokens: of what a tool says, at most; the rest is cut off.
    """

    environment: str = "tools"
    tools: tuple[str, ...] = ("all",)
    turns: int = setting(3, must=at_least(1))
    seconds: float = setting(0.0, must=at_least(0))
    tool_seconds: float = setting(5.0, must=ABOVE_0)
    tool_memory: int = setting(512, must=at_least(1))
    observation_tokens: int = setting(512, must=at_least(1))


@dataclasses.dataclass(frozen=True)
class AgentConfig(RLConfig):
    """Learning from reward in episodes of several turns, with tools."""

    run: str = "agent"
    agent: AgentSettings = AgentSettings()
    data: PromptsConfig = PromptsConfig(seq_len=2048)

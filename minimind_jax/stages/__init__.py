"""The stages, one file each, read top to bottom: data, loss, what is trained, what is written."""

from typing import Any

from minimind_jax.config import rl
from minimind_jax.config import stages as settings
from minimind_jax.config.classify import ClassifyConfig
from minimind_jax.runs.kind import StageKind

CHAT = ("chat --model {model}", "talk to it")
ASK = ("generate --model {model} --prompt Hello", "one answer")
TUNE = ("sft --init_from {run} --data.train YOUR_CONVERSATIONS.jsonl --run NAME", "train it further")
SEE = ("vlm-sft --init_from {run} --data.train YOUR_CONVERSATIONS.jsonl --run NAME", "train it further")
SCORE = ("score --model {model} --input YOUR_CONVERSATIONS.jsonl", "scores")
PREDICT = ("classify predict --model {run} --input YOUR_RECORDS.jsonl", "labels")

# What stages that learn from reward have in common.
REWARDED = {
    "records": "prompt",
    "needs_start": True,
    "fixed": (
        *("policy.advantage", "rewards.use", "rewards.success", "agent.environment", "agent.tools"),
        *("rollout.prompts", "rollout.completions", "rollout.max_new_tokens", "rollout.temperature", "rollout.top_"),
        *("rollout.thinking", "rollout.ahead", "rollout.correction"),
    ),
    "figures": ("reward", "success", "length"),
    "curves": ("reward", "success"),
    "next": (CHAT, ASK),
}

KINDS = (
    StageKind("tokenizer", settings.TokenizerConfig, "stages.tokenizer:train_tokenizer"),
    StageKind(
        "pretrain", settings.PretrainConfig, "stages.next_token:recipe",
        records="text", is_steady=True, next=(CHAT, TUNE), planned=("pretrain",),
    ),
    StageKind(
        "sft", settings.SFTConfig, "stages.next_token:recipe",
        records="conversation", is_steady=True, next=(CHAT, ASK, TUNE), planned=("sft", "lora"),
    ),
    StageKind(
        "dpo", settings.DPOConfig, "stages.dpo:recipe",
        records="preference", is_steady=True, needs_start=True,
        fixed=("preference.loss", "preference.precompute_reference"),
        figures=("chosen_nll", "rewards/margins", "rewards/accuracies"),
        curves=("rewards/margins", "rewards/accuracies"), next=(CHAT, ASK, TUNE),
    ),
    StageKind(
        "distill", settings.DistillConfig, "stages.distill:recipe",
        records="conversation", fixed=("teacher.model", "teacher.top_k"),
        figures=("divergence",), curves=("divergence",), next=(CHAT, TUNE),
    ),
    StageKind(
        "reward", settings.RewardConfig, "stages.reward:recipe",
        records="preference", is_steady=True, has_head=True, labels=("reward",), needs_start=True,
        figures=("margin", "accuracy"), curves=("margin", "accuracy"), next=(SCORE,),
    ),
    StageKind(
        "classify", ClassifyConfig, "stages.classify:recipe",
        records="labelled", has_head=True, needs_start=True, fixed=("vision.",),
        figures=("accuracy",), curves=("accuracy",), next=(PREDICT,),
    ),
    StageKind(
        "vlm-pretrain", settings.VLMPretrainConfig, "stages.vision:recipe",
        records="images", is_steady=True, needs_start=True, next=(CHAT, SEE), planned=("vlm_pretrain",),
    ),
    StageKind(
        "vlm-sft", settings.VLMSFTConfig, "stages.vision:recipe",
        records="images", is_steady=True, needs_start=True, next=(CHAT, SEE), planned=("vlm_sft", "vlm_nanovlm"),
    ),
    StageKind("grpo", rl.GRPOConfig, "stages.reinforce:recipe", **REWARDED),
    StageKind("ppo", rl.PPOConfig, "stages.reinforce:recipe", **REWARDED),
    StageKind("agent", rl.AgentConfig, "stages.reinforce:recipe", **REWARDED),
)  # fmt: skip

STAGES = {kind.name: kind for kind in KINDS}


def start(config: Any) -> Any:
    """Carries out the stage whose settings these are. Returns the run's folder (see `runs.stage.run_stage`)."""
    kind = next(kind for kind in KINDS if kind.config is type(config))
    if not kind.is_run:
        return kind.load()(config)
    from minimind_jax.runs.stage import run_stage  # with all that trains, which --help does without

    return run_stage(kind, config, kind.load())

"""The `minimind` command: its subcommands, of which each loads what it needs when it runs."""

import sys
from collections.abc import Sequence

from minimind_jax.commands import Command, run_commands
from minimind_jax.config import generation, serving, tools
from minimind_jax.stages import STAGES


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `minimind ARGUMENTS`, or those of the process, and returns the exit status."""
    return run_commands(COMMANDS, sys.argv[1:] if argv is None else argv)


COMMANDS = {
    "demo": Command(
        "a small model learns from real text on this machine, and answers", tools.DemoConfig, "demo.story:run"
    ),
    **{kind.name: Command(kind.summary, kind.config, "stages:start", has_processes=True) for kind in STAGES.values()},
    "pipeline": Command(
        "stages in order from one file; skips what is done, resumes what was cut off",
        tools.PipelineConfig,
        "pipeline:start",
        has_processes=True,
    ),
    "data inspect": Command(
        "records as the model sees them, counts, lengths, packing", tools.InspectConfig, "data.inspect:run"
    ),
    "data convert": Command(
        "records of other tools' formats in MiniMind's", tools.ConvertDataConfig, "data.convert_command:run"
    ),
    "data download": Command("MiniMind's public data files", tools.DownloadConfig, "data.download:run"),
    "data cache": Command("caches of tokenised data: list, remove", tools.CacheConfig, "data.cache_command:run"),
    "chat": Command("talk with a model in the terminal", generation.ChatConfig, "inference.chat:run"),
    "generate": Command(
        "answers to prompts, or to every record of a file", generation.GenerateConfig, "inference.generate_command:run"
    ),
    "serve": Command(
        "an OpenAI-compatible server, and with --web a chat page", serving.ServeConfig, "serve.command:run"
    ),
    "classify predict": Command(
        "labels for the texts of a file or of the standard input",
        tools.PredictConfig,
        "evaluate.score_command:predict",
    ),
    "score": Command(
        "a reward model's scores for the conversations of a file", tools.ScoreConfig, "evaluate.score_command:score"
    ),
    "evaluate perplexity": Command(
        "how well a model predicts text or answers", tools.PerplexityConfig, "evaluate.perplexity:run"
    ),
    "evaluate choices": Command(
        "multiple choice: how often the right choice is the likeliest", tools.ChoicesConfig, "evaluate.choices:run"
    ),
    "evaluate images": Command(
        "questions about pictures, and the same with the pictures shuffled",
        tools.EvaluateImagesConfig,
        "evaluate.images:run",
    ),
    "evaluate tools": Command(
        "tool calls: valid JSON, the right tool, arguments and answer",
        tools.ToolCallsConfig,
        "evaluate.tool_calls:run",
    ),
    "evaluate lm-eval": Command(
        "EleutherAI's harness, with --model minimind_jax", tools.LMEvalConfig, "evaluate.lm_eval_command:run"
    ),
    "convert from-hf": Command(
        "a Hugging Face model as a starting point", tools.FromHFConfig, "convert.command:run_from_hf"
    ),
    "convert to-hf": Command(
        "a run's model or checkpoint, in any dtype or shard size", tools.ToHFConfig, "pipeline.tools:to_hf"
    ),
    "convert from-torch": Command(
        "a MiniMind .pth as a Hugging Face folder", tools.FromTorchConfig, "convert.command:run_from_torch"
    ),
    "convert to-torch": Command("a model as a MiniMind .pth", tools.ToTorchConfig, "convert.command:run_to_torch"),
    "convert to-gguf": Command("a model for llama.cpp and ollama", tools.ToGGUFConfig, "pipeline.tools:to_gguf"),
    "convert merge-lora": Command(
        "an adapter and its base model as one model", tools.MergeLoRAConfig, "convert.command:run_merge_lora"
    ),
    "plan": Command(
        "memory, time and price of a run on a GPU or TPU that need not be there", tools.PlanConfig, "plan.command:run"
    ),
    "report": Command("report.md and loss.png of a run", tools.ReportConfig, "pipeline.tools:report"),
}

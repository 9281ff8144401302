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
    "demo": Command(tools.DemoConfig, "demo.story:run"),
    **{kind.name: Command(kind.config, "stages:start", has_processes=True) for kind in STAGES.values()},
    "pipeline": Command(tools.PipelineConfig, "pipeline:start", has_processes=True),
    "data inspect": Command(tools.InspectConfig, "data.inspect:run"),
    "data convert": Command(tools.ConvertDataConfig, "data.convert_command:run"),
    "data download": Command(tools.DownloadConfig, "data.download:run"),
    "data cache": Command(tools.CacheConfig, "data.cache_folder:run"),
    "chat": Command(generation.ChatConfig, "inference.chat:run"),
    "generate": Command(generation.GenerateConfig, "inference.generate_command:run"),
    "serve": Command(serving.ServeConfig, "serve.listening:listen", extra="serve"),
    "classify predict": Command(tools.PredictConfig, "evaluate.score_command:predict"),
    "score": Command(tools.ScoreConfig, "evaluate.score_command:score"),
    "evaluate perplexity": Command(tools.PerplexityConfig, "evaluate.perplexity:run"),
    "evaluate choices": Command(tools.ChoicesConfig, "evaluate.choices:run"),
    "evaluate images": Command(tools.EvaluateImagesConfig, "evaluate.images:run"),
    "evaluate tools": Command(tools.ToolCallsConfig, "evaluate.tool_calls:run"),
    "evaluate lm-eval": Command(tools.LMEvalConfig, "evaluate.lm_eval_adapter:run", extra="eval"),
    "convert from-hf": Command(tools.FromHFConfig, "convert.command:run_from_hf"),
    "convert to-hf": Command(tools.ToHFConfig, "pipeline.tools:to_hf"),
    "convert from-torch": Command(tools.FromTorchConfig, "convert.command:run_from_torch"),
    "convert to-torch": Command(tools.ToTorchConfig, "convert.command:run_to_torch"),
    "convert to-gguf": Command(tools.ToGGUFConfig, "pipeline.tools:to_gguf"),
    "convert merge-lora": Command(tools.MergeLoRAConfig, "convert.command:run_merge_lora"),
    "plan": Command(tools.PlanConfig, "plan.command:run"),
    "report": Command(tools.ReportConfig, "pipeline.tools:report"),
}

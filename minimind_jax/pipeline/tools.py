"""Tools for runs of any stage: `minimind report`, `minimind convert to-hf` and `to-gguf`."""

from minimind_jax.config.tools import ReportConfig, ToGGUFConfig, ToHFConfig
from minimind_jax.folders import resolve_run
from minimind_jax.runs.export import export, export_gguf
from minimind_jax.runs.report import write_report
from minimind_jax.stages import STAGES
from minimind_jax.training.run import RunFolder


def report(config: ReportConfig) -> None:
    print(f"wrote {write_report(RunFolder(resolve_run(config.run)), STAGES)}")


def to_hf(config: ToHFConfig) -> None:
    export(STAGES, config)


def to_gguf(config: ToGGUFConfig) -> None:
    export_gguf(STAGES, config)

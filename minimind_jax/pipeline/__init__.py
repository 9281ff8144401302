"""Stages in order, from one file: read, checked ahead, run."""

from minimind_jax.config.tools import PipelineConfig


def start(config: PipelineConfig) -> None:
    """`minimind pipeline`. The file is read before anything heavy is loaded."""
    from minimind_jax.pipeline.read import load_pipeline

    stages = load_pipeline(config.arguments)
    from minimind_jax.pipeline.run import run_pipeline

    run_pipeline(stages)

"""What a run writes at its end: the model, the report, and a word on what to type next."""

from collections.abc import Callable
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from minimind_jax.agreement import exchange
from minimind_jax.config.stages import RunConfig
from minimind_jax.convert.hf import Labels, load_hf, save_hf
from minimind_jax.convert.hf_config import to_generation_config
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.model.heads import SCORE, without_head
from minimind_jax.model.lora import LEAVES, join, merge, split
from minimind_jax.model.transformer import LanguageModel, Params
from minimind_jax.runs.adapters import plan_adapters, save_adapters
from minimind_jax.runs.models import start_generation
from minimind_jax.shell import command
from minimind_jax.signals import telling
from minimind_jax.training.loop import TrainResult
from minimind_jax.training.report import write_report
from minimind_jax.training.run import RunFolder
from minimind_jax.training.tracking import append_export, export_row


def finish_run(
    run: RunFolder,
    config: RunConfig,
    model: LanguageModel,
    tokenizer: Tokenizer,
    result: TrainResult,
    hint: str,
    labels: Labels | None = None,
    judge: Callable[[], None] | None = None,
) -> Path:
    """Writes model/, report.md and loss.png, says what to type next (`hint`), and returns the run's folder.

    judge: writes what else belongs to the run, about its model; on the first process. Only when all is written is the
    run finished: one that is killed before writes all of it again.
    Adapters are written as such, unless the model has a head of scores, with `labels`: then they are merged.
    """
    plan, params = plan_adapters(config, model.config), result.params
    if plan is not None:
        params, _ = split(params, lambda path: path[-1] in LEAVES or path[0] == SCORE)
    if jax.process_count() > 1:
        params = multihost_utils.process_allgather(params, tiled=True)
    if jax.process_index() == 0:
        with telling(lambda: _what_is_left(run), of=(BaseException,)):
            if plan is not None and labels is not None:
                params = merge(join(_body(load_hf(plan.base)[1]), params))
            if plan is None or labels is not None:
                save_hf(
                    run.model, model.config, params, tokenizer, dtype=config.export_dtype, labels=labels,
                    generation_config=start_generation(config),
                )  # fmt: skip
                written = config.export_dtype
            else:
                settings = to_generation_config(model.config, start_generation(config))
                save_adapters(run.model, params, plan, tokenizer, settings)
                written = "adapters in float32"
                hint += f"\n  {command('convert', 'merge-lora', run.path, 'OUTPUT', note='one whole model')}"
            if judge is not None:
                judge()
            row = export_row(result.step, written, result.model_step)
            write_report(run, row)
            append_export(run, row)
        print(f"The model is {run.model}, the report {run.report_file}. Next:\n{hint}")
    exchange()  # the others wait until all is written
    return run.path


def _what_is_left(run: RunFolder) -> str:
    return (
        f"the training of {run.path} is done and saved; what belongs to its end, {run.model.name}/ and "
        f"{run.report_file.name}, is not all written: the same command goes on there"
    )


def _body(params: Params) -> Params:
    """A model's parameters without any head of its own."""
    return {name: tree for name, tree in without_head(params).items() if name != "lm_head"}

"""What a run writes at its end: the model, the report, and a word on what to type next."""

from collections.abc import Callable

import jax
from jax.experimental import multihost_utils

from minimind_jax.agreement import exchange
from minimind_jax.convert.hf import load_hf, save_hf
from minimind_jax.convert.hf_config import to_generation_config
from minimind_jax.convert.load import load_generation_settings
from minimind_jax.convert.peft import save_peft
from minimind_jax.folders import is_adapter
from minimind_jax.model.heads import SCORE
from minimind_jax.model.lora import LEAVES, join, merge, split
from minimind_jax.model.transformer import Params
from minimind_jax.paths import absolute
from minimind_jax.runs.parts import Run, without_others
from minimind_jax.runs.report import write_report
from minimind_jax.shell import command
from minimind_jax.signals import telling
from minimind_jax.training.loop import TrainResult
from minimind_jax.training.tracking import append_export, export_row


def finish(run: Run, result: TrainResult, judge: Callable[[], None] | None = None) -> None:
    """Writes model/, report.md and loss.png, and says what to type next.

    judge: writes what else belongs to the run, about its model; on the first process. Only when all is written is the
    run finished: one that is killed before writes all of it again.
    Adapters are written as such, unless the model has a head of scores: then they are merged.
    """
    folder, params = run.folder, without_others(run, result.params)
    if run.adapters is not None:
        params, _ = split(params, lambda path: path[-1] in LEAVES or path[0] == SCORE)
    if jax.process_count() > 1:
        params = multihost_utils.process_allgather(params, tiled=True)
    left = (
        f"the training of {folder.path} is done and saved; what belongs to its end, {folder.model.name}/ and "
        f"{folder.report_file.name}, is not all written: the same command goes on there"
    )
    if jax.process_index() == 0:
        with telling(lambda: left, of=(BaseException,)):
            written = _write_model(run, params)
            if judge is not None:
                judge()
            row = export_row(result.step, written, result.model_step)
            write_report(folder, {run.kind.name: run.kind}, row)
            append_export(folder, row)
        hints = run.kind.next_commands(folder)
        if is_adapter(folder.model):
            hints.append(command("convert", "merge-lora", folder.path, "OUTPUT", note="one whole model"))
        hint = "".join(f"\n  {text}" for text in hints)
        print(f"The model is {folder.model}, the report {folder.report_file}. Next:{hint}")
    exchange()  # the others wait until all is written


def _write_model(run: Run, params: Params) -> str:
    """Writes model/ and returns in which dtype."""
    dtype, plan, generation = run.config.export_dtype, run.adapters, run.start and load_generation_settings(run.start)
    if plan is not None and not run.kind.has_head:
        save_peft(
            run.folder.model, params, plan.table,
            base=absolute(plan.base), tokenizer=run.tokenizer, dropout=plan.dropout, rslora=plan.rslora,
            sees=run.model.config.vision is not None,
            generation_config=to_generation_config(run.model.config, generation),
        )  # fmt: skip
        return "adapters in float32"
    if plan is not None:
        _, base = load_hf(plan.base)
        body = {name: tree for name, tree in base.items() if name not in (SCORE, "lm_head")}  # without its own head
        params = merge(join(body, params))
    save_hf(
        run.folder.model, run.model.config, params, run.tokenizer, dtype=dtype, labels=run.labels,
        generation_config=generation,
    )  # fmt: skip
    return dtype

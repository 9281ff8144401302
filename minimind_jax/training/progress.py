"""What a run says while it trains: a bar with live numbers on a terminal, a line now and then elsewhere."""

import contextlib
import math
import sys
from collections.abc import Mapping
from datetime import timedelta

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from minimind_jax.progress import heartbeat

LOSS_SMOOTHING = 0.9


class TrainingProgress:
    """Shows the progress of one run on stdout. Use as a context manager.

    start_step: steps already done. unit: what its speed is counted in. active: false on all processes but the first:
    nothing is shown.
    """

    def __init__(self, stage: str, total_steps: int, start_step: int, unit: str = "tokens", *, active: bool = True):
        self.stage, self.total_steps, self.unit = stage, total_steps, unit
        self.console = Console(quiet=not active, soft_wrap=True, highlight=False, file=sys.stdout)
        self._loss: float | None = None
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}  {task.fields[numbers]}"),
            console=self.console,
            disable=not (active and self.console.is_terminal),
        )
        self._is_silent = self._bar.disable and active  # until the first line
        self._first_step = contextlib.ExitStack()
        self._task = self._bar.add_task(stage, total=total_steps, completed=start_step, numbers="compiling")

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        if self._is_silent:
            self._first_step.enter_context(heartbeat(f"{self.stage}: compiling"))
        return self

    def __exit__(self, *_) -> None:
        self._first_step.close()
        self._bar.stop()

    def facts(self, facts: dict[str, str]) -> None:
        """The table at the start of the run."""
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, value in facts.items():
            table.add_row(f"[bold]{name}", escape(value))
        self.say(table)

    def say(self, message, *, plain: bool = False) -> None:
        """A line above the bar; `plain` text is shown without rich's markup."""
        self.console.print(escape(message) if plain else message)

    def update(self, step: int, row: dict, beside: Mapping[str, float], *, log: bool) -> None:
        """The numbers of `step`; `log` asks for a line where there is no bar.

        row: loss, learning_rate and, where known, tokens_per_second, mfu and seconds_left. beside: what is shown
        beside the loss.
        """
        self._first_step.close()
        if math.isfinite(row["loss"]):
            smooth = row["loss"] if self._loss is None else self._loss
            self._loss = LOSS_SMOOTHING * smooth + (1 - LOSS_SMOOTHING) * row["loss"]
        if self._bar.disable:
            if log:
                self.say(f"{self.stage} {step}/{self.total_steps}  {describe(row, row['loss'], beside, self.unit)}")
        else:
            numbers = describe(row, self._loss or row["loss"], beside, self.unit)
            self._bar.update(self._task, completed=step, numbers=numbers)


def describe(row: dict, loss: float, beside: Mapping[str, float], unit: str) -> str:
    """`loss 2.345  reward 0.500  12,345 tokens/s  MFU 41.0%  lr 5.00e-04  0:12:00 left`."""
    rate, mfu, seconds = (row.get(name) for name in ("tokens_per_second", "mfu", "seconds_left"))
    parts = [
        f"loss {loss:.4f}",
        *(f"{name} {value:.3f}" for name, value in beside.items()),
        rate and f"{rate:,.0f} {unit}/s",
        mfu and f"MFU {mfu:.1%}",
        f"lr {row['learning_rate']:.2e}",
        seconds is not None and f"{timedelta(seconds=round(seconds))} left",
    ]
    return "  ".join(filter(None, parts))

"""What a run says while it trains: a bar with live numbers on a terminal, a line now and then elsewhere."""

import contextlib
import math
import sys
from datetime import timedelta

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from minimind_jax.progress import heartbeat

LOSS_SMOOTHING = 0.9


class TrainingProgress:
    """Shows the progress of one run on stdout.

    Args:
        stage: the word in front of every line.
        total_steps: of the whole run. start_step: steps already done.
        active: false on all processes but the first: nothing is shown.

    Use as a context manager.
    """

    def __init__(self, stage: str, total_steps: int, start_step: int, *, active: bool = True):
        self.stage, self.total_steps = stage, total_steps
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
        self._first_step = contextlib.ExitStack()
        self._is_silent = self._bar.disable and active
        self._task = self._bar.add_task(stage, total=total_steps, completed=start_step, numbers="compiling")

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        if self._is_silent:  # until the first line
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
        """A line above the bar; `plain` text is shown as it is, without rich's markup."""
        self.console.print(escape(message) if plain else message)

    def update(self, step: int, row: dict, *, log: bool) -> None:
        """The numbers of `step`; `log` asks for a line where there is no bar.

        row: loss, learning_rate and, where known, tokens_per_second, mfu and seconds_left.
        """
        self._first_step.close()
        if math.isfinite(row["loss"]):
            smooth = row["loss"] if self._loss is None else self._loss
            self._loss = LOSS_SMOOTHING * smooth + (1 - LOSS_SMOOTHING) * row["loss"]
        if self._bar.disable:
            if log:
                self.say(f"{self.stage} {step}/{self.total_steps}  {describe(row, row['loss'])}")
        else:
            self._bar.update(self._task, completed=step, numbers=describe(row, self._loss or row["loss"]))


def describe(row: dict, loss: float) -> str:
    """`loss 2.345  12,345 tokens/s  MFU 41.0%  lr 5.00e-04  0:12:00 left`."""
    parts = [f"loss {loss:.4f}"]
    if row.get("tokens_per_second"):
        parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if row.get("mfu"):
        parts.append(f"MFU {row['mfu']:.1%}")
    parts.append(f"lr {row['learning_rate']:.2e}")
    if row.get("seconds_left") is not None:
        parts.append(f"{timedelta(seconds=round(row['seconds_left']))} left")
    return "  ".join(parts)

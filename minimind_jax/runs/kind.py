"""What everything else knows of a stage: the entry that it has in the table of stages. Imports no jax."""

import dataclasses
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from minimind_jax.config.stages import RunConfig
from minimind_jax.shell import command


@dataclasses.dataclass(frozen=True)
class StageKind:
    """A stage, as the command line, the loop, pipelines, reports, exports and plans know it."""

    name: str  # of its command
    config: type  # its settings
    function: str  # `module:function` of this package, that makes the recipe of a run, or where it is none does all
    records: str = ""  # the kind of data it trains on (see `data.kinds`); empty where it is no run
    has_head: bool = False  # its model has a head of scores in place of one of words, and is the end of a pipeline
    labels: tuple[str, ...] = ()  # of that head; empty where they are those of the records
    is_steady: bool = False  # its steps take the same memory again and again, which is kept; others could not use it
    needs_start: bool = False  # it trains no model from scratch
    fixed: tuple[str, ...] = ()  # settings of its own that a run cannot change once it has begun
    figures: tuple[str, ...] = ()  # metrics of its own in the report's table of evaluations
    curves: tuple[str, ...] = ()  # those of them that are drawn
    # commands to type when it is done, and what for; {run} and {model} are the folders
    next: tuple[tuple[str, str], ...] = ()
    # the names of its files in configs/, by which `minimind plan` knows it; none where it does not know its step
    planned: tuple[str, ...] = ()

    @property
    def is_run(self) -> bool:
        """Whether it trains a model in a run's folder."""
        return issubclass(self.config, RunConfig)

    def of(self, config: RunConfig) -> "StageKind":
        """The stage as these settings have it."""
        return dataclasses.replace(self, records="pictures") if config.of_pictures else self

    def load(self) -> Callable[[Any], Any]:
        return pkgutil.resolve_name(f"minimind_jax.{self.function}")

    def next_commands(self, run: Any) -> list[str]:
        """`next`, to be pasted, of a run's folder (see `training.run`)."""
        places = {"run": run.path, "model": run.model}
        return [command(*(word.format(**places) for word in text.split()), note=note) for text, note in self.next]


Stages = Mapping[str, StageKind]

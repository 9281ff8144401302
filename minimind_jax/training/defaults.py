"""What a run takes for the settings that nobody set: they follow from how much data there is.

For much data they are the stage's figures (`config.Figures`), mostly MiniMind's. A few hundred records would make a
handful of such steps and teach nothing; they get smaller steps, more epochs and a higher rate. A value that is set,
on the command line or in a file, always stays.
"""

import dataclasses
import math
from typing import Any, NamedTuple

from minimind_jax.config.sections import MINIMIND_CHANCES, TrainingConfig
from minimind_jax.config.stages import Figures, RunConfig

STEPS_PER_EPOCH = 32  # the batch is made smaller until an epoch has as many
STEPS = 400  # then there are more epochs, until the run has as many
FEW_TOKENS, MUCH_TOKENS = 2e6, 1e8  # of an epoch: up to here the rate for few data, from there on that for much
BYTES_PER_TOKEN = 3  # of a data file
HELD_OUT, LARGEST_SHARE = 50, 0.05  # records that tell how well a run does, unless that is a larger share of them
FEWEST_TO_SPLIT = 20  # records; none of fewer is held out


class Amount(NamedTuple):
    """An epoch of the training data, without what is held out: records, tokens, how many of them are trained, and rows
    of data.seq_len."""

    records: int
    tokens: int
    trained: int
    rows: int


def planned_steps(training: TrainingConfig, epoch_steps: int, epoch_tokens: int) -> int:
    """Optimizer steps of the run; one epoch when neither steps, epochs nor tokens is set. epoch_tokens: trained."""
    if training.steps is not None:
        return training.steps
    if training.tokens is not None:
        return max(1, math.ceil(training.tokens / (epoch_tokens / epoch_steps)))
    epochs = 1 if training.epochs is None else training.epochs
    # 0.1 of 30 steps is 3.0000000000000004 in floating point: three steps, not four.
    return max(1, math.ceil(epochs * epoch_steps - 1e-6))


def open_chances(config: RunConfig, is_rendered: bool, size: int) -> dict[str, float]:
    """The template's chances that `config` leaves open, by dotted key, for files of `size` bytes. Little data is
    learned as it will be asked for: drawn at random, most of it would never be seen so."""
    if not is_rendered:
        return {}
    asked = [name for name in MINIMIND_CHANCES if getattr(config.data, name) is None]
    is_few = size < FEW_TOKENS * BYTES_PER_TOKEN and not config.data.redraw_each_epoch
    return {f"data.{name}": 0.0 if is_few else MINIMIND_CHANCES[name] for name in asked}


def leaves_open(config: RunConfig) -> bool:
    """Whether anything else is to follow from the data."""
    training, held_out = config.training, config.data.val or config.data.val_fraction
    needed = (training.batch_tokens, training.eval_every, config.optimizer.learning_rate, held_out)
    return None in needed or not _has_length(training)


def _has_length(training: TrainingConfig) -> bool:
    return (training.steps, training.epochs, training.tokens) != (None, None, None)


def share_held_out(records: int, figures: Figures) -> float:
    """The share of so many records that is held out: the stage's, or more so that there are enough; 0 of a few."""
    if records < FEWEST_TO_SPLIT:
        return 0.0
    return max(figures.val_fraction, min(LARGEST_SHARE, _two_digits(HELD_OUT / records)))


def following(config: RunConfig, amount: Amount, parameters: int, shards: int) -> dict[str, Any]:
    """Values of the settings that `config` leaves open, by dotted key.

    parameters: of the model. shards: devices that share the rows of a step.
    """
    training, optimizer, seq_len = config.training, config.optimizer, config.data.seq_len
    found: dict[str, Any] = {}
    if training.batch_tokens is None:
        rows = _rows_of_a_step(config, amount.rows, shards)
        found["training.batch_tokens"] = rows * seq_len
        if rows % training.accumulation_steps:
            found["training.accumulation_steps"] = math.gcd(rows, training.accumulation_steps)
    rows = found.get("training.batch_tokens", training.batch_tokens) // seq_len
    steps = -(-amount.rows // rows)  # of an epoch
    if not _has_length(training):
        most = max(config.figures.most_epochs, math.ceil(config.SHORTEST / steps))
        epochs = float(max(config.figures.epochs, min(most, math.ceil(STEPS / steps))))
        found["training.epochs"] = epochs
        training = dataclasses.replace(training, epochs=epochs)
    if training.eval_every is None:
        tenth = planned_steps(training, steps, amount.trained) // 10
        found["training.eval_every"] = min(config.figures.eval_every, max(1, tenth))
    if optimizer.learning_rate is None:
        rate = found["optimizer.learning_rate"] = _rate(config, amount.tokens, parameters)
        if optimizer.name == "muon" and optimizer.muon_learning_rate is None:
            found["optimizer.muon_learning_rate"] = _two_digits(rate * 5 / 3)
    return found


def _rows_of_a_step(config: RunConfig, rows: int, shards: int) -> int:
    """As many as the stage's figure, or a power of two that leaves an epoch of these rows enough steps; at least one
    for each of the devices, and a multiple of them."""
    most = max(1, config.figures.batch_tokens // config.data.seq_len)
    wanted = max(1, rows // STEPS_PER_EPOCH)
    wanted = most if wanted >= most else 2 ** int(math.log2(wanted))
    return max(1, wanted // shards) * shards


def _rate(config: RunConfig, tokens: int, parameters: int) -> float:
    """Between the rates for few and for much data, on a logarithmic scale of the tokens. That for few data is higher of
    a smaller model, and, but for adapters, lower of a larger one; a start from nothing has one rate."""
    few, much = config.figures.few_rate, config.figures.learning_rate
    if config.init_from:
        few *= min(10.0, max(1.0 if config.lora.rank else 0.1, (parameters / 64e6) ** -0.6))
    share = math.log(max(tokens, 1) / FEW_TOKENS) / math.log(MUCH_TOKENS / FEW_TOKENS)
    share = min(1.0, max(0.0, share))
    return much if share == 1 else _two_digits(few ** (1 - share) * much**share)


def _two_digits(number: float) -> float:
    return float(f"{number:.2g}")


def with_values(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """`config` with these values, by dotted key."""
    sections = {key.partition(".")[0]: {} for key in values}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections[section][name] = value
    sections = {name: dataclasses.replace(getattr(config, name), **new) for name, new in sections.items()}
    return dataclasses.replace(config, **sections)


def of_much(config: RunConfig) -> dict[str, Any]:
    """The figures for much data, by dotted key, where `config` leaves something open but for what is held out: those of
    a run that makes its data itself."""
    rows = config.data.seq_len * config.training.accumulation_steps
    values = following(config, Amount(*[10**12] * 4), 1, 1)
    if config.training.batch_tokens is None:
        values["training.batch_tokens"] = max(1, round(config.figures.batch_tokens / rows)) * rows
        values.pop("training.accumulation_steps", None)
    return values


def filled(config: RunConfig) -> RunConfig:
    """`config` with the figures for much data where it leaves something open, as for a run whose data is not known."""
    held_out = {"data.val_fraction": config.figures.val_fraction} if config.data.val_fraction is None else {}
    return with_values(config, of_much(config) | held_out)

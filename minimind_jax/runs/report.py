"""The report of a run, made from its folder alone: report.md and loss.png."""

import itertools
import math
import shlex
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from statistics import median_high

import yaml

from minimind_jax.config.stages import RunConfig
from minimind_jax.errors import UserError
from minimind_jax.folders import holds_model
from minimind_jax.runs.kind import StageKind, Stages
from minimind_jax.shell import command
from minimind_jax.texts import fenced, is_there, read_text, table
from minimind_jax.training.run import RunFolder, plain, write_figure, write_text
from minimind_jax.training.tracking import read_metrics
from minimind_jax.training.watch import Watch


def write_report(run: RunFolder, stages: Stages, last: dict | None = None) -> Path:
    """Writes report.md and loss.png of a run, finished or not, and returns the report's path.

    last: the row that metrics.jsonl will end with, of a run that is about to be finished.
    Raises UserError when the folder is not a run, or it has no metrics yet.
    """
    config = run.read_config()
    if config is None:
        raise UserError(f"{run.path} is not a run: it has no config.yaml")
    rows = read_metrics(run.metrics_file) + ([last] if last else [])
    train = [row for row in rows if _has(row, "loss")]
    if not train:
        raise UserError(f"{run.metrics_file} has no training step yet; start the run first")
    val = [row for row in rows if _has(row, Watch.of_run(config, ()).key)]
    kind = stages.get(run.read_environment().get("run", {}).get("stage"))
    draw_losses(train, val, run.loss_picture, kind.curves if kind else ())
    write_text(run.report_file, report_text(run, kind, config, rows, train, val))
    return run.report_file


def draw_losses(train: list[dict], val: list[dict], picture: Path, curves: Sequence[str] = ()) -> None:
    """Over the steps: training loss (each step, and smoothed), validation loss, those of `curves` that there are, and
    the learning rate."""
    from matplotlib.figure import Figure  # imported here: training must not wait for it at its start

    curves = [name for name in curves if _any_has(val, f"val_{name}")]
    figure = Figure(figsize=(8, 6 + 1.5 * len(curves)), layout="constrained")
    losses, *panels, rates = figure.subplots(2 + len(curves), 1, sharex=True, height_ratios=(3, *[1] * len(curves), 1))
    steps, values = _series(train, "loss")
    losses.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=1, label="train")
    losses.plot(steps, smoothed(values), color="tab:blue", label="train, smoothed")
    if _any_has(val, "val_loss"):
        losses.plot(*_series(val, "val_loss"), "o-", color="tab:orange", label="validation")
    losses.legend()
    for name, panel in zip(curves, panels, strict=True):
        steps, values = _series(train, name)
        panel.plot(steps, smoothed(values), color="tab:blue")
        panel.plot(*_series(val, f"val_{name}"), "o-", color="tab:orange")
    rates.plot(*_series(train, "learning_rate"), color="tab:green")
    rates.set_xlabel("step")
    names = ("loss" if curves else "loss (nats per token)", *curves, "learning rate")
    for name, panel in zip(names, figure.axes, strict=True):
        panel.set_ylabel(name)
        panel.grid(alpha=0.3)
    write_figure(picture, figure, dpi=120)


def _series(rows: list[dict], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the rows that have a number of this name; any row may lack any, or have null (not finite)."""
    there = [row for row in rows if _has(row, name)]
    return [row["step"] for row in there], [row[name] for row in there]


def _has(row: dict, name: str) -> bool:
    return row.get(name) is not None


def _any_has(rows: list[dict], name: str) -> bool:
    return any(_has(row, name) for row in rows)


def smoothed(values: list[float], share: float = 0.05) -> list[float]:
    """Mean over each value and those before it, of `share` of all in number: nothing shows before it has happened."""
    width = max(1, round(len(values) * share))
    sums = list(itertools.accumulate(values, initial=0.0))
    return [(sums[i + 1] - sums[max(0, i + 1 - width)]) / min(i + 1, width) for i in range(len(values))]


def report_text(
    run: RunFolder, kind: StageKind | None, config: dict, rows: list[dict], train: list[dict], val: list[dict]
) -> str:
    """report.md as text. kind: of the run's stage, if that is known."""
    watch = Watch.of_run(config, val)
    own, facts = not_default(config, _unset(kind) if kind else {}), _start_and_machine(run.read_environment())
    unit = "pictures" if " pictures" in facts.get("batch", "") else "tokens"
    sections = [
        f"# Run {run.path.name}",
        verdict(train, val, watch, _model_step(rows, watch), (kind.config if kind else RunConfig).SHORTEST),
        "![loss](loss.png)",
        "## Result",
        _table(results(train, val, watch, unit) | _model_step(rows, watch)),
        "## Run",
        _table(facts),
    ]
    if is_there(run.results_file):
        sections += ["## Held-out results", read_text(run.results_file, "remove it").strip()]
    if val:
        sections += ["## Validation", _validation(val, kind.figures if kind else ())]
    samples = [row for row in rows if row.get("samples")]
    if samples:
        sections += ["## Samples", *_samples(samples)]
    sections += [
        "## How to go on",
        _next_steps(run, kind),
        "## Settings",
        f"Those that are not the defaults; all are in {run.config_file.name}.",
        fenced(yaml.safe_dump(own, sort_keys=False, allow_unicode=True), "yaml"),
    ]
    return "\n\n".join(sections) + "\n"


def verdict(train: list[dict], val: list[dict], watch: Watch, chosen: dict, shortest: int = RunConfig.SHORTEST) -> str:
    """What came of the run, in a sentence or two. chosen: whose model was written, where it is not the last step's.
    shortest: steps of a run that learns."""
    steps, said = train[-1]["step"], []
    if steps < shortest:
        little = "nothing" if steps < shortest / 5 else "little"
        said.append(f"{steps} step{'s' * (steps != 1)}: {little} can be learned in so few.")
    at, values = _series(val, watch.key)
    if not values:
        return " ".join([*said, "No validation data: nothing tells how it does on what it has not seen."])
    number, is_max = f"The validation {watch.name}", watch.direction == "max"
    worsens, improve, improved = ("falls", "rise", "rose") if is_max else ("rises", "fall", "fell")
    best, first, last = watch.best(at), values[0], values[-1]
    top = values[at.index(best)]
    if (last < top * 0.99 if is_max else last > top * 1.01) and best != at[0]:
        kept = "the model is that of that step" if chosen else "fewer epochs, or training.patience, would end there"
        said.append(
            f"{number} {worsens} since step {best:,} ({top:.4f} → {last:.4f}): it is overfitting; {kept}. What is to "
            "be learned by heart may be known all the same."
        )
    elif len(values) == 1:
        said.append(f"{number} was taken once, so nothing tells whether it {improve}s.")
    elif last <= first * 1.001 if is_max else last >= first * 0.999:
        said.append(f"{number} did not {improve} ({first:.4f} → {last:.4f}): nothing was learned that helps there.")
    else:
        said.append(f"{number} {improved} from {first:.4f} to {last:.4f}.")
    return " ".join(said)


def _unset(kind: StageKind) -> dict:
    """The stage's defaults, with those of the settings that runs of an earlier version kept of all stages."""
    found = plain(kind.config())
    for key, (value, _) in kind.config.FORMER.items():
        section, _, name = key.partition(".")
        found.setdefault(section, {}).setdefault(name, value)
    return found


def not_default(config: dict, defaults: dict) -> dict:
    """The settings in `config` that are not in `defaults`, or not the same there."""
    found = {}
    for key, value in config.items():
        if isinstance(value, dict) and isinstance(defaults.get(key), dict):
            found |= {key: inner} if (inner := not_default(value, defaults[key])) else {}
        elif key not in defaults or value != defaults[key]:
            found[key] = value
    return found


def _start_and_machine(recorded: dict) -> dict[str, str]:
    """How and on what the run was last started, as far as it is recorded: other versions may have told less."""
    parts = {"platform": "{}", "python": "Python {}", "backend": "JAX on {}"}
    words, versions = recorded.get("command"), recorded.get("versions", {})
    found = {
        "date": recorded.get("date"),
        "command": words and f"`{shlex.join([Path(words[0]).name, *words[1:]])}`",
        **{key.replace("_", " "): value for key, value in recorded.get("run", {}).items()},
        "system": ", ".join(form.format(recorded[key]) for key, form in parts.items() if key in recorded),
        "versions": ", ".join(f"{package} {version}" for package, version in versions.items()),
    }
    return {key: told for key, told in found.items() if told}


def results(train: list[dict], val: list[dict], watch: Watch, unit: str) -> dict[str, str]:
    """The figures a reader looks for first. unit: what batches are counted in."""
    last = train[-1]
    found = {"steps": f"{last['step']:,}", "training loss": f"{train[0]['loss']:.4f} → {last['loss']:.4f}"}
    if val:
        at, values = _series(val, watch.key)
        best = watch.best(at)
        found[f"validation {watch.name}"] = f"{values[0]:.4f} (step {at[0]}) → {values[-1]:.4f}"
        if best != at[-1]:
            found[f"best validation {watch.name}"] = f"{values[at.index(best)]:.4f} (step {best})"
        start, end = (row.get("val_bits_per_byte") for row in (val[0], val[-1]))
        if start and end:
            found["validation bits per byte"] = f"{start:.4f} → {end:.4f} ({end / start:.1%} of the start)"
    if last.get("skipped"):
        found["skipped updates"] = f"{last['skipped']:,} of {last['step']:,}: loss or gradient was not finite"
    for name, count in last.items():
        if name.startswith("skipped/"):
            metric = name.removeprefix("skipped/")
            found[f"updates skipped for {metric}"] = f"{count:,} of {last['step']:,}: it was above its limit"
    if last.get("tokens"):
        found[f"trained {unit}"] = f"{last['tokens']:,}"
    if speeds := [row["tokens_per_second"] for row in train if row.get("tokens_per_second")]:
        found["speed (median)"] = f"{median_high(speeds):,.0f} {unit}/s, padding not counted"
    if utilisation := [row["mfu"] for row in train if row.get("mfu")]:
        found["MFU (median)"] = f"{median_high(utilisation):.1%}"
    if last.get("seconds"):
        found["time"] = str(timedelta(seconds=math.ceil(last["seconds"])))
    return found


def _model_step(rows: list[dict], watch: Watch) -> dict[str, str]:
    """Of a run that ended when it got no better."""
    step = rows[-1].get("model_step")
    return {} if step is None else {"the model": f"of step {step:,}, whose {watch.told()}"}


def _validation(val: list[dict], figures: Sequence[str]) -> str:
    """A table of every evaluation; the first line is the model that the run started from."""
    names = [name for name in ("loss", "bits_per_byte", *figures) if _any_has(val, f"val_{name}")]
    titles = ["step", *(name.replace("_", " ") for name in names)]
    figures_of = ((row["step"], [row.get(f"val_{name}") for name in names]) for row in val)
    rows = ([f"{step:,}", *("" if n is None else f"{n:.4f}" for n in found)] for step, found in figures_of)
    return table(titles, rows, numbers=titles)


def _samples(rows: list[dict]) -> list[str]:
    """The first and the last samples taken."""
    shown = rows if len(rows) == 1 else [rows[0], rows[-1]]
    return [
        f"At step {row['step']:,}:\n\n"
        + "\n\n".join(fenced(f"> {sample['prompt']}\n{sample['text']}") for sample in row["samples"])
        for row in shown
    ]


def _next_steps(run: RunFolder, kind: StageKind | None) -> str:
    if kind and holds_model(run.model):
        return fenced("\n".join(kind.next_commands(run)), "sh")
    stage = kind.name if kind else "STAGE"
    return fenced(command(stage, "--config", run.config_file, note="resume it"), "sh")


def _table(values: dict) -> str:
    return table(("", ""), ((key, str(value).replace("|", "\\|")) for key, value in values.items()))

"""How names on the command line become folders: runs, and the models in them."""

import json
import os
from pathlib import Path

import yaml

from minimind_jax.errors import UserError
from minimind_jax.hub import fetch, is_hub_name
from minimind_jax.paths import as_path, is_remote, local_folder
from minimind_jax.shell import command
from minimind_jax.texts import is_there

RUNS = Path("runs")

PIPELINE = "pipeline.yaml"  # in a pipeline's folder: which of its runs is the last

ADAPTER_CONFIG = "adapter_config.json"  # what makes a folder a low-rank adapter, as peft writes them


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a model: a Hugging Face one, or an adapter of one."""
    return any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG))


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a low-rank adapter and no whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer is that a folder means: in it, or in the model/ of a run."""
    is_in_model = not is_there(folder / "tokenizer.json") and is_there(folder / "model" / "tokenizer.json")
    return folder / "model" if is_in_model else folder


def resolve_run(name: str) -> Path:
    """The folder of the run `name`: runs/NAME for a bare name; a path (with a separator, or `.`) is kept."""
    if not name:
        raise UserError("run is empty; give a name (a folder under runs/) or a path")
    is_path = os.sep in name or "/" in name or name.startswith((".", "~"))
    return as_path(name).expanduser() if is_path else RUNS / name


def resolve_model_folder(name: str, setting: str = "model") -> Path:
    """The folder of the model, or of the adapter, that `name` means: the folder itself, or the model/ of a run (name
    or path); of one in an object store, a copy on this machine; else what the hub has under that name (see `hub`).

    setting: what the user gave the name as, for the message.

    Raises:
        UserError: nothing is there; the message names the places looked at, and a run that has not finished.
    """
    folder, run = as_path(name).expanduser(), resolve_run(name)
    last = next((made for place in (run, folder) if (made := last_stage(place))), None)
    if last is not None:
        return resolve_model_folder(str(last), setting)
    places = list(dict.fromkeys([folder, folder / "model", run / "model"]))
    for place in places:
        if holds_model(place):
            return local_folder(place)
    for unfinished in (run, folder):
        if (unfinished / "config.yaml").is_file():
            raise UserError(
                f"{setting}: the run {unfinished} has no model/ yet: it has not finished; run it again to resume it, "
                "or write what it has so far as a model: "
                + command("convert", "to-hf", unfinished, "OUTPUT", "--checkpoint", "newest")
            )
    for pipeline in (run, folder):
        if stages := ", ".join(sorted(str(file.parent) for file in pipeline.glob("*/config.yaml"))):
            raise UserError(f"{setting}: {pipeline} holds the runs of a pipeline; name the one you mean: {stages}")
    looked = ", ".join(str(place / "config.json") for place in places)
    problem = f"{setting} {name!r} is neither a Hugging Face folder nor a run (no {looked})"
    if not is_hub_name(name):
        raise UserError(problem)
    try:
        return fetch(name, setting)
    except UserError as error:
        raise UserError(f"{problem}, and on the hub nothing was to be had. {error}") from error


def moved_with_run(name: str, model: Path) -> Path | None:
    """Where the folder is that a run's `model` called `name` (from the root on) when it was written, if both were moved
    together since; None for a model that is not in its run's folder."""
    run = model.parent
    if is_remote(run) or model.name != "model" or not os.path.isabs(name):
        return None
    try:
        named = yaml.safe_load((run / "config.yaml").read_text("utf-8"))["run"]
        directory = json.loads((run / "environment.json").read_text("utf-8"))["directory"]
        then = os.path.abspath(Path(directory) / resolve_run(named))
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None
    return Path(os.path.normpath(run.resolve() / os.path.relpath(name, then)))


def last_stage(folder: Path) -> Path | None:
    """The run of a pipeline's last stage, where the folder is a pipeline's."""
    if is_remote(folder) or not (folder / PIPELINE).is_file():
        return None
    name = yaml.safe_load((folder / PIPELINE).read_text("utf-8"))["last_stage"]
    return Path(os.path.abspath(folder / name)) if folder.is_absolute() else Path(os.path.normpath(folder / name))

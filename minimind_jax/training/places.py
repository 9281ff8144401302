"""Whether two settings that name files or folders mean the same ones, also after a project was moved as a whole."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minimind_jax.convert.identity import tokenizer_hash, weights_hash
from minimind_jax.folders import holds_model, last_stage, resolve_run
from minimind_jax.paths import is_remote


class Then(NamedTuple):
    """Where the names in a run's settings count from: the working directory and the run's folder when they were
    written, as absolute paths, and that folder now. hashes: of the model or tokenizer that a setting named."""

    directory: Path
    run: Path
    run_now: Path
    hashes: Mapping[str, str] = {}

    def moved(self, path: Path) -> Path:
        """Where a path of then is, if it was moved together with the run's folder."""
        return Path(os.path.normpath(self.run_now / os.path.relpath(path, self.run)))

    def readings(self, name: str) -> list[tuple[str, Path]]:
        """What a name of then may mean: (name, the directory it counts from)."""
        same_name = str(self.moved(Path(name))) if os.path.isabs(name) else name
        return [(name, self.directory), (same_name, self.moved(self.directory))]

    def current(self, name: str) -> str:
        """The name of then as one that counts from the present working directory, if that finds nothing."""
        if not name or is_remote(Path(name)) or _model(name, Path.cwd()).exists():
            return name
        places = (_model(*reading) for reading in self.readings(name))
        return next((str(place) for place in places if place.exists()), name)


def changes(
    names: Mapping[str, str], before: Mapping[str, Any], now: Mapping[str, Any], then: Then | None = None
) -> dict[str, str]:
    """`old -> new` of every setting, by dotted key, in which two runs or stages differ, sorted.

    names: what settings name on a disk (see `config.fields.names_of`); their values differ when they mean other files
    or another folder. A folder is told by where it is, links followed, a model also by the run it belongs to, and both
    it and a tokenizer by their files, as far as those of then are known. then: of `before`; None where both count from
    the present working directory.
    """
    pairs = {key: (before.get(key), now.get(key)) for key in sorted(before.keys() | now.keys())}
    return {
        key: f"{old} -> {new}"
        for key, (old, new) in pairs.items()
        if old != new and not (key in names and _mean_the_same(names[key], old, new, then, key))
    }


def _mean_the_same(what: str, before: Any, now: Any, then: Then | None, key: str) -> bool:
    if isinstance(before, list | tuple) and isinstance(now, list | tuple):
        return len(before) == len(now) and all(
            _mean_the_same(what, *pair, then, key) for pair in zip(before, now, strict=True)
        )
    if not (isinstance(before, str) and isinstance(now, str) and before and now):
        return before == now
    if "://" in before + now:
        left, right = (name.rstrip("/").removesuffix("/model" if what == "model" else "") for name in (before, now))
        return left == right
    find = _model if what == "model" else _place
    here = find(now, Path.cwd())
    places = [find(*reading) for reading in (then.readings(before) if then else [(before, Path.cwd())])]
    if here in places:
        return True
    found = _hash(what, here)
    known = [then.hashes[key]] if then and key in then.hashes else [_hash(what, place) for place in places]
    return bool(found) and found in known


def _hash(what: str, folder: Path) -> str:
    """Of the model or tokenizer in a folder; "" where there is none."""
    if what == "tokenizer":
        return tokenizer_hash(folder)
    return weights_hash(folder) if what == "model" and holds_model(folder) else ""


def _place(name: str, directory: Path) -> Path:
    return (directory / os.path.expanduser(name)).resolve()


def _model(name: str, directory: Path) -> Path:
    """The folder of the model that a name means, as `folders.resolve_model_folder` finds it."""
    folder, run = _place(name, directory), _place(str(resolve_run(name)), directory)
    last = last_stage(run) or last_stage(folder)
    places = (last / "model",) if last else (folder, folder / "model", run / "model")
    return next((place for place in places if holds_model(place)), folder).resolve()

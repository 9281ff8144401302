"""What runs in the process of a reward function that may hang: one of ours, or the user's own in the form it has."""

import atexit
import functools
import inspect
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minimind_jax.errors import UserError
from minimind_jax.rl.episode import Episode, Function, Value, checked, foreign
from minimind_jax.rl.judges import written
from minimind_jax.rl.rewards import bound, entries
from minimind_jax.tools.schema import Schema
from minimind_jax.tools.worker import imported

_TRL = ("prompts", "completions", "completion_ids")


def load(names: list[str]) -> dict[str, tuple[Schema, Any]]:
    """Of entries without weights: what `tools/worker.py:serve` calls with the file of the episodes."""
    try:
        functions = {entry.text: own(entry.text) if entry.own else bound(entry.text) for entry in entries(names)}
    except UserError:
        raise
    except Exception as error:  # of torch and transformers
        raise UserError(f"rewards.use {names[0]}: {type(error).__name__}: {error}") from error
    return {name: _served(name, function) for name, function in functions.items()}


def _served(name: str, function: Function) -> tuple[Schema, Any]:
    def of_file(file: str) -> list[Value]:
        _remove_at_end(Path(file).parent)
        episodes = pickle.loads(Path(file).read_bytes())
        for episode in episodes:
            episode.state = _state(episode.state)
        return [checked(value) for value in function(episodes)]

    return {"function": {"name": name, "parameters": {}}}, of_file


@functools.cache
def _remove_at_end(folder: Path) -> None:
    """This process ends by itself only where the one that asks was killed, and removes nothing any more."""
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def _state(kept: bytes) -> Any:
    """An environment's state; None where it cannot be had in another process."""
    try:
        return pickle.loads(kept)
    except Exception:
        return None


def own(name: str) -> Function:
    """A user's function, `module:function` or `FILE.py:function`, as one of episodes.

    It takes what TRL's take where one of its parameters is `prompts`, `completions` or `completion_ids`; else it is
    called with the episodes alone. Where it fails on all, each is tried alone, so that the others have their value.
    Raises UserError for one that cannot be found.
    """
    place, _, attribute = name.rpartition(":")
    try:
        function = getattr(imported(place), attribute)
        parameters = (signature := inspect.signature(function)).parameters
        has_trl_form = bool(parameters.keys() & {*_TRL})
        if not has_trl_form:
            signature.bind("episodes")
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        raise UserError(f"rewards.use {name}: it is no function that can be called: {words}") from error
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())

    def ask(episodes: Sequence[Episode]) -> list[Any]:
        if has_trl_form:
            columns = trl_columns(episodes)
            found = function(**{key: each for key, each in columns.items() if takes_all or key in parameters})
        else:
            found = function(episodes)
        if inspect.iscoroutine(found):
            import asyncio  # here: a fifth of the time that the process takes to start

            found = asyncio.run(found)
        if isinstance(found, dict | set | str) or not hasattr(found, "__iter__"):  # of a dict a list would be the keys
            raise TypeError(f"gave a {type(found).__name__}; expected a list of numbers")
        values = found.tolist() if hasattr(found, "tolist") else list(found)
        if len(values) != len(episodes):
            raise ValueError(f"gave {len(values)} values for {len(episodes)} completions")
        return [foreign(value) for value in values]

    def ask_all(episodes: Sequence[Episode]) -> list[Any]:
        try:
            return ask(episodes)
        except Exception:
            if len(episodes) == 1:
                raise
            alone = [_tried(ask, episode) for episode in episodes]
            if not any(isinstance(value, str) for value in alone):
                raise  # it is no single one's fault
            return alone

    return ask_all


def _tried(ask: Function, episode: Episode) -> Any:
    try:
        return ask([episode])[0]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def trl_columns(episodes: Sequence[Episode]) -> dict[str, list[Any]]:
    """What TRL gives a reward function: messages, token ids and the record's fields, None where one has it not."""
    fields = dict.fromkeys(name for episode in episodes for name in episode.task.fields)
    return {
        **{name: [episode.task.fields.get(name) for episode in episodes] for name in fields},
        "prompts": [episode.task.messages for episode in episodes],
        "completions": [written(episode) for episode in episodes],
        "completion_ids": [episode.completion for episode in episodes],
    }

"""What a completion is rewarded for: the functions that rewards.use names, and the weighted sum of what they say."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import inspect
import json
import math
import pickle
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minimind_jax.config.rl import RewardsConfig
from minimind_jax.errors import UserError
from minimind_jax.rl import judges, reward_functions
from minimind_jax.rl.episode import Episode, Function, Task, Value, checked
from minimind_jax.seeds import named_seed
from minimind_jax.texts import one_line
from minimind_jax.tools.toolbox import Toolbox
from minimind_jax.values import convert

# Of one episode each; what stands in their brackets comes behind it.
EACH: dict[str, Callable[..., float]] = {
    "answer": reward_functions.answer,
    "tools": reward_functions.tools,
    "length": reward_functions.length,
    "overlong": reward_functions.overlong,
    "thinking": reward_functions.thinking,
    "repetition": reward_functions.repetition,
    "json": reward_functions.json_form,
    "regex": reward_functions.regex,
    "state": reward_functions.state,
    "minimind": reward_functions.minimind,
}
# Of all episodes; made once of what stands in their brackets.
MADE: dict[str, Callable[..., Function]] = {
    "model": judges.model,
    "hf": judges.hf,
    "internlm2": judges.internlm2,
    "judge": judges.judge,
}
# These may take their time, as the user's own may: in a process that can be ended.
APART = {"json", "regex", "hf", "internlm2", "judge"}

_ENTRY = re.compile(r"(?:([^*(:]*)\*)?\s*(\S.*?)\s*", re.DOTALL)
_NAMED = re.compile(r"(\w+)\s*(?:\((.*)\))?", re.DOTALL)
_COMMAS = re.compile(r',(?=(?:[^"]*"[^"]*")*[^"]*$)')
_OWN = re.compile(r".+:[^\W\d]\w*")
_UNLIMITED = 1 << 30
_NOTHING = Episode(-1, Task("no record", [], None, {}), False, [], 0, [], [])


class Entry(NamedTuple):
    """Of rewards.use. text: without its weight. name: what it is logged as. own: a function of the user's."""

    weight: float
    text: str
    name: str
    own: bool

    @property
    def is_apart(self) -> bool:
        return self.own or _NAMED.fullmatch(self.text)[1] in APART


class Rewards(contextlib.AbstractContextManager):
    """The reward functions of a run, and the processes of those that may take their time.

    max_new_tokens: of a completion. deterministic: `compute.deterministic`. names: of the functions, in their order.
    Raises UserError for an entry that names no function, or gives it wrong arguments.
    """

    def __init__(self, config: RewardsConfig, max_new_tokens: int, seed: int, deterministic: bool = False):
        self._config, self._seed = config, seed
        self._said: set[Entry] = set()  # whose first failure was told
        self._entries = entries(config.use)
        if not any(entry.weight for entry in self._entries):
            raise UserError(f"rewards.use {', '.join(config.use)}: all weights are 0, and so is every reward")
        self.names = [entry.name for entry in self._entries]
        known = {text: entry.name for entry in self._entries for text in (entry.name, entry.text)}
        if (success := config.success.strip() or self.names[0]) not in known:
            raise UserError(f"rewards.success {success} is none of rewards.use: {', '.join(self.names)}")
        self._success = known[success]
        of_run = {"max_new_tokens": max_new_tokens, "deterministic": deterministic}
        with contextlib.ExitStack() as left:
            self._functions = [self._started(entry, of_run, left) for entry in self._entries]
            self._threads = left.enter_context(concurrent.futures.ThreadPoolExecutor(len(self._entries)))
            self._left = left.pop_all()

    def __exit__(self, *error: object) -> None:
        self._left.close()

    @functools.cached_property
    def _file(self) -> Path:
        """What functions in other processes read; where this one is killed, those remove its folder."""
        return Path(self._left.enter_context(tempfile.TemporaryDirectory(prefix="minimind-rewards-"))) / "episodes"

    def _started(self, entry: Entry, of_run: dict[str, Any], left: contextlib.ExitStack) -> Function | Toolbox:
        if not entry.is_apart:
            return bound(entry.text, **of_run)
        tools = Toolbox(
            [entry.text], seconds=self._config.seconds, memory_mib=_UNLIMITED, characters=_UNLIMITED, workers=1,
            loader="minimind_jax.rl.reward_worker:load", start_seconds=max(60.0, self._config.seconds),
        )  # fmt: skip
        return left.enter_context(tools)

    def check(self, tasks: Sequence[Task]) -> list[str]:
        """What is told of functions that cannot judge some of the tasks, for they lack what an answer is compared with.
        Raises UserError where they can judge none, or rewards.on_error is `stop`."""
        notes = []
        for entry in self._entries:
            needed = None if entry.own else reward_functions.NEEDED.get(_NAMED.fullmatch(entry.text)[1])
            found = []
            for task in tasks if needed else ():
                try:
                    needed(task)
                except ValueError as error:
                    found.append((task, error))
            if found:
                task, error = found[0]
                told = f"rewards.use {entry.text}: {task.where}: {error} ({len(found):,} of {len(tasks):,} prompts)"
                if self._config.on_error == "stop" or len(found) == len(tasks):
                    raise UserError(
                        f"{told}; give each its answer, or use rewards that need none (docs/rl.md); where only some "
                        "lack it, rewards.on_error skip leaves out their completions"
                    )
                notes.append(told)
        return notes

    def __call__(self, episodes: Sequence[Episode]) -> dict[str, float]:
        """Fills `rewards`, `reward` and `unjudged` of the episodes; returns how many values each function failed to
        give. Raises UserError at the first that failed, where rewards.on_error is `stop`."""
        if not episodes:  # of this process; a function need not know what to say of none
            return {}
        functions = list(zip(self._entries, self._functions, strict=True))
        if any(entry.is_apart for entry in self._entries):
            self._file.write_bytes(pickle.dumps([_portable(episode) for episode in episodes]))
        begun = [
            self._threads.submit(self._told, entry, tools, episodes) if entry.is_apart else None
            for entry, tools in functions
        ]
        columns = [
            apart.result() if apart else [checked(value) for value in function(episodes)]
            for apart, (_, function) in zip(begun, functions, strict=True)
        ]
        failures = {
            f"rewards/{entry.name}/failures": float(self._failures(entry, column, episodes))
            for entry, column in zip(self._entries, columns, strict=True)
        }
        for episode, row in zip(episodes, zip(*columns, strict=True), strict=True):
            numbers = [None if isinstance(value, str) else value for value in row]
            episode.rewards = dict(zip(self.names, numbers, strict=True))
            pairs = zip(self._entries, numbers, strict=True)
            episode.reward = math.fsum(entry.weight * number for entry, number in pairs if number is not None)
            failed = [entry for entry, value in zip(self._entries, row, strict=True) if isinstance(value, str)]
            episode.unjudged = self._config.on_error == "skip" and any(entry.weight for entry in failed)
        return failures

    def _told(self, entry: Entry, tools: Toolbox, episodes: Sequence[Episode]) -> list[Value]:
        """What a process says of the episodes in the file; of each the same words where it failed as a whole."""
        seed = named_seed(self._seed, entry.text, str([episode.tokens for episode in episodes]))
        found = tools.call(entry.text, {"file": str(self._file)}, seed)
        told = json.loads(found.text)
        return [told["error"]] * len(episodes) if found.is_error else told

    def _failures(self, entry: Entry, values: Sequence[Value], episodes: Sequence[Episode]) -> int:
        failed = [n for n, value in enumerate(values) if isinstance(value, str)]
        if failed and entry not in self._said:
            where, words = episodes[failed[0]].task.where, one_line(values[failed[0]])  # of a model's text, perhaps
            told = f"rewards.use {entry.text}: {where}: {words} ({len(failed)} of {len(episodes)} completions)"
            if self._config.on_error == "stop":
                raise UserError(
                    f"{told}; mend it, give it more rewards.seconds, or set rewards.on_error skip to train without "
                    "those completions, count to train on their other rewards"
                )
            what = "are not trained on" if self._config.on_error == "skip" and entry.weight else "go without it"
            print(f"{told}; they {what}, and rewards/{entry.name}/failures counts them", file=sys.stderr)
            self._said.add(entry)
        return len(failed)

    def success(self, episode: Episode) -> bool:
        """Whether a rewarded episode counts as a success."""
        return (episode.rewards[self._success] or 0.0) >= 1


def _portable(episode: Episode) -> Episode:
    """With its state as bytes, by themselves: an object that is made for its own process is not to stop the rest."""
    try:
        state = pickle.dumps(episode.state)
    except Exception:  # whatever its class raises
        state = b""
    return dataclasses.replace(episode, state=state)


def entries(use: Sequence[str]) -> list[Entry]:
    """What each text of rewards.use says. Raises UserError, which tells what functions there are."""
    if not use:
        raise UserError(f"rewards.use is empty: nothing says what is good; there are {_there_are()}")
    found = [_entry(text) for text in use]
    plain = [entry.name for entry in found]
    found = [entry if plain.count(entry.name) == 1 else entry._replace(name=entry.text) for entry in found]
    for entry in found:
        if [other.name for other in found].count(entry.name) > 1:
            raise UserError(f"rewards.use has {entry.text} twice; give it once, with the sum of the weights")
    return found


def _entry(text: str) -> Entry:
    found = _ENTRY.fullmatch(text)
    weight, what = found.groups() if found else (None, "")
    try:
        factor = 1.0 if weight is None else convert(float, weight.strip())
    except (ValueError, TypeError):
        raise UserError(f"rewards.use {text}: the weight {weight.strip()!r} is no number") from None
    named = _NAMED.fullmatch(what)
    if named and named[1] in {**EACH, **MADE}:
        return Entry(factor, what, named[1], own=False)
    if not named and _OWN.fullmatch(what):
        return Entry(factor, what, what.rpartition(":")[2], own=True)
    raise UserError(f"rewards.use {text!r}: there is no such function; there are {_there_are()}")


def _there_are() -> str:
    return f"{', '.join(map(_shown, [*EACH, *MADE]))}, and your own as module:function or FILE.py:function"


def _shown(name: str) -> str:
    """A function as it is called: length(low, high), repetition(n=3)."""
    parameters = ", ".join(str(each.replace(annotation=each.empty)) for each in _parameters(name).values())
    return f"{name}({parameters})" if parameters else name


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    """What may stand in the brackets of a function."""
    found = inspect.signature({**EACH, **MADE}[name]).parameters
    return {key: each for key, each in found.items() if key != "episode" and each.kind is not each.KEYWORD_ONLY}


def bound(text: str, **of_run: Any) -> Function:
    """One of our functions with its arguments, `NAME` or `NAME(ARGUMENTS)`. of_run: what the run tells those that ask
    for it. Raises UserError for wrong arguments."""
    name, arguments = _NAMED.fullmatch(text).groups()
    given, function = _arguments(name, (arguments or "").strip()), {**EACH, **MADE}[name]
    given |= {key: of_run[key] for key in inspect.signature(function).parameters.keys() & of_run.keys()}
    if name in MADE:
        return function(**given)

    def one(episode: Episode) -> Any:
        try:
            return function(episode, **given)
        except ValueError as error:
            return str(error)

    try:
        function(_NOTHING, **given)
    except UserError:  # of the arguments: before the first step
        raise
    except ValueError:
        pass  # it is no record that could be judged
    return lambda episodes: [one(episode) for episode in episodes]


def _arguments(name: str, text: str) -> dict[str, Any]:
    """What stands in the brackets, by position or by name; "quotes" hold commas, and one argument alone may, too."""
    parameters, given = _parameters(name), {}
    pieces = _COMMAS.split(text) if len(parameters) > 1 else [text]
    for position, piece in enumerate(pieces if text else ()):
        key, equals, value = (part.strip() for part in piece.partition("="))
        if not equals or key not in parameters:
            key, value = dict(enumerate(parameters)).get(position, ""), piece.strip()
        if len(value) > 1 and value[0] == value[-1] == '"':
            value = value[1:-1]
        try:
            given[key] = convert(parameters[key].annotation, value)
        except (KeyError, ValueError, TypeError, ArithmeticError):
            raise UserError(f"rewards.use {name}({text}): expected {_shown(name)}; {value!r} is wrong there") from None
    missing = [key for key, each in parameters.items() if each.default is each.empty and key not in given]
    if missing:
        raise UserError(f"rewards.use {name}({text}): expected {_shown(name)}; there is no {missing[0]}")
    return given

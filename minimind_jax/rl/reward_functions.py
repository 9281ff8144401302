"""Rewards that are computed from an episode alone: small pure functions, each with its formula.

A record that a function cannot judge raises ValueError; an argument that makes no sense, UserError.
"""

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

from minimind_jax.data.messages import CLOSE_THINK, OPEN_THINK
from minimind_jax.data.tools import Call, called, calls_in_text, comparable
from minimind_jax.data.values import Place, decode_json, is_absent, kind_of
from minimind_jax.errors import UserError, explained, first_line
from minimind_jax.paths import as_path
from minimind_jax.rl.episode import Episode, Task, Turn
from minimind_jax.shell import needing
from minimind_jax.texts import read_object
from minimind_jax.tools.answers import is_right


def answer(episode: Episode) -> float:
    """1 where the last answer is the record's (see `truths`), as a number or, word for word, as a text; else 0."""
    return float(_is_right(episode))


def length(episode: Episode, low: int, high: int) -> float:
    """1 where the policy wrote low to high tokens, in all its turns and with the ends of them; else 0."""
    if not 0 <= low <= high:
        raise UserError(f"length({low}, {high}): expected 0 <= low <= high")
    return float(low <= sum(episode.sampled) <= high)


def repetition(episode: Episode, n: int = 3) -> float:
    """-(1 - distinct / all) of the n-grams of token ids in each turn, summed over turns; 0 where there is none.

    Of tokens, so that it sees what is repeated in any script; arXiv 2502.03373, appendix C.2.
    """
    if n < 1:
        raise UserError(f"repetition({n}): expected at least 1")
    turns = [episode.tokens[turn.start : turn.end] for turn in episode.turns]
    grams = [list(zip(*(ids[i:] for i in range(n)), strict=False)) for ids in turns]
    count = sum(map(len, grams))
    return sum(len(set(each)) for each in grams) / count - 1 if count else 0.0


def regex(episode: Episode, pattern: str) -> float:
    """1 where the pattern (Python's `re`) is found in the last turn, thoughts and calls included; else 0."""
    with explained(f"regex({pattern}): not a regular expression", re.error):
        return float(re.search(pattern, episode.text) is not None)


def overlong(episode: Episode, cache: int, *, max_new_tokens: int) -> float:
    """DAPO's soft punishment of the longest turn, of n tokens: 0 up to max_new_tokens - cache, from there to
    max_new_tokens a line down to -1: (max_new_tokens - cache - n) / cache. arXiv 2503.14476, equation 13."""
    if not 0 < cache <= max_new_tokens:
        raise UserError(f"overlong({cache}): expected above 0 and at most rollout.max_new_tokens, {max_new_tokens}")
    longest = max((turn.end - turn.start for turn in episode.turns), default=0)
    return min(0.0, max(-1.0, (max_new_tokens - cache - longest) / cache))


def thinking(episode: Episode) -> float:
    """1 where each turn keeps to the form, else 0: a think block that the prompt opened, or the policy at once where it
    was asked to think, is closed once, with words in it and words or a call behind it; else none is opened or closed.
    """
    return float(bool(episode.turns) and all(_is_formed(turn, episode.thinking) for turn in episode.turns))


def _is_formed(turn: Turn, is_asked: bool) -> bool:
    text, is_open = turn.text, turn.opened
    if is_asked and not is_open:  # Qwen3's own template leaves it to the policy
        text, is_open = text.lstrip().removeprefix(OPEN_THINK), text.lstrip().startswith(OPEN_THINK)
        if not is_open:
            return False
    thoughts, _, rest = text.partition(CLOSE_THINK) if is_open else ("-", "", text)
    again = any(tag in thoughts + rest for tag in (OPEN_THINK, CLOSE_THINK))
    return bool(thoughts.strip() and rest.strip()) and not again


def state(episode: Episode, name: str) -> float | None:
    """What the environment keeps under the name in its state, a dict or an object: a reward of its own."""
    kept = episode.state if isinstance(episode.state, dict) else getattr(episode.state, "__dict__", {})
    if name not in kept:
        raise ValueError(f"the environment's state ({type(episode.state).__name__}) has no {name!r}")
    return kept[name]


def json_form(episode: Episode, schema: str = "") -> float:
    """1 where the last answer is a JSON object or list and nothing else, or what the schema in the file allows; else 0.
    Raises UserError for a file that holds no schema, and where the package jsonschema is missing."""
    allows = _allows(schema) if schema else lambda value: isinstance(value, dict | list)
    try:
        return float(allows(decode_json(episode.answer)))
    except (ValueError, RecursionError):
        return 0.0


@functools.cache
def _allows(schema: str) -> Callable[[Any], bool]:
    with needing(f"json({schema}) needs the package jsonschema", "rewards"):
        import jsonschema
        import referencing
    found = read_object(as_path(schema), "put the JSON schema there")
    kind = jsonschema.validators.validator_for(found, jsonschema.Draft202012Validator)
    try:
        kind.check_schema(found)
        validator = kind(found, registry=referencing.Registry())  # which fetches nothing
        validator.is_valid({})
    except Exception as error:
        raise UserError(f"json({schema}): not a JSON schema: {first_line(error)}") from error
    return validator.is_valid


def minimind(episode: Episode) -> float:
    """MiniMind's rules, of characters: +-0.5 for an answer of 20 to 800; where a think block is closed, +-1 (-0.5)
    for thoughts of 20 to 300, and +-0.25 for closing it once; less min(0.5, repeated / all) of the 3-grams of words.

    They are kept as they are, for comparison: a run of Chinese characters is one word, and a block that is never closed
    costs nothing (`repetition` and `thinking` mend that). Source: MiniMind's train_grpo.py.
    """
    text = episode.text
    thoughts, closed, rest = text.partition(CLOSE_THINK)
    reward = 0.5 if 20 <= len(text.strip()) <= 800 else -0.5
    if closed:
        reward += 1.0 if 20 <= len(thoughts.strip()) <= 300 else -0.5
        reward += 0.25 if text.count(CLOSE_THINK) == 1 else -0.25
    words = re.findall(r"\w+|[^\w\s]", (rest.strip() if closed else text).lower())
    grams = list(zip(words, words[1:], words[2:], strict=False))
    return reward - (min(0.5, (len(grams) - len(set(grams))) / len(grams)) if grams else 0.0)


# What is right --------------------------------------------------------------------------------------------------------


def truths(task: Task) -> list[str]:
    """What the answer to a record should be: several texts mean all of them.

    From its field `answer`, `gt`, `ground_truth`, `reward_model.ground_truth` (verl's), `expected_answer` (NVIDIA's),
    `label` (OpenRLHF's) or `solution`, of which the first that there is counts. Raises ValueError where there is none.
    """
    nested = task.fields.get("reward_model")
    verl = nested.get("ground_truth") if isinstance(nested, dict) else None
    found = {name: task.fields.get(name) for name in ("answer", "gt", "ground_truth")}
    found["reward_model.ground_truth"] = verl
    found |= {name: task.fields.get(name) for name in ("expected_answer", "label", "solution")}
    name = next((name for name, value in found.items() if not is_absent(value)), None)
    if name is None:
        raise ValueError(f"the record has none of the fields {', '.join(found)} to check an answer against")
    value = found[name]
    values = value if isinstance(value, list) else [value]
    for each in values:
        if not isinstance(each, str | int | float) or isinstance(each, bool):
            raise ValueError(f"{name} is {kind_of(each)}; expected a text, a number or a list of them")
    return [str(each) for each in values]


def _is_right(episode: Episode) -> bool:
    asked = "\n".join(message["content"] for message in episode.task.messages)
    return is_right(episode.answer, truths(episode.task), asked)


def tools(episode: Episode) -> float:
    """1.5 r + 0.5 s - 0.5: 1 to 1.5 for what is right, by its calls, and -0.5 to 0 for what is not.

    r: 1 where the answer is the record's (see `truths`) and came, with a call that was carried out where tools are
    offered, before the episode was cut off; of a record whose truth is calls (JSON), where those were made and no
    others. s: the share of its calls that are sound: they can be read, their tool is offered, and it did not fail. Of
    no calls s is 0 where one is due, so that skipping the tool is the worst, whatever is answered; else it is 1.
    """
    schemas, due = episode.task.tools or (), _due(episode.task)
    offered = {(schema.get("function") or schema)["name"] for schema in schemas}
    pairs = [pair for turn in episode.turns for pair in itertools.zip_longest(turn.calls, turn.observations)]
    made = [(call, bool(due) or bool(told and not told.is_error)) for call, told in pairs if call]
    sound = [is_done and not call.error and call.name in offered for call, is_done in made]
    if due:
        right = {comparable(call, schemas) for call, _ in made} == {comparable(call, schemas) for call in due}
    else:
        right = not episode.was_cut and (any(sound) or not offered) and _is_right(episode)
    share = sum(sound) / len(sound) if sound else float(not (due or offered))
    return 1.5 * right + 0.5 * share - 0.5


def _due(task: Task) -> list[Call]:
    """The calls that the truth of a record is made of, as JSON; none where it is an answer."""
    texts = truths(task)
    if not texts[0].lstrip().startswith("{"):
        return []
    place = Place(f"{task.where}: what is due")
    return [called(call) for text in texts for call in calls_in_text(text, place)]


# What functions need of a record, which raises ValueError where it is not there; told before anything is written.
NEEDED: dict[str, Callable[[Task], Any]] = {"answer": truths, "tools": _due}

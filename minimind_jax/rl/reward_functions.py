"""Rewards that are computed from an episode alone: small pure functions, each with its formula.

A record that a function cannot judge raises ValueError; an argument that makes no sense, UserError.
"""

import re

from minimind_jax.data.values import is_absent, kind_of
from minimind_jax.errors import UserError
from minimind_jax.rl.episode import Episode, Task
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
    try:
        return float(re.search(pattern, episode.text) is not None)
    except re.error as error:
        raise UserError(f"regex({pattern}): not a regular expression: {error}") from None


# What is right --------------------------------------------------------------------------------------------------------


def truths(task: Task) -> list[str]:
    """What the answer to a record should be: several texts mean all of them.

    From its field `answer`, `gt`, `ground_truth`, `reward_model.ground_truth` (verl's) or `solution`, of which the
    first that there is counts. Raises ValueError where there is none.
    """
    nested = task.fields.get("reward_model")
    verl = nested.get("ground_truth") if isinstance(nested, dict) else None
    found = {name: task.fields.get(name) for name in ("answer", "gt", "ground_truth")}
    found |= {"reward_model.ground_truth": verl, "solution": task.fields.get("solution")}
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

"""Reward functions of a user's own, for `minimind grpo --rewards.use scripts/rl_arithmetic_rewards.py:right_call`."""

import random
from collections.abc import Sequence

from minimind_jax.data.tools import parse_calls
from minimind_jax.rl.episode import Episode
from minimind_jax.tools.answers import numbers_in
from minimind_jax.tools.calculator import calculate


def is_right(text: str, expected: Sequence[str]) -> bool:
    """Whether an answer calls the calculator, and what it asks gives what is expected."""
    found = []
    for call in parse_calls(text)[1]:
        try:
            found.append(calculate(call.arguments["expression"]))
        except (KeyError, ValueError, AttributeError, TypeError):
            return False
    return found == list(expected)


def right_call(episodes: Sequence[Episode]) -> list[float]:
    """1 for a call that gives the answer, else 0."""
    return [float(is_right(episode.text, episode.task.fields["gt"])) for episode in episodes]


def share_said(episodes: Sequence[Episode]) -> list[float]:
    """The share of the expected numbers that the last answer says, or of those it says if they are more."""
    found = []
    for episode in episodes:
        said, expected = numbers_in(episode.answer), [numbers_in(text)[0] for text in episode.task.fields["gt"]]
        right = sum(number in said for number in expected)
        found.append(right / max(len(expected), len(said)))
    return found


def shuffled(episodes: Sequence[Episode]) -> list[float]:
    """The same numbers, each given to an episode by chance (`random` is seeded by the run): they teach nothing."""
    rewards = right_call(episodes)
    random.shuffle(rewards)
    return rewards

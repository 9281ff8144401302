"""A rollout: what the policy wrote, as its training needs it, and what is told of it.

All processes hold all of it, so that what is trained does not depend on how many there are.
"""

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax

from minimind_jax.agreement import exchange
from minimind_jax.rl.episode import Episode
from minimind_jax.rl.play import GaveUp


class Row(NamedTuple):
    """An episode. See `Episode` for the first of its fields; calls, failures: of tools."""

    group: int
    tokens: list[int]
    prompt: int
    sampled: list[bool]
    logprobs: list[float]
    finish: str
    reward: float
    rewards: dict[str, float | None]
    turns: int
    calls: int
    failures: int
    unjudged: bool = False

    @classmethod
    def of(cls, episode: Episode) -> "Row":
        own = {name: getattr(episode, name) for name in (*cls._fields[:8], "unjudged")}
        told = [result.is_error for turn in episode.turns for result in turn.observations]
        calls = sum(len(turn.calls) for turn in episode.turns)
        return cls(**own, turns=len(episode.turns), calls=calls, failures=sum(told))

    @property
    def written(self) -> int:
        """Tokens of the policy."""
        return sum(self.sampled)


class Rollout(NamedTuple):
    """What the policy wrote, and what is told of it."""

    rows: list[Row]  # of one group side by side
    told: dict[str, float]  # numbers by the names of metrics


def shared(
    process: int, episodes: Sequence[Episode] | None, counts: Mapping[str, float]
) -> tuple[list[Row], Counter[str]]:
    """The rows of all processes, in the order of their groups, and the sums of what they counted. process: its index,
    the same on those that have the same rows (see `sharding.data_process`). Raises GaveUp, on all, where one of them
    has no episodes, for it gave up."""
    rows = None if episodes is None else [Row.of(episode) for episode in episodes]
    told = [[process, rows, counts]]
    if jax.process_count() > 1:  # alone, a large rollout takes seconds to be written and read
        told = [json.loads(text) for text in exchange(json.dumps(*told))]
    if any(theirs is None for _, theirs, _ in told):
        raise GaveUp
    parts = {index: (theirs, counted) for index, theirs, counted in reversed(told)}
    found = [Row(*row) for theirs, _ in parts.values() for row in theirs]
    return sorted(found, key=lambda row: row.group), sum((Counter(own) for _, own in parts.values()), Counter())


def groups_of(rows: Sequence[Row]) -> dict[int, list[Row]]:
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return groups


def teaches_nothing(group: Sequence[Row]) -> bool:
    """Whether all completions of a prompt that have a reward have the same, and so no advantage over each other."""
    return len({row.reward for row in group if not row.unjudged}) <= 1


def judged(rows: Sequence[Row]) -> list[Row]:
    """Those that have a reward."""
    return [row for row in rows if not row.unjudged]


def describe(rows: Sequence[Row]) -> dict[str, float]:
    """What is told of completions, under TRL's names; of rewards nothing where there are none."""
    groups = groups_of(rows).values()
    rewards, is_compared = [row.reward for row in judged(rows)], max(map(len, groups)) > 1
    lengths = [row.written for row in rows]
    ended = [row.written for row in rows if row.finish == "stop"] or [0]
    told = {
        "completions/mean_length": statistics.fmean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": statistics.fmean(row.finish != "stop" for row in rows),
        "completions/mean_terminated_length": statistics.fmean(ended),
        "completions/min_terminated_length": min(ended),
        "completions/max_terminated_length": max(ended),
    }
    if is_compared:
        told["frac_reward_zero_std"] = statistics.fmean(map(teaches_nothing, groups))
    if rewards:
        spreads = [_spread([row.reward for row in group]) for group in groups_of(judged(rows)).values()]
        told["reward"] = statistics.fmean(rewards)
        told["reward_std"] = statistics.fmean(spreads) if is_compared else _spread(rewards)
    for name in rows[0].rewards:
        if values := [row.rewards[name] for row in rows if row.rewards[name] is not None]:
            told |= {f"rewards/{name}/mean": statistics.fmean(values), f"rewards/{name}/std": _spread(values)}
    if any(row.turns > 1 or row.calls for row in rows):
        calls = sum(row.calls for row in rows)
        told |= {
            "tools/call_frequency": calls / len(rows),
            "tools/failure_frequency": sum(row.failures for row in rows) / max(calls, 1),
            "turns/mean": statistics.fmean(row.turns for row in rows),
        }
    return {name: float(value) for name, value in told.items()}


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0

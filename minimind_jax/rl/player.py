"""Episodes of a run's tasks, written by its policy, rewarded, and told."""

import dataclasses
import functools
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.config.rl import RLConfig
from minimind_jax.data.documents import encode_prompt
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.model.transformer import Params
from minimind_jax.rl.environment import Environment
from minimind_jax.rl.episode import Episode, Task
from minimind_jax.rl.play import GaveUp, Start, Writer, play
from minimind_jax.rl.rewards import Rewards
from minimind_jax.rl.rollout import Rollout, Row, describe, groups_of, judged, shared, teaches_nothing
from minimind_jax.rl.tasks import Tasks, drawn_tasks, refilling_tasks, thinks
from minimind_jax.seeds import named_seed
from minimind_jax.sharding import announce
from minimind_jax.training.stop import Notice


class Policy(Protocol):
    """What writes with parameters in training: `policy.LocalPolicy`, or `remote.RemotePolicy`."""

    def load(self, params: Params) -> Writer:
        """Who writes with these parameters from now on."""


class Player:
    """Plays a run's tasks.

    process: (index, count) of this process among those with rows of their own (see `sharding.data_process`).
    settle: waits for a rollout that another thread has written at present.
    """

    def __init__(
        self,
        config: RLConfig,
        tokenizer: Tokenizer,
        tasks: Tasks,
        policy: Policy,
        environment: Environment,
        rewards: Rewards,
        process: tuple[int, int] = (0, 1),
    ):
        self.config, self.tokenizer, self.tasks, self.rewards = config, tokenizer, tasks, rewards
        self._policy, self._environment, self._process = policy, environment, process
        self.settle: Callable[[], object] = lambda: None
        self._began, self._notice = 0.0, Notice()
        rollout = config.rollout
        self._sampling = SamplingConfig(
            max_new_tokens=rollout.max_new_tokens, temperature=rollout.temperature, top_k=rollout.top_k,
            top_p=rollout.top_p,
        )  # fmt: skip

    def close(self) -> None:
        self._environment.close()
        self.rewards.__exit__()

    def load(self, params: Params) -> Writer:
        """Who writes a rollout with these parameters, which may go away then."""
        self._began = time.perf_counter()
        return self._policy.load(params)

    def rollout(self, writer: Writer, number: int, is_stopping: Callable[[], bool]) -> tuple[Rollout, list[Episode]]:
        """The rollout of that number, which follows from it, the writer's parameters and the run's seed; and this
        process's episodes of it. Raises `play.GaveUp` where the run is to stop."""
        wanted, config, counted = self.config.rollout, self.config, Counter()

        def ask(numbers: Sequence[int], name: str, first: int) -> tuple[list[Row], list[Episode]]:
            """The rows of all processes and the episodes of this one, of tasks by their numbers. first: group."""
            tasks = [self.tasks.train[number] for number in numbers]
            episodes = self.play(writer, is_stopping, tasks, name, wanted.completions, self._sampling, first)
            started = time.perf_counter()
            failures = self.rewards(episodes or ())
            counted["time/rewards"] += time.perf_counter() - started
            rows, counts = shared(self._process[0], episodes, failures)
            counted.update(counts)
            return rows, episodes

        numbers = drawn_tasks(len(self.tasks.train), wanted.prompts, config.seed, number)
        rows, episodes = ask(numbers, f"rollout/{number}", 0)
        asked = wanted.prompts
        for attempt in range(config.policy.refill):
            missing = wanted.prompts - sum(not teaches_nothing(group) for group in groups_of(rows).values())
            if not missing:
                break
            numbers = refilling_tasks(len(self.tasks.train), missing, config.seed, number, attempt)
            more, played = ask(numbers, f"rollout/{number}/{attempt}", asked)
            rows, episodes, asked = rows + more, episodes + played, asked + missing
        if config.policy.refill:
            kept = sorted(groups_of(rows).values(), key=teaches_nothing)[: wanted.prompts]
            rows = [row for group in kept for row in group]
            counted["refill/prompts"] = asked
            counted["refill/kept"] = sum(not teaches_nothing(group) for group in kept)
        told = describe(rows) | {name: float(value) for name, value in counted.items()}
        told["time/rollout"] = time.perf_counter() - self._began - told["time/rewards"]
        return Rollout(rows, told), episodes

    def play(
        self,
        writer: Writer,
        is_stopping: Callable[[], bool],
        tasks: Sequence[Task],
        name: str,
        completions: int,
        sampling: SamplingConfig,
        first: int = 0,
    ) -> list[Episode] | None:
        """This process's episodes of all tasks, None where it gave up, which `shared` tells the others. name: of their
        draws. first: group."""
        config, (index, count) = self.config, self._process
        starts = []
        for place in range(index, len(tasks), count):
            task, draw = tasks[place], f"{name}/{place}"
            thinking = thinks(config, task, draw)
            prompt = encode_prompt(self.tokenizer, task.messages, task.tools, thinking)
            for completion in range(completions):
                seed = named_seed(config.seed, draw, completion)
                starts.append(Start(first + place, task, prompt, thinking, seed))
        agent = getattr(config, "agent", None)
        limits = {"turns": agent.turns, "seconds": agent.seconds} if agent else {}
        try:
            return play(
                writer, starts, self._environment, self.tokenizer, sampling=sampling, seq_len=config.data.seq_len,
                tell=announce, is_stopping=lambda: is_stopping() or self._notice(), **limits,
            )  # fmt: skip
        except GaveUp:
            return None

    # Held-out tasks ---------------------------------------------------------------------------------------------------

    def describe(self) -> str:
        rows = self.config.training.eval_rows
        count = min(rows or len(self.tasks.held_out), len(self.tasks.held_out))
        return f"{count:,} of {len(self.tasks.held_out):,} held-out prompts"

    def __call__(self, params: Params, is_stopping: Callable[[], bool]) -> dict[str, float] | None:
        """Judges the policy, as a `training.source.Evaluation`: `reward`, `success` and `length` of greedy completions,
        and pass@k of drawn ones, each of which is the share of the tasks that one of k solves. Completions that have no
        reward are left out; NaN is of none."""
        tasks = self.tasks.held_out[: self.config.training.eval_rows or None]
        self.settle()
        play = functools.partial(self.play, self._policy.load(params), is_stopping, tasks, "held out")
        greedy = dataclasses.replace(self._sampling, temperature=0.0, top_k=0, top_p=1.0)
        count, drawn = self.config.held_out.completions, []
        try:
            rows = self._judged(play(1, greedy))
            if count:
                drawn = judged(self._judged(play(count, self._sampling)))
        except GaveUp:
            return None
        found = {
            "reward": _mean(row.reward for row in judged(rows)),
            "success": _mean(row.rewards["success"] for row in judged(rows)),
            "length": _mean(row.written for row in rows),
        }
        if count:
            groups = groups_of(drawn).values()
            found[f"pass@{count}"] = _mean(any(row.rewards["success"] for row in group) for group in groups)
            found["drawn_success"] = _mean(row.rewards["success"] for row in drawn)
        return found

    def _judged(self, episodes: Sequence[Episode] | None) -> list[Row]:
        """Rows of all processes, whose rewards say whether each is a success, too."""
        self.rewards(episodes or ())
        for episode in episodes or ():
            episode.rewards = episode.rewards | {"success": float(self.rewards.success(episode))}
        return shared(self._process[0], episodes, {})[0]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return statistics.fmean(values) if values else math.nan

"""Rollouts as the source of the one training loop: at the first step of each stride the policy writes, what it wrote is
rewarded and scored, and becomes the batches of all its steps."""

import concurrent.futures
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from minimind_jax.config.rl import RLConfig
from minimind_jax.config.sections import LoopConfig
from minimind_jax.data.rows import Batch
from minimind_jax.errors import UserError
from minimind_jax.losses.policy import divergences
from minimind_jax.model.transformer import Params
from minimind_jax.rl.advantages import next_beta
from minimind_jax.rl.batches import arrays_of, minibatches, with_advantages
from minimind_jax.rl.episode import Episode
from minimind_jax.rl.pages import show, write_page
from minimind_jax.rl.play import GaveUp, Writer
from minimind_jax.rl.player import Player
from minimind_jax.rl.rollout import Rollout, Row, judged
from minimind_jax.rl.scoring import Scorer
from minimind_jax.sharding import announce, data_process

PAGES = "rollouts"  # a folder of the run


class Rollouts:
    """A `training.source.Source`. folder: of the run.

    Between strides a checkpoint has to know the weight of the divergence, and a rollout that was written ahead.
    """

    def __init__(self, config: RLConfig, player: Player, scorer: Scorer, mesh: jax.sharding.Mesh, folder: Path):
        self.config, self.player, self.scorer = config, player, scorer
        self.stride = config.stride
        self._process, self._folder = data_process(mesh), folder
        self._beta, self._content = config.policy.beta, player.tasks.content
        self._batches: Iterator[Batch] = iter(())  # that are left of the rollout
        self._ahead: tuple[int, Callable[[], Rollout]] | None = None  # a rollout that is written already, or soon
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._steps, self._shown, self._is_closed, self._has_warned = 0, False, False, False

    def planned_steps(self, training: LoopConfig) -> int:
        rollouts = math.ceil((training.epochs or 1) * len(self.player.tasks.train) / self.config.rollout.prompts - 1e-6)
        if training.steps is not None:
            rollouts = -(-training.steps // self.stride)
        return max(1, rollouts) * self.stride

    def record(self) -> dict[str, Any]:
        """Tasks, and what else decides the rollouts to come."""
        config, ahead = self.config, {}
        if self._ahead is not None:
            number, rollout = self._ahead
            ahead = {"ahead": [number, rollout()]}
        return {
            "prompts to learn from": len(self.player.tasks.train),
            "content of the prompts (hash)": self._content,
            "prompts": config.rollout.prompts,
            "completions": config.rollout.completions,
            "updates": config.policy.updates,
            "minibatches": config.policy.minibatches,
            "beta": self._beta,
            **ahead,
        }

    def check_record(self, earlier: dict[str, Any]) -> str | None:
        now = self.record()
        compared = [key for key in now if key not in ("beta", "ahead")]
        if changed := [key for key in compared if earlier.get(key) != now[key]]:
            told = ", ".join(f"{key} {earlier.get(key)} -> {now[key]}" for key in changed)
            raise UserError(
                f"the rollouts are not those of the checkpoint ({told}), so the run cannot go on; put settings and "
                "data back, or start another run (another run name, with init_from for the weights)"
            )
        if self.config.policy.kl_target:
            self._beta = earlier["beta"]
        if "ahead" in earlier and self.config.rollout.ahead:
            number, value = earlier["ahead"]
            rollout = Rollout([Row(*row) for row in value[0]], value[1])
            self._ahead = number, lambda: rollout
        return None

    def facts(self, steps: int) -> dict[str, str]:
        own, n, warmup = self.config.rollout, len(self.player.tasks.train), self.config.critic.warmup
        each = f", {self.stride} steps each" if self.stride > 1 else ""
        each += f"; the first {warmup} train the value model alone" if self.config.has_critic and warmup else ""
        return {
            "training data": f"{n:,} prompts; a rollout is {own.prompts} of them, {own.completions} completions each",
            "rewards": ", ".join(self.config.rewards.use),
            "steps": f"{steps:,} ({steps // self.stride:,} rollouts{each})",
        }

    def begin(self, step: int, steps: int, is_stopping: Callable[[], bool]) -> None:
        self._steps, self._is_stopping = steps, is_stopping

    def next(self, step: int, params: Params) -> tuple[Batch, Mapping[str, float]] | None:
        told = {}
        if step % self.stride == 0:
            try:
                told = self._learn(step // self.stride, params)
            except GaveUp:
                return None
        batch, (index, processes) = next(self._batches), self._process
        share = len(batch["tokens"]) // processes
        return {name: array[index * share : (index + 1) * share] for name, array in batch.items()}, told

    def close(self) -> None:
        self._is_closed = True
        self._thread.shutdown()
        self.player.close()

    def _learn(self, number: int, params: Params) -> dict[str, float]:
        """Makes the batches of a rollout. Returns what is told of it."""
        rollout = self._rollout(number, params)
        started = time.perf_counter()
        arrays = self.scorer(params, arrays_of(rollout.rows, self.config.data.seq_len))
        arrays = with_advantages(arrays, rollout.rows, self.config, self._beta)
        self._batches = minibatches(arrays, rollout.rows, self.config, number, self._beta)
        told = {**rollout.told, "time/score": time.perf_counter() - started}
        if self.config.policy.beta:
            told["beta"] = self._beta
        if target := self.config.policy.kl_target:
            kl_NT = divergences(arrays["old_log_probs"], arrays["reference_log_probs"], "k1")
            kl = float((kl_NT * arrays["mask"]).sum() / max(len(rollout.rows), 1))
            told["objective/kl"] = kl
            self._beta = next_beta(self._beta, kl, target, self.config.policy.kl_horizon, len(rollout.rows))
        return told

    def _rollout(self, number: int, params: Params) -> Rollout:
        """That of this number; the one behind it begins to be written, if it is to be ahead."""
        ahead, self._ahead = self._ahead, None
        if ahead and ahead[0] == number:
            found = ahead[1]()
        else:
            found = self._play(number, self.player.load(params), self._is_stopping)
        if self.config.rollout.ahead and (number + 1) * self.stride < self._steps:
            writer = self.player.load(params)  # now, for the next step takes the parameters away
            if self.config.rollout.server:
                # The update, which comes before a checkpoint, takes its parameters away: only an error ends it early.
                writing = self._thread.submit(self._play, number + 1, writer, lambda: self._is_closed)
                self._ahead, self.player.settle = (number + 1, writing.result), writing.result
            else:
                self._ahead = number, lambda: found  # for the checkpoint, if the run is to stop meanwhile
                written = self._play(number + 1, writer, self._is_stopping)
                self._ahead = number + 1, lambda: written
        return found

    def _play(self, number: int, writer: Writer, is_stopping: Callable[[], bool]) -> Rollout:
        rollout, episodes = self.player.rollout(writer, number, is_stopping)
        self._warn(rollout, number)
        self._tell(episodes, number)
        return rollout

    def _warn(self, rollout: Rollout, number: int) -> None:
        """Of the first rollout whose rewards tell no answer from another, even where others were asked for."""
        rewards, which, refill = [row.reward for row in judged(rollout.rows)], "", ""
        is_nothing = len(rewards) > 1 and len(set(rewards)) == 1
        if self.config.policy.advantage in ("group", "leave_one_out"):
            is_nothing = bool(rewards) and rollout.told["frac_reward_zero_std"] == 1
            which = " of each prompt"
            refill = ", policy.refill; frac_reward_zero_std tells how often that is so"
        if is_nothing and not self._has_warned:
            announce(
                f"warning: in rollout {number} all completions{which} got the same reward, which tells no better one "
                f"from a worse (easier or harder prompts, finer rewards{refill})"
            )
            self._has_warned = True

    def _tell(self, episodes: Sequence[Episode], number: int) -> None:
        """Pages of some episodes at each evaluation, and the first one in the terminal if asked for."""
        config, step = self.config, number * self.stride
        if jax.process_index() or not episodes:
            return
        if config.debug and not self._shown:
            show(episodes[0], self.player.tokenizer, Console())
        self._shown = True
        every = config.training.eval_every
        if config.pages and (number == 0 or (every and step // every > (step - self.stride) // every)):
            page = self._folder / PAGES / f"step_{step:06}.md"
            page.parent.mkdir(exist_ok=True)
            write_page(page, episodes[: config.pages], self.player.tokenizer)

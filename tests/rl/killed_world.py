"""What runs that are killed are given: a reward that leaves a mark, and tools that are always called.

A test copies this file beside a folder `tokenizer`; the mark is left there, too.
"""

import os
import time
from pathlib import Path

from minimind_jax.config.rl import AgentSettings
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.data.tools import Call
from minimind_jax.rl.environment import Offered, ToolUse

HERE = Path(__file__).parent


def short(episodes):
    """1 for the shortest completions; of the third record always 1, so that its groups teach nothing."""
    (HERE / "mark").write_text(str(os.getpid()))
    time.sleep(0.05)
    return [1.0 if episode.task.fields["answer"] == 2 else 1 / len(episode.completion) for episode in episodes]


class Calculates(ToolUse):
    """Whatever is said, its number of characters goes to the calculator; which never answers while a file `hang` is
    there."""

    def __init__(self):
        super().__init__(AgentSettings(tools=("calculator",)), Tokenizer.load(HERE / "tokenizer"))
        self.schemas = ()  # of which prompts say nothing

    def step(self, state, turn):
        while (HERE / "hang").exists():
            time.sleep(0.05)
        call = Call("calculate_math", {"expression": f"{len(turn.text)} * 3"})
        return super().step(Offered(frozenset({call.name}), state.seed), turn._replace(calls=(call,)))

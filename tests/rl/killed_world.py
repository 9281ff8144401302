"""What runs that are killed are given: a reward that leaves a mark, and tools that are always called. The environment
says where the mark and the tokenizer are."""

import os
import time
from pathlib import Path

from minimind_jax.config.rl import AgentSettings
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.data.tools import Call
from minimind_jax.rl.environment import Offered, ToolUse

MARK, TOKENIZER = "MINIMIND_TEST_MARK", "MINIMIND_TEST_TOKENIZER"


def short(episodes):
    """1 for the shortest completions; of the third record always 1, so that its groups teach nothing."""
    Path(os.environ[MARK]).write_text(str(os.getpid()))
    time.sleep(0.05)
    return [1.0 if episode.task.fields["answer"] == 2 else 1 / len(episode.completion) for episode in episodes]


class Calculates(ToolUse):
    """Whatever is said, its number of characters goes to the calculator."""

    def __init__(self):
        super().__init__(AgentSettings(tools=("calculator",)), Tokenizer.load(os.environ[TOKENIZER]))

    def step(self, state, turn):
        call = Call("calculate_math", {"expression": f"{len(turn.text)} * 3"})
        offered = Offered(frozenset(self.names), state.seed)
        return super().step(offered, turn._replace(calls=(call,)))

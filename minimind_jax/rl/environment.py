"""What answers a policy: nothing (one turn), tools, or an environment of the user's own."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from minimind_jax.config.rl import AgentSettings
from minimind_jax.data.messages import Message
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.data.tools import Call
from minimind_jax.errors import UserError
from minimind_jax.inference.tool_use import carry_out
from minimind_jax.rl.episode import Task, Turn
from minimind_jax.seeds import named_seed
from minimind_jax.tools.toolbox import Toolbox
from minimind_jax.tools.worker import imported

MOST_CALLS = 32  # of a turn that are carried out
WORKERS = 8  # calls of all episodes that run at the same time
_WIDEST = 32  # characters of a token: what is longer than so many of each is cut before it is tokenised


class Environment(Protocol):
    """Four functions. They run in threads: those of one episode one after the other, those of others meanwhile.

    One that raises ends its episode, and not the run, unless all of a rollout end so.
    """

    def start(self, task: Task, seed: int) -> Any:
        """The state of a new episode, which becomes `Episode.state`. What it draws comes of the seed, which is that of
        all episodes of the prompt in a rollout: they are compared with each other."""

    def step(self, state: Any, turn: Turn) -> Sequence[Message] | None:
        """What follows the policy's turn: messages with a role (`tool`, `user` or `system`) and content, behind which
        it writes again; None where the episode is over. A tool's message may say `is_error`."""

    def end(self, state: Any) -> None:
        """Once for every start, whatever ended the episode but the end of the run: the last word on its state."""

    def close(self) -> None:
        """There are no more episodes, also where some were given up in the middle."""


class SingleTurn(Environment):
    """Answers nothing: an episode is one turn. A base for environments that need only some of the functions."""


class Offered(NamedTuple):
    """What an episode may call, and the seed of what its tools draw."""

    names: frozenset[str]
    seed: int


class ToolUse(SingleTurn):
    """Carries out the calls of each turn; one without calls is the last.

    Whatever is wrong with a call is what the policy is told: broken JSON, a tool that does not exist or that the prompt
    did not offer, a call that ended for time or memory, more than MOST_CALLS in a turn.
    Raises UserError for tools that cannot be found.
    """

    def __init__(self, settings: AgentSettings, tokenizer: Tokenizer):
        self._tokenizer, self._most = tokenizer, settings.observation_tokens
        limits = {"seconds": settings.tool_seconds, "memory_mib": settings.tool_memory}
        self._tools = Toolbox(settings.tools, **limits, characters=_WIDEST * self._most, workers=WORKERS)
        self.schemas = self._tools.schemas

    def start(self, task: Task, seed: int) -> Offered:
        schemas = [tool.get("function") or tool for tool in task.tools or ()]
        return Offered(frozenset(schema["name"] for schema in schemas), seed)

    def step(self, state: Offered, turn: Turn) -> list[Message] | None:
        calls = [_allowed(call, number, state) for number, call in enumerate(turn.calls)]
        results = carry_out(calls, self._tools, named_seed(state.seed, "calls", turn.start))
        told = [{"role": "tool", "content": self._cut(text), "is_error": is_error} for text, is_error in results]
        return told or None

    def close(self) -> None:
        self._tools.close()

    def _cut(self, text: str) -> str:
        ids = self._tokenizer.encode(text)
        if len(ids) <= self._most:
            return text
        kept = self._tokenizer.decode(ids[: self._most], skip_special_tokens=False)
        return kept.rstrip("\N{REPLACEMENT CHARACTER}") + "... (cut)"


def _allowed(call: Call, number: int, offered: Offered) -> Call:
    """The call, or one that is told what is wrong with it."""
    if number >= MOST_CALLS:
        return Call("", {}, f"more than {MOST_CALLS} calls at once")
    if call.error or call.name in offered.names:
        return call
    there_are = ", ".join(sorted(offered.names)) or "none"
    return Call("", {}, f"the tool {call.name[:60]!r} is not offered; there are {there_are}")


def load_environment(settings: AgentSettings, tokenizer: Tokenizer) -> Environment:
    """`tools`, or a class of the user's own, `module:Class` or `FILE.py:Class`, which is made without arguments. Raises
    UserError where there is no such class, or one of the four functions is missing."""
    name = settings.environment
    if name == "tools":
        return ToolUse(settings, tokenizer)
    place, _, attribute = name.rpartition(":")
    if not place or not attribute.isidentifier():
        raise UserError(f"agent.environment is {name}; expected tools, module:Class or FILE.py:Class")
    try:
        made = getattr(imported(place), attribute)()
    except Exception as error:
        raise UserError(f"the environment {name} cannot be made: {type(error).__name__}: {error}") from error
    functions = [name for name in vars(Environment) if not name.startswith("_")]
    if missing := [function for function in functions if not callable(getattr(made, function, None))]:
        raise UserError(
            f"the environment {name} has no function {missing[0]}; it needs {', '.join(functions)} (a class that "
            "derives of minimind_jax.rl.environment.SingleTurn has them)"
        )
    return made

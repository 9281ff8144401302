"""Tools in the hands of a model: what comes of the calls in its answers."""

from collections.abc import Sequence

from minimind_jax.data.tools import Call
from minimind_jax.seeds import named_seed
from minimind_jax.tools.toolbox import Observation, Toolbox
from minimind_jax.tools.worker import error_text


def carry_out(calls: Sequence[Call], tools: Toolbox, seed: int | None = None) -> list[Observation]:
    """What the model is told of its calls, broken ones among them, in their order. seed: of what the tools draw."""
    whole = [(call.name, call.arguments) for call in calls if not call.error]
    seeds = None if seed is None else [named_seed(seed, number) for number in range(len(whole))]
    results = iter(tools.call_all(whole, seeds))
    return [Observation(error_text(call.error), True) if call.error else next(results) for call in calls]

"""What the processes of a run must agree on, compared before the first step: they would otherwise train on different
things, or wait for each other for ever."""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from minimind_jax.errors import UserError

T = TypeVar("T")


def check_agreement(about: dict[str, Any]) -> None:
    """Raises UserError, on all processes, when they have other values of something: names it, and who has which.

    about: name -> what JSON can hold. Names may differ from process to process, as versions of this program do.
    """
    if jax.process_count() == 1:
        return
    told = [json.loads(text) for text in _gather(json.dumps(about, sort_keys=True))]
    differing = []
    for name in dict.fromkeys(name for one in told for name in one):
        values = [json.dumps(one[name], ensure_ascii=False) if name in one else "nothing" for one in told]
        if len(set(values)) > 1:
            by_value = {value: [i for i, own in enumerate(values) if own == value] for value in dict.fromkeys(values)}
            differing.append(f"{name} is " + ", ".join(f"{v} on {_processes(who)}" for v, who in by_value.items()))
    if differing:
        raise UserError(
            f"the processes of this run do not agree: {'; '.join(differing)}. Give all of them the same, then start "
            "them again"
        )


def on_all(work: Callable[[], T]) -> T:
    """What `work` returns. Where it raises UserError on one process, it does so on all, which would else wait."""
    result, failure = None, None
    try:
        result = work()
    except UserError as error:
        failure = error
    failures = _gather(str(failure or "")) if jax.process_count() > 1 else []
    if failure is not None:
        raise failure
    for process, message in enumerate(failures):
        if message:
            raise UserError(f"process {process} has stopped: {message}")
    return result


@functools.cache
def code_hash() -> str:
    """Of this program's own files, which may differ where its version does not."""
    root, found = Path(__file__).parent, hashlib.blake2b(digest_size=8)
    for file in sorted(root.rglob("*.py")):
        found.update(f"{file.relative_to(root).as_posix()} ".encode() + file.read_bytes())
    return found.hexdigest()


def _gather(text: str) -> list[str]:
    """The text of each process."""
    content = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(content), np.int32))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(content)] = content
    gathered = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
    return [row[:length].tobytes().decode() for row, length in zip(gathered, lengths.tolist(), strict=True)]


def _processes(numbers: list[int]) -> str:
    return f"process{'es' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"

"""What the processes of a run tell each other outside of its steps: what they must agree on, and that one has failed.
They would otherwise train on different things, or wait for each other for ever."""

import contextlib
import functools
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from minimind_jax.errors import UserError
from minimind_jax.signals import say

PATIENCE = 10.0  # seconds until a failure is said that the other processes have not heard of yet
T = TypeVar("T")


def check_agreement(about: dict[str, Any]) -> None:
    """Raises UserError, on all processes, when they have other values of something: names it, and who has which.

    about: name -> what JSON can hold. Names may differ from process to process, as versions of this program do.
    """
    if jax.process_count() == 1:
        return
    told = [json.loads(text) for text in exchange(json.dumps(about, sort_keys=True))]
    differing = []
    for name in dict.fromkeys(name for one in told for name in one):
        values = [json.dumps(one[name], ensure_ascii=False) if name in one else "nothing" for one in told]
        if len(set(values)) > 1:
            whose = {value: [str(i) for i, own in enumerate(values) if own == value] for value in dict.fromkeys(values)}
            parts = (f"{value} on process{'es' * (len(i) > 1)} {', '.join(i)}" for value, i in whose.items())
            differing.append(f"{name} is {', '.join(parts)}")
    if differing:
        raise UserError(
            f"the processes of this run do not agree: {'; '.join(differing)}. Give all of them the same, then start "
            "them again"
        )


def on_all(work: Callable[[], T]) -> T:
    """What `work` returns. Where it fails on one process, UserError is raised on the others, which would else wait."""
    with ending_together():
        result = work()
    exchange()
    return result


def on_first(work: Callable[[], object]) -> None:
    """Does `work` on the first process; the others wait until it is done, or has failed."""
    on_all(lambda: work() if jax.process_index() == 0 else None)


def first_says(flag: bool) -> bool:
    """The first process's `flag`, on all of them: for questions to a disk that changes while they are asked."""
    return bool(json.loads(exchange(json.dumps(bool(flag)))[0]))


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Where the body fails on one process, the others get a UserError that says so in their next `exchange`, or at the
    end of their own body; it may be entered within itself. In the body all talk is by `exchange`."""
    try:
        yield
    except BaseException as error:
        if jax.distributed.is_initialized() and not getattr(error, "is_told", False):
            message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            late = threading.Timer(PATIENCE, say, [f"the other processes have not heard yet that {message}"])
            late.daemon = True
            late.start()
            with contextlib.suppress(UserError):  # of another process that has failed, too
                exchange(failure=message)
            late.cancel()
            error.is_told = True
        raise


@contextlib.contextmanager
def ending_alone() -> Iterator[None]:
    """For a part of `ending_together` in which the processes talk in other ways, as in their steps."""
    try:
        yield
    except BaseException as error:
        error.is_told = True
        raise


@functools.cache
def code_hash() -> str:
    """Of this program's own files, which may differ where its version does not."""
    root, found = Path(__file__).parent, hashlib.blake2b(digest_size=8)
    for file in sorted(root.rglob("*.py")):
        found.update(f"{file.relative_to(root).as_posix()} ".encode() + file.read_bytes())
    return found.hexdigest()


def exchange(text: str = "", failure: str = "") -> list[str]:
    """The text of each process. Raises UserError where one has failed, and says with what."""
    if jax.process_count() == 1:
        return [text]
    told = _gather(f"!{failure}" if failure else f" {text}")
    for process, said in enumerate(told):
        if said.startswith("!") and process != jax.process_index():
            error = UserError(f"process {process} has stopped: {said[1:]}")
            error.is_told = True
            raise error
    return [said[1:] for said in told]


def _gather(text: str) -> list[str]:
    content = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(content), np.int32))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(content)] = content
    gathered = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
    return [row[:length].tobytes().decode() for row, length in zip(gathered, lengths.tolist(), strict=True)]

"""Functions of a user, most of them harmful."""

import ctypes
import os
import random
import sys
import time
from pathlib import Path


def greet(name: str, times: int = 1) -> str:
    """Greets somebody.

    Args:
        name: who is greeted
        times: how often
    """
    return "hello " * times + name


def sleep(seconds: float) -> str:
    """Sleeps."""
    time.sleep(seconds)
    return "awake"


def meet(own: str, other: str) -> str:
    """Waits for a call that runs at the same time."""
    Path(own).touch()
    while not Path(other).exists():
        time.sleep(0.01)
    return "met"


def hang() -> str:
    """Never ends, and lets nothing else of its process run."""
    return str(9**9**9)


def hog() -> str:
    """Takes memory without end."""
    kept = []
    while True:
        kept.append(b"x" * (16 << 20))


def keep(mib: int) -> str:
    """Takes memory and keeps it."""
    kept.append(b"x" * (mib << 20))
    return "kept"


def long() -> str:
    """A result of ten million characters."""
    return "long " * 2_000_000


def odd() -> dict:
    """What JSON and UTF-8 do not have."""
    return {"half": "\ud800", "none": float("nan"), "set": {1}}


def fail(words: str) -> str:
    """Fails."""
    raise KeyError(words)


def leave() -> str:
    """Ends the program."""
    sys.exit(3)


def crash() -> str:
    """Ends the process."""
    os._exit(1)


def fork(file: str) -> str:
    """Goes on twice."""
    if pid := os.fork():
        Path(file).write_text(str(pid))
    return "one"


def fault() -> str:
    """Reads where there is nothing."""
    return ctypes.string_at(0)


def speak() -> str:
    """Prints."""
    print("said aloud")
    os.write(1, b"and below\n")
    return "said"


def ask() -> str:
    """Reads the standard input."""
    return input()


def spawn(file: str) -> str:
    """Starts a process, whose id it writes, and hangs."""
    if child := os.fork():
        Path(file).write_text(str(child))
    time.sleep(600)


def draw() -> list:
    """Draws numbers."""
    return [random.random() for _ in range(3)]


def _hidden() -> str:
    """Not a tool."""


kept = []

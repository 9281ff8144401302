"""The `minimind` command, also as `python -m minimind_jax`."""

import os
import signal
import sys

from minimind_jax import signals
from minimind_jax.huge_pages import use_huge_pages

# The steady stages (see `StageKind`), which nothing imports before the program starts anew, and a whole of them.
STEADY = ("pretrain", "sft", "dpo", "reward", "vlm-pretrain", "vlm-sft", "demo")


def program(*arguments: str) -> int:
    """Runs `minimind` with these arguments and those of the command line; returns the exit status."""
    command = next(iter([*arguments, *sys.argv[1:]]), "")
    use_huge_pages(keep=None if command == "pipeline" else command in STEADY)
    try:
        status = signals.exit_status(lambda: _main([*arguments, *sys.argv[1:]]))
    finally:  # all is saved and said; one more Ctrl-C must not change how the process ends
        for number in (signal.SIGINT,) if _is_one_of_several() else signals.SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    if status in {128 + number for number in signals.SIGNALS} and not _is_one_of_several():
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)  # what was cut off may still compute, and would crash Python's own end
    return status


def _main(arguments: list[str]) -> int:
    from minimind_jax.cli import main  # seconds, in which a signal is answered, too

    return main(arguments)


def _is_one_of_several() -> bool:
    """Whether other processes of a run wait for this one to leave in an orderly way."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


if __name__ == "__main__":
    sys.exit(program())

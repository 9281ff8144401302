"""The `minimind` command, also as `python -m minimind_jax`."""

import signal
import sys

from minimind_jax.cli import main
from minimind_jax.huge_pages import use_huge_pages


def program(*arguments: str) -> int:
    """Runs `minimind` with these arguments and those of the command line; returns the exit status."""
    use_huge_pages()
    try:
        return main([*arguments, *sys.argv[1:]])
    finally:  # all is saved and said; one more Ctrl-C must not change how the process ends
        signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(program())
